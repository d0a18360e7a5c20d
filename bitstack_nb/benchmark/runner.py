"""Run a protocol, resume it where it was broken off, or read its result.

``sequence`` is the run itself. This module gives a run to one process at a time, and writes its
result whole or not at all.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from bitstack_nb.benchmark import stages
from bitstack_nb.benchmark.inputs import changed_file
from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.sequence import TaskSequence
from bitstack_nb.benchmark.strategies import all_strategies
from bitstack_nb.benchmark.training import find_device
from bitstack_nb.files import sha256
from bitstack_nb.results.result import Result
from bitstack_nb.rng import undisturbed_rng

logger = logging.getLogger(__name__)


def run(
    protocol: Protocol,
    *,
    output: str | os.PathLike[str] = "results/runs",
    device: str = "auto",
    progress: bool = False,
    command: str | None = None,
) -> Result:
    """Run a protocol, or read its result if it has been run.

    If another process is executing the same run, this one waits until it has finished.

    Args:
        protocol: the run.
        output: folder for ``<protocol.name>.json`` and, while running, the state to resume from.
        device: ``auto``, ``cpu`` or ``cuda``.
        progress: show one bar over all batches.
        command: the command line that repeats this, for the record; the process's by default.

    Raises:
        ValueError: a setting, a dataset or a model is not usable; the message says what to do.
    """
    if (count := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(
            f"a run takes one process, but WORLD_SIZE is {count}: start it without torchrun; "
            "python -m bitstack_nb sweep does many runs at once"
        )
    path = Path(output).expanduser() / f"{protocol.name}.json"
    state = path.with_suffix(".state")
    found = find_device(device)
    if path.exists():
        logger.info("%s is finished already: %s", protocol.name, path)
        return read_finished(protocol, path)
    with undisturbed_rng(found):  # the Trainer seeds the global generators
        sequence = TaskSequence(protocol, found, state, command)
        stages.check_writable(state)  # not after a first stage was trained for nothing
        with stages.alone(state):
            if path.exists():  # another process has finished it
                result = Result.load(path)
            else:
                result = sequence.run(progress=progress)
                result.save(path)
            shutil.rmtree(state, ignore_errors=True)
    return result


def read_finished(
    protocol: Protocol, path: Path, *, digest: Callable[[Path], str] = sha256
) -> Result:
    """The result of a finished run. Raises ValueError if it was made with other files than here."""
    result = Result.load(path)
    if file := changed_file(protocol, result.provenance, digest=digest):
        raise ValueError(
            f"{path} was made with another {file} than is there now: choose another output "
            "folder, or delete the result"
        )
    return result


def stages_left(protocol: Protocol, output: str | os.PathLike[str]) -> int:
    """Stages that ``run`` would carry out: none of a finished run, of a broken one the rest."""
    path = Path(output).expanduser() / f"{protocol.name}.json"
    if path.exists():
        return 0
    saved = max(stages.saved_stages(path.with_suffix(".state")), default=0)
    return len(all_strategies()[protocol.strategy].stages(len(protocol.tasks))) - saved
