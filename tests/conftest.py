"""Settings and fixtures that several test files share."""

import gc
import os
from pathlib import Path

import pytest
import torch
from tiny_backbones import write_backbones


def pytest_configure() -> None:
    """One thread per process: models are tiny, and pytest-xdist has a worker for each core."""
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny backbones by architecture."""
    return write_backbones(tmp_path_factory.mktemp("backbones"))


def pytest_collection_finish() -> None:
    """Every Trainer collects garbage; this keeps it from going through all that was imported."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()
