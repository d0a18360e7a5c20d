"""The folders a run resumes from: one per finished stage, whole or passed over.

A state folder may lie on a synced drive, where a file can arrive late or cut short. So a stage is
written under a temporary name, with the SHA-256 of every file in it; the stage before is kept until
the next one; and what does not match its digests is not resumed from.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitstack_nb.files import sha256

_NUMBERS = "numbers.json"


def saved_stages(state: Path) -> list[int]:
    """The stages saved in a state folder, newest first, whether they are whole or not."""
    # A stage that was being written when the run was killed still ends in .tmp.
    numbers = [folder.name.removeprefix("stage-") for folder in state.glob("stage-*")]
    return sorted((int(number) for number in numbers if number.isdigit()), reverse=True)


def stage_folder(state: Path, stage: int) -> Path:
    """Where a stage is saved."""
    return state / f"stage-{stage}"


def check_writable(state: Path) -> None:
    """Make the folder, or raise an OSError now: not after a first stage was trained for nothing."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=state):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {state} ({error}): choose another output folder") from error


@contextmanager
def saving(state: Path, stage: int, numbers: Mapping[str, Any]) -> Iterator[Path]:
    """Yield an empty folder to write a stage's files into; the rename at the end makes it count.

    When the body raises, as on a full disk, what it has written is removed.
    """
    folder = stage_folder(state, stage)
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        digests = {file.name: sha256(file) for file in temporary.iterdir()}
        (temporary / _NUMBERS).write_text(json.dumps({**numbers, "files": digests}))
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one that was passed over
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(stage_folder(state, stage - 2), ignore_errors=True)


def read_numbers(state: Path, stage: int) -> dict[str, Any] | None:
    """The numbers saved with a stage, or None where a file of it is missing or damaged."""
    folder = stage_folder(state, stage)
    try:
        numbers = json.loads((folder / _NUMBERS).read_text())
        digests = numbers.pop("files")
        whole = all(sha256(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return numbers if whole else None
