"""How long runs will take here: two short stages of each kind of run are carried out and timed.

The second stage trains with the hooks of the first one's locks on, and writes its state to the
folder of the runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.runner import stages_left
from bitstack_nb.benchmark.sequence import TaskSequence
from bitstack_nb.benchmark.training import find_device
from bitstack_nb.results.plain_json import canonical
from bitstack_nb.rng import undisturbed_rng

_STEPS = 10  # of training in a timed stage
# Settings that change no step's time.
_FREE = {"seed", "tasks", "epochs", "learning_rate", "head_learning_rate", "warmup_steps"}


def estimate(
    protocols: Sequence[Protocol],
    *,
    output: str | os.PathLike[str] = "results/runs",
    device: str = "auto",
) -> tuple[float, float]:
    """Seconds that :func:`bitstack_nb.run` of these protocols will take here: at least, at most.

    The ends of the range are the faster and the slower half of the timed steps. Finished runs cost
    nothing, broken ones only the stages that are left. Data and model of one seed are loaded for
    each kind of run; for further seeds that time is counted.

    Raises:
        ValueError: as ``run`` does.
    """
    kinds: dict[str, list[tuple[Protocol, int]]] = {}
    for protocol in protocols:
        if left := stages_left(protocol, output):
            settings = {k: v for k, v in protocol.to_dict().items() if k not in _FREE}
            kind = canonical([settings, sorted(task.name for task in protocol.tasks)])
            kinds.setdefault(kind, []).append((protocol, left))
    found, place = find_device(device), Path(output).expanduser()
    with undisturbed_rng(found):
        total = sum((_seconds(runs, found, place) for runs in kinds.values()), np.zeros(2))
    return float(total[0]), float(total[1])


def _seconds(runs: list[tuple[Protocol, int]], device: torch.device, output: Path) -> np.ndarray:
    """Seconds of runs of one kind, each with the number of stages that are left."""
    start = time.perf_counter()
    # Writing to Google Drive is slow, so the state is written where the run will write it.
    with TemporaryDirectory(dir=output if output.is_dir() else None) as folder:
        sequence = TaskSequence(runs[0][0], device, Path(folder), None)
        loading = time.perf_counter() - start
        costs = _costs(sequence)
    total = np.full(2, loading * (len({protocol.seed for protocol, _ in runs}) - 1))
    for sequence.protocol, left in runs:
        steps, batches = sequence.batches(left)
        total += steps * costs["step"] + batches * costs["batch"] + left * costs["stage"]
    return total


def _costs(sequence: TaskSequence) -> dict[str, np.ndarray]:
    """Seconds, at least and at most, of a training step, an evaluation batch, the rest of a stage.

    The rest of a stage is loading, locking and writing.
    """
    protocol = sequence.protocol
    for number, stage in enumerate(sequence.stages[:2]):  # the first one warms up, and may lock
        share = min(1, _STEPS / max(1, sequence.steps(stage)))
        sequence.protocol = replace(protocol, epochs=share * protocol.epochs)
        clock = _Clock(sequence.device)
        start = clock.now()
        sequence.train_stage(number, stage, clock)
        sequence.lock(number, stage)
        sequence.save_stage(number + 1)
        spent, ends = clock.now() - start, clock.ticks
        sequence.protocol = protocol
        step = _range(np.diff(ends) if len(ends) > 1 else np.zeros(1))
        clock, start = _Clock(sequence.device), clock.now()
        with sequence.strategy.model_of(stage[-1]):
            sequence.accuracy_of(stage[-1], clock)
        batch = _range(np.diff([start, *clock.ticks]))
    rest = max(0, spent - len(ends) * step.mean())
    return {"step": step, "batch": batch, "stage": np.full(2, rest)}


def _range(seconds: np.ndarray) -> np.ndarray:
    """The means of the faster and of the slower half."""
    ordered, half = np.sort(seconds), (len(seconds) + 1) // 2
    return np.array([ordered[:half].mean(), ordered[-half:].mean()])


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
