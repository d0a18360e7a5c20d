"""The folders a run resumes from: one per finished stage, whole or passed over.

A state folder may lie on a synced drive, where a file can arrive late or cut short. So a stage is
written under a temporary name, with the SHA-256 of every file in it; the stage before is kept until
the next one; and what does not match its digests is not resumed from.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bitstack_nb.files import sha256

logger = logging.getLogger(__name__)

_NUMBERS = "numbers.json"


@contextmanager
def alone(state: Path) -> Iterator[None]:
    """Hold the run of a state folder for this process; another process with the same run waits.

    The lock is the operating system's (over NFS too): it goes with its process, however that ends.
    When the body has not raised, the run is finished: whoever waited has to look for its result.
    """
    file = state.with_suffix(".lock")
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        logger.warning("%s is being run by another process: waiting for its end", state.stem)
        lock.acquire(poll_interval=1)
    try:
        yield
    finally:
        lock.release()
    # Not sooner and not after an error: two could hold two files of this name. Now both would only
    # read the result.
    with suppress(OSError):
        file.unlink()


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


def check_origin(before: Mapping[str, Any], now: Mapping[str, Any], state: Path) -> None:
    """Raise a ValueError if a run to go on with was begun elsewhere than it would go on.

    Args:
        before, now: a result's provenance, as it was then and as it is here.
        state: the run's folder.
    """
    before = {"processes": 1, **before}  # earlier versions knew no other number
    names = {"data": "data", "model": "model", "device": "device"}
    for key, what in (names | {"processes": "number of processes"}).items():
        if before[key] != now[key]:
            raise ValueError(
                f"the run in {state} was begun with another {what} than is there now: delete "
                f"{state} to start it again, or put the former {what} back"
            )
