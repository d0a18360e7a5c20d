"""The folders a run resumes from: one per finished stage, whole or passed over.

A state folder may lie on a synced drive, where a file can arrive late or cut short. So a stage is
written under a temporary name and renamed, and the stage before it is kept until the next one.
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
from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)

_NUMBERS = "numbers.json"


@contextmanager
def alone(state: Path) -> Iterator[None]:
    """Hold the run of a state folder for this process; another process with the same run waits.

    The lock is the operating system's (over NFS too): it goes with its process, however that ends.
    """
    file = state.with_suffix(".lock")
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        logger.warning("another process is executing %s: waiting until it has finished", state.stem)
        lock.acquire(poll_interval=1)
    except (OSError, NotImplementedError) as error:  # filelock has both for a missing flock
        raise OSError(
            f"{state.parent} is on a file system that cannot lock files ({error}): choose an "
            "output folder on another one, and copy the results there in the end"
        ) from error
    try:
        yield
    finally:
        lock.release()
    # Only here, where the run has finished: then two processes that hold two files of this name
    # both only read its result.
    with suppress(OSError):
        file.unlink()


def saved_stages(state: Path) -> list[int]:
    """The stages saved in a state folder, newest first, whether they are whole or not."""
    # The folder of a stage that was being written when the run was killed ends in .tmp.
    numbers = [folder.name.removeprefix("stage-") for folder in state.glob("stage-*")]
    return sorted((int(number) for number in numbers if number.isdigit()), reverse=True)


def check_writable(state: Path) -> None:
    """Make the folder, or raise an OSError that says to choose another."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=state):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {state} ({error}): choose another output folder") from error


@contextmanager
def saving(state: Path, stage: int, numbers: Mapping[str, Any]) -> Iterator[Path]:
    """Yield an empty folder to write a stage's files into; the rename at the end makes it count.

    When the body raises, as on a full disk, the files that it has written are removed.
    """
    folder = state / f"stage-{stage}"
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        files = sorted(file.name for file in temporary.iterdir())
        (temporary / _NUMBERS).write_text(json.dumps({**numbers, "files": files}))
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one that was passed over
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(state / f"stage-{stage - 2}", ignore_errors=True)


def read_numbers(folder: Path) -> dict[str, Any] | None:
    """The numbers saved with a stage, or None where a file of it is missing or cut short."""
    try:
        numbers = json.loads((folder / _NUMBERS).read_text())
        for name in numbers.pop("files"):
            with safe_open(folder / name, "pt"):  # compares its length with its header
                pass
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError):
        return None
    return numbers


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What is here of an environment, where it is not what a run was begun with or resumed in."""
    for resumed in before.get("resumed", []):
        before = {**before, **resumed}
    names = ("python", "platform", "cpu", "cores", "torch_threads", "gpus", "packages")
    return {name: now[name] for name in (*names, "git", "code") if now[name] != before.get(name)}


def check_origin(before: Mapping[str, Any], now: Mapping[str, Any], state: Path) -> None:
    """Raise a ValueError if a run was begun with other data, model or device than are here."""
    for what in ("data", "model", "device"):
        if before[what] != now[what]:
            raise ValueError(
                f"the run in {state} was begun with another {what} than is there now: delete "
                f"{state} to start it again, or put the former {what} back"
            )
