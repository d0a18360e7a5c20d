"""Notebooks under nbval: the preset, where their runs go, and the outputs that are not compared."""

import os
import tempfile

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment that the notebooks' kernels inherit."""
    os.environ["BITSTACK_PRESET"] = "ci"
    # For models this small a second thread only waits, for minutes on a machine that is busy.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A new folder each time: a finished run is read, not repeated, and would hide a new fault.
    runs = tempfile.TemporaryDirectory()
    os.environ["BITSTACK_OUTPUT"] = runs.name
    config.add_cleanup(runs.cleanup)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Leave out progress bars (stderr), and HTML tables, whose text is compared as text/plain."""
    if collector.path.suffix == ".ipynb":
        collector.skip_compare += ("stderr", "text/html")
