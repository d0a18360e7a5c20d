"""Fixtures that several test files share."""

from pathlib import Path

import pytest
from tiny_checkpoints import write_checkpoints


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny checkpoints by architecture."""
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"))
