"""Notebooks under nbval: on the preset smoke, and what is not compared where output is checked."""

import os
import tempfile

import pytest


def pytest_configure(config: pytest.Config) -> None:
    os.environ["BITSTACK_PRESET"] = "smoke"  # the kernels inherit all three
    # For models this small a second thread only waits, for minutes on a machine that is busy.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Empty each time: a finished run is read, not repeated, and would hide what has broken since.
    runs = tempfile.TemporaryDirectory()
    os.environ["BITSTACK_OUTPUT"] = runs.name
    config.add_cleanup(runs.cleanup)


def pytest_collectstart(collector: pytest.Collector) -> None:
    if collector.path.suffix == ".ipynb":
        # stderr is progress bars; a table's HTML says what its text/plain says.
        collector.skip_compare += ("stderr", "text/html")
