"""Run a protocol, resume it where it was broken off, or read its result.

``sequence`` is the run itself. Here is what is around it: one process at a time has a run in hand,
and a result is written whole or not at all.
"""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

from bitstack_nb import ranks
from bitstack_nb.benchmark import stages
from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.sequence import TaskSequence
from bitstack_nb.benchmark.strategies import all_strategies
from bitstack_nb.benchmark.training import find_device, join_ranks
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

    Under ``torchrun`` every rank calls it; they need one folder to resume from.
    While another process has the same run in hand, wait for it.

    Args:
        protocol: what to do.
        output: folder for ``<protocol.name>.json`` and, while running, the state to resume from.
        device: ``auto``, ``cpu`` or ``cuda``.
        progress: show one bar over all batches.
        command: what to record as the command that repeats this; the process's by default.

    Raises:
        ValueError: a setting, a dataset or a model is not usable; the message says what to do.
        ranks.RankError: another rank failed, or is not where this one is.
    """
    path = Path(output) / f"{protocol.name}.json"
    found = find_device(device)
    join_ranks(found)
    if ranks.gathered(path.exists())[0]:  # one answer: a rank that went on alone would wait for all
        logger.info("%s is finished already: %s", protocol.name, path)
        return Result.load(path)
    with undisturbed_rng(found):  # the Trainer seeds the global generators
        sequence = TaskSequence(protocol, found, path.with_suffix(".state"), command)
        with ExitStack() as held:
            with ranks.agreed():
                if ranks.rank() == 0:  # waits for all
                    stages.check_writable(sequence.state)  # a lock there would be waited for
                    held.enter_context(stages.alone(sequence.state))
            if ranks.gathered(path.exists())[0]:  # another process has finished it
                if ranks.rank() == 0:
                    shutil.rmtree(sequence.state, ignore_errors=True)
                return Result.load(path)
            result = sequence.run(progress=progress and ranks.rank() == 0)
            with ranks.agreed():
                if ranks.rank() == 0:
                    result.save(path)
                    shutil.rmtree(sequence.state, ignore_errors=True)
    return result


def finished_stages(protocol: Protocol, output: str | os.PathLike[str]) -> int:
    """Stages that ``run`` would not repeat: all of a finished run, those a broken one saved."""
    path = Path(output) / f"{protocol.name}.json"
    if path.exists():
        return len(all_strategies()[protocol.strategy].stages(len(protocol.tasks)))
    return max(stages.saved_stages(path.with_suffix(".state")), default=0)
