"""One run of the benchmark: train, lock, evaluate every task so far, checkpoint, next task.

After each stage the model, the heads, the strategy and the numbers so far are written, and a run
that was killed goes on behind its last finished stage. Every stage seeds itself, so the accuracy
matrix is that of an unbroken run.

Under ``torchrun`` the ranks share each batch of training and evaluation, and every rank measures
importance on the same whole batches, as one process does. Rank 0 alone writes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from bitstack_nb import ranks
from bitstack_nb.benchmark import drift, stages
from bitstack_nb.benchmark.heads import Heads
from bitstack_nb.benchmark.inputs import load_inputs
from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.strategies import all_strategies
from bitstack_nb.benchmark.training import MultiHead, ProgressBar, accuracy, mixed, train
from bitstack_nb.fitting import fit_head
from bitstack_nb.maskfile import MaskFileError
from bitstack_nb.results import metrics
from bitstack_nb.results.provenance import peak_memory, provenance
from bitstack_nb.results.result import Result

logger = logging.getLogger(__name__)


class TaskSequence:
    """One run in progress: the loaded pieces, and the numbers that go into the result."""

    def __init__(
        self, protocol: Protocol, device: torch.device, state: Path, command: str | None
    ) -> None:
        if protocol.batch_size % ranks.count():
            raise ValueError(
                f"batch_size is {protocol.batch_size}, which {ranks.count()} processes cannot "
                f"share: take a multiple of {ranks.count()}"
            )
        self.protocol, self.device, self.state = protocol, device, state
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.inputs = load_inputs(protocol, device)
        self.tasks, self.backbone = self.inputs.tasks, self.inputs.backbone
        self.model, self.collate = self.backbone.model, self.inputs.collate
        self.train_data, self.test_data = self.inputs.train, self.inputs.test
        self.heads = Heads(self.model, seed=protocol.seed)
        for task in protocol.tasks:
            self.heads.add(task.name, task.num_labels)
        self.strategy = all_strategies()[protocol.strategy](self.model, protocol)
        self.stages = self.strategy.stages(len(self.tasks))
        self.first: dict[str, torch.Tensor] = {}  # the backbone after the first stage
        self.numbers: dict[str, Any] = {
            "stages_done": 0,
            "matrix": [[None] * len(self.tasks) for _ in self.tasks],
            "lock_stats": [],
            "steps": [],
            "times": {"begin": [], "train": [], "update": [], "evaluate": []},
            "peak_memory": {},
            "drift": {},
            # Taken now, because the checkout may move on while the run goes on.
            "origin": {
                **provenance(command=command),
                "device": str(device),
                "processes": ranks.count(),
                "model": self.backbone.provenance,
                "data": {t.task.name: t.provenance for t in self.tasks},
            },
        }

    def run(self, *, progress: bool) -> Result:
        self._resume()
        done = self.numbers["stages_done"]
        advice = "give every rank the same protocols, and one output folder that all can read"
        ranks.check_equal({self.protocol.name: done}, "stages done", advice=advice)
        name = self.protocol.strategy
        with tqdm(total=self._batches(done), desc=name, unit="batch", disable=not progress) as bar:
            for number, stage in list(enumerate(self.stages))[done:]:
                last = self.tasks[stage[-1]].task.name
                bar.set_description(f"{name} seed {self.protocol.seed}, up to {last}")
                self._train(number, stage, bar)
                self._lock(number, stage)
                self._evaluate(stage[-1], bar)
                self._follow_drift(number, bar)
                self._checkpoint(number + 1)
        return self._result()

    def _train(self, number: int, stage: list[int], bar: tqdm) -> None:
        rows = self._rows(stage)
        model = self._module(rows)
        with self._timed("begin"):
            self.strategy.before_stage(number, self._loader(number, rows))
            if self.protocol.head_steps:
                self._fit_head(number, stage)
        with self._timed("train"):
            steps = train(
                model,
                mixed(rows),
                self.collate,
                protocol=self.protocol,
                seed=self._seed(number),
                device=self.device,
                callbacks=[*self.strategy.callbacks(), ProgressBar(bar)],
            )
        self.numbers["steps"].append(steps)

    def _fit_head(self, number: int, stage: list[int]) -> None:
        """Fit the new task's head, as ``begin`` of exact recall does."""
        (task,) = stage
        model = self.heads.use(self.protocol.tasks[task].name)
        own = self._loader(number, {task: self.train_data[task]})
        fit_head(model, own, steps=self.protocol.head_steps)

    def _lock(self, number: int, stage: list[int]) -> None:
        with self._timed("update"):
            self.strategy.after_stage(number, self._loader(number, self._rows(stage)))
        if (stats := self.strategy.stats()) is not None:
            self.numbers["lock_stats"].append(stats)

    def _evaluate(self, last: int, bar: tqdm) -> None:
        with self._timed("evaluate"):
            for task in range(last + 1):
                with self.strategy.model_of(task):
                    self.numbers["matrix"][last][task] = self._accuracy(task, bar)
        row = [f"{a:.1f}" for a in self.numbers["matrix"][last][: last + 1]]
        logger.info("%s after task %d: %s", self.protocol.name, last + 1, " ".join(row))

    def _accuracy(self, task: int, bar: tqdm) -> float:
        return accuracy(
            self.heads.use(self.protocol.tasks[task].name),
            self.test_data[task],
            self.collate,
            protocol=self.protocol,
            device=self.device,
            callbacks=[ProgressBar(bar)],
        )

    def _follow_drift(self, number: int, bar: tqdm) -> None:
        """Keep the backbone after the first stage; after the last, see what its drift has cost."""
        if not self._drifts:
            return
        if number == 0:
            self.first = drift.copied(self.model)
        elif number == len(self.stages) - 1 and self.first:
            with self._timed("drift"):
                self.numbers["drift"] = drift.attribute(
                    self.model, self.first, self.strategy.masks(), lambda: self._accuracy(0, bar)
                )

    @property
    def _drifts(self) -> bool:
        return self.strategy.drifts and len(self.stages) > 1

    def _rows(self, stage: list[int]) -> dict[int, Dataset]:
        return self.strategy.rows(stage, self.train_data, self.protocol)

    def _loader(self, number: int, rows: dict[int, Dataset]) -> DataLoader:
        """The stage's training data in an order of its own, for the strategy."""
        return DataLoader(
            mixed(rows),
            batch_size=self.protocol.batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(self._seed(number)),
            collate_fn=self.collate,
        )

    def _module(self, rows: dict[int, Dataset]) -> torch.nn.Module:
        if len(rows) > 1:
            return MultiHead(self.heads)
        (task,) = rows
        return self.heads.use(self.protocol.tasks[task].name)

    def _seed(self, number: int) -> int:
        """A seed of its own for each stage, so that a resumed run repeats it exactly."""
        return 1000 * self.protocol.seed + number

    def _batches(self, done: int) -> int:
        left = self.stages[done:]
        count = sum(
            self.inputs.training_batches(self._rows(stage), self.protocol)
            + self.inputs.evaluation_batches(stage[-1], self.protocol)
            for stage in left
        )
        if left and self._drifts:
            groups = len(drift.groups(self.model, self.strategy.masks()))
            count += groups * self.inputs.evaluation_batches(0, self.protocol)
        return count

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        # A run that an earlier version began has no list for a step that was added since.
        self.numbers["times"].setdefault(what, []).append(time.perf_counter() - start)

    # Resuming -----------------------------------------------------------------------------------

    def _checkpoint(self, stages_done: int) -> None:
        """Write the state after a stage."""
        self.numbers["stages_done"] = stages_done
        self.numbers["peak_memory"] = peak_memory(self.numbers["peak_memory"], self.device)
        self._use_last_head()  # drift is measured with the first task's
        with ranks.agreed():
            if ranks.rank() == 0:
                self._write(stages_done)

    def _write(self, stages_done: int) -> None:
        # Clones, because safetensors refuses tensors that share memory (tied weights).
        weights = {
            name: tensor.cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in self.model.state_dict().items()
        }
        try:
            with stages.saving(self.state, stages_done, self.numbers) as folder:
                save_file(weights, folder / "model.safetensors")
                save_file(self.heads.state_dict(), folder / "heads.safetensors")
                if self.first:
                    save_file(self.first, folder / "first.safetensors")
                self.strategy.save(folder)
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"cannot write the state after stage {stages_done} to {self.state} ({error}): make "
                "room, or choose another folder; the stages before it are kept"
            ) from error

    def _resume(self) -> None:
        saved = stages.saved_stages(self.state)
        for done in saved:
            if (numbers := stages.read_numbers(self.state, done)) is not None:
                return self._take_up(numbers, stages.stage_folder(self.state, done))
            logger.warning("%s: stage %d is damaged and passed over", self.state, done)
        if saved:
            raise ValueError(
                f"the state to resume from is damaged: delete {self.state} to start this run again"
            )
        return None

    def _take_up(self, numbers: dict[str, Any], folder: Path) -> None:
        """Go on from a stage that is whole."""
        logger.info("resuming %s from %s", self.protocol.name, folder)
        stages.check_origin(numbers["origin"], self.numbers["origin"], self.state)
        try:
            self.heads.load_state_dict(load_file(folder / "heads.safetensors"))
            # First the strategy, because recall takes the model at its base.
            self.strategy.load(folder)
            # A run that an earlier version began has not counted its steps.
            self.numbers = {"steps": [None] * numbers["stages_done"], **numbers}
            self._use_last_head()
            self.model.load_state_dict(load_file(folder / "model.safetensors"))
            # A run that an earlier version began has none, and ends without its drift.
            if (first := folder / "first.safetensors").exists():
                self.first = load_file(first)
        except (SafetensorError, MaskFileError, OSError) as error:
            raise ValueError(
                f"cannot go on from {folder} ({error}): delete {self.state} to start this run again"
            ) from error

    def _use_last_head(self) -> None:
        """Put in the head of the last task trained, which checkpoints hold with the backbone."""
        last = self.stages[self.numbers["stages_done"] - 1][-1]
        self.heads.use(self.protocol.tasks[last].name)

    def _step_times(self) -> list[float | None]:
        """Mean seconds of a training step, for each stage."""
        stages = zip(self.numbers["times"]["train"], self.numbers["steps"], strict=True)
        return [steps and seconds / steps for seconds, steps in stages]

    def _result(self) -> Result:
        times = self.numbers["times"]
        return Result(
            protocol=self.protocol.to_dict(),
            matrix=self.numbers["matrix"],
            metrics=metrics.summarize(self.numbers["matrix"]),
            locks=self.strategy.layer_records(),
            lock_stats=self.numbers["lock_stats"],
            importance=self.strategy.importance_record(),
            times={
                **times,
                "step": self._step_times(),
                "total": sum(sum(parts) for parts in times.values()),
            },
            peak_memory=self.numbers["peak_memory"],
            provenance=self.numbers["origin"],
            drift=self.numbers.get("drift", {}),
            storage={"bytes": self.strategy.storage(self.train_data)},
        )
