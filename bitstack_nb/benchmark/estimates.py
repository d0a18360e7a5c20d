"""How long runs will take here: two short stages of each kind of run are carried out and timed."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset

from bitstack_nb.benchmark import drift
from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.runner import finished_stages
from bitstack_nb.benchmark.sequence import TaskSequence
from bitstack_nb.benchmark.strategies import all_strategies
from bitstack_nb.benchmark.training import find_device
from bitstack_nb.results.plain_json import canonical
from bitstack_nb.rng import undisturbed_rng

_STEPS, _BATCHES = 6, 3  # training steps of a timed stage, and evaluation batches after it
# Settings that change no step's time.
_FREE = {"seed", "tasks", "epochs", "learning_rate", "head_learning_rate", "warmup_steps"}

Run = tuple[Protocol, list[list[int]]]  # with the stages that are left of it


def estimate(
    protocols: Sequence[Protocol],
    *,
    output: str | os.PathLike[str] = "results/runs",
    device: str = "auto",
) -> float:
    """Seconds that :func:`bitstack_nb.run` of these protocols will take here, roughly.

    Finished runs cost nothing, broken ones only what is left of them. Data and model of one seed
    are loaded for each kind of run; for further seeds that time is counted.

    Raises:
        ValueError: as ``run`` does.
    """
    kinds: dict[str, list[Run]] = {}
    for protocol in protocols:
        stages = all_strategies()[protocol.strategy].stages(len(protocol.tasks))
        if left := stages[finished_stages(protocol, output) :]:
            settings = {k: v for k, v in protocol.to_dict().items() if k not in _FREE}
            kind = canonical([settings, sorted(task.name for task in protocol.tasks)])
            kinds.setdefault(kind, []).append((protocol, left))
    found = find_device(device)
    with undisturbed_rng(found):
        return sum(_seconds(runs, found) for runs in kinds.values())


def _seconds(runs: list[Run], device: torch.device) -> float:
    """Seconds of runs of one kind."""
    start = time.perf_counter()
    with TemporaryDirectory() as folder:
        sequence = TaskSequence(runs[0][0], device, Path(folder), None)
        total = (time.perf_counter() - start) * (len({p.seed for p, _ in runs}) - 1)
        costs = _costs(sequence)
    inputs, strategy = sequence.inputs, sequence.strategy
    for protocol, stages in runs:
        for stage in stages:
            steps = inputs.training_batches(strategy.rows(stage, inputs.train, protocol), protocol)
            batches = inputs.evaluation_batches(stage[-1], protocol)
            total += costs["stage"] + steps * costs["step"] + batches * costs["batch"]
            total += costs["task"] * (stage[-1] + 1)
            measured = min(protocol.n_batches or 0, steps / protocol.epochs)
            total += costs["measure"] * max(1, measured / _STEPS)
        if strategy.drifts and len(strategy.stages(len(protocol.tasks))) > 1:
            count = len(drift.groups(sequence.model, strategy.masks()))
            batches = inputs.evaluation_batches(0, protocol)
            total += count * (costs["task"] + batches * costs["batch"])
    return total


def _costs(sequence: TaskSequence) -> dict[str, float]:
    """Seconds of a step, an evaluation batch, measuring, and what else a stage or a task takes."""
    size = sequence.protocol.batch_size
    clock = _Clock(sequence.device)
    for number, stage in enumerate(sequence.stages[:2]):  # the first one warms up, and may lock
        share = -(-_STEPS // len(stage))
        sequence.train_data = [_first(rows, share * size) for rows in sequence.inputs.train]
        sequence.test_data = [_first(rows, _BATCHES * 4 * size) for rows in sequence.inputs.test]
        clock.start()
        sequence._train(number, stage, clock)
        sequence._lock(number, stage)
        step, steps = clock.pace(), len(clock.ticks)
        start = clock.start()
        with sequence.strategy.model_of(stage[-1]):
            sequence._accuracy(stage[-1], clock)
        evaluated, batch, batches = clock.now() - start, clock.pace(), len(clock.ticks)
        start = clock.start()
        sequence._checkpoint(number + 1)
        written = clock.now() - start
    spent = {what: seconds[-1] for what, seconds in sequence.numbers["times"].items() if seconds}
    return {
        "step": step,
        "batch": batch,
        "measure": spent["begin"] + spent["update"],
        "stage": written + max(0, spent["train"] - steps * step),
        "task": max(0, evaluated - batches * batch),
    }


def _first(rows: Dataset, count: int) -> Dataset:
    return rows.select(range(min(len(rows), count)))


class _Clock:
    """Takes the place of a progress bar and notes when each batch ended."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.ticks = device, []

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def start(self) -> float:
        self.ticks = []
        return self.now()

    def update(self, count: int) -> None:
        self.ticks.append(self.now())

    def pace(self) -> float:
        """Mean seconds from batch to batch."""
        return (self.ticks[-1] - self.ticks[0]) / max(1, len(self.ticks) - 1)
