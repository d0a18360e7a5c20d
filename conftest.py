"""Notebooks under nbval: on the preset smoke, and what is not compared where output is checked."""

import os

import pytest


def pytest_configure() -> None:
    os.environ["BITSTACK_PRESET"] = "smoke"  # the kernels inherit it


def pytest_collectstart(collector: pytest.Collector) -> None:
    if collector.path.suffix == ".ipynb":
        # stderr is progress bars; a table's HTML says what its text/plain says.
        collector.skip_compare += ("stderr", "text/html")
