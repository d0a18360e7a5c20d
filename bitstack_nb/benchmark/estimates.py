"""How long runs will take here: two short stages of each kind of run are carried out and timed."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset

from bitstack_nb.benchmark import drift
from bitstack_nb.benchmark.inputs import evaluation_batches, training_batches
from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.runner import finished_stages
from bitstack_nb.benchmark.sequence import TaskSequence
from bitstack_nb.benchmark.strategies import all_strategies
from bitstack_nb.benchmark.training import find_device
from bitstack_nb.results.plain_json import canonical
from bitstack_nb.rng import undisturbed_rng

_STEPS, _BATCHES = 6, 3  # of training in a timed stage, and of evaluation after it
# Settings that change no step's time.
_FREE = {"seed", "tasks", "epochs", "learning_rate", "head_learning_rate", "warmup_steps"}


def estimate(
    protocols: Sequence[Protocol],
    *,
    output: str | os.PathLike[str] = "results/runs",
    device: str = "auto",
) -> float:
    """Seconds that :func:`bitstack_nb.run` of these protocols will take here, roughly.

    Finished runs cost nothing, broken ones only the stages that are left. Data and model of one
    seed are loaded for each kind of run; for further seeds that time is counted.

    Raises:
        ValueError: as ``run`` does.
    """
    kinds: dict[str, list[tuple[Protocol, list[list[int]]]]] = {}
    for protocol in protocols:
        stages = all_strategies()[protocol.strategy].stages(len(protocol.tasks))
        if left := stages[finished_stages(protocol, output) :]:
            settings = {k: v for k, v in protocol.to_dict().items() if k not in _FREE}
            kind = canonical([settings, sorted(task.name for task in protocol.tasks)])
            kinds.setdefault(kind, []).append((protocol, left))
    found = find_device(device)
    with undisturbed_rng(found):
        return sum(_seconds(runs, found) for runs in kinds.values())


def _seconds(runs: list[tuple[Protocol, list[list[int]]]], device: torch.device) -> float:
    """Seconds of runs of one kind, each with the stages that are left of it."""
    start = time.perf_counter()
    with TemporaryDirectory() as folder:
        sequence = TaskSequence(runs[0][0], device, Path(folder), None)
        total = (time.perf_counter() - start) * (len({p.seed for p, _ in runs}) - 1)
        learn, test = sequence.train_data, sequence.test_data
        costs = _costs(sequence)
    strategy = sequence.strategy
    for protocol, stages in runs:
        batches = 0
        for stage in stages:
            steps = training_batches(strategy.rows(stage, learn, protocol), protocol)
            measured = min(protocol.n_batches or 0, steps / protocol.epochs)
            total += costs["stage"] + steps * costs["step"]
            total += costs["measure"] * max(1, measured / _STEPS)
            batches += evaluation_batches(test[: stage[-1] + 1], protocol)
        if strategy.drifts and len(protocol.tasks) > 1:
            groups = drift.groups(sequence.model, strategy.masks())
            batches += len(groups) * evaluation_batches(test[:1], protocol)
        total += batches * costs["batch"]
    return total


def _costs(sequence: TaskSequence) -> dict[str, float]:
    """Seconds of a training step, an evaluation batch, measuring, and the rest of a stage."""
    size, train, clock = sequence.protocol.batch_size, sequence.train_data, _Clock(sequence.device)
    sequence.test_data = [_first(_BATCHES * 4 * size, data) for data in sequence.test_data]
    for number, stage in enumerate(sequence.stages[:2]):  # the first one warms up, and may lock
        rows = math.ceil(_STEPS / len(stage)) * size
        sequence.train_data = [_first(rows, data) for data in train]
        clock.ticks = []
        sequence.train_stage(number, stage, clock)
        sequence.lock(number, stage)
        trained, start = clock.ticks, clock.now()
        with sequence.strategy.model_of(stage[-1]):
            sequence.accuracy_of(stage[-1], clock)
        evaluated = clock.now()
        sequence.save_stage(number + 1)
        written = clock.now() - evaluated
    spent = {what: seconds[-1] for what, seconds in sequence.numbers["times"].items() if seconds}
    step = (trained[-1] - trained[0]) / max(1, len(trained) - 1)
    batches = evaluation_batches([sequence.test_data[stage[-1]]], sequence.protocol)
    return {
        "step": step,
        "batch": (evaluated - start) / batches,
        "measure": spent["begin"] + spent["update"],
        "stage": written + max(0, spent["train"] - len(trained) * step),
    }


def _first(count: int, rows: Dataset) -> Dataset:
    return rows.select(range(min(len(rows), count)))


class _Clock:
    """Takes the place of a progress bar and notes when each batch ended."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.ticks = device, []

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def update(self, count: int) -> None:
        self.ticks.append(self.now())
