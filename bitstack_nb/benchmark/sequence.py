"""One run of the benchmark: train, lock, evaluate every task so far, save the stage, next task.

After each stage the model, the heads, the strategy and the numbers so far are written, and a run
that was killed goes on behind its last finished stage. Every stage has a seed of its own, so the
accuracy matrix is that of an unbroken run.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from bitstack_nb.benchmark import drift, stages
from bitstack_nb.benchmark.inputs import load_inputs
from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.strategies import all_strategies
from bitstack_nb.benchmark.training import MultiHead, ProgressBar, mixed, predict, train
from bitstack_nb.data.backbones import collate
from bitstack_nb.fitting import fit_head
from bitstack_nb.head import labelled, part_names, place, present
from bitstack_nb.results import metrics
from bitstack_nb.results.plain_json import as_text
from bitstack_nb.results.provenance import peak_memory, provenance
from bitstack_nb.results.result import Result

logger = logging.getLogger(__name__)


class TaskSequence:
    """One run in progress: model, data and strategy, and the numbers that go into the result."""

    def __init__(
        self, protocol: Protocol, device: torch.device, state: Path, command: str | None
    ) -> None:
        self.protocol, self.device, self.state = protocol, device, state
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        inputs = load_inputs(protocol, device)
        self.model, self.collate = inputs.backbone.model, collate(inputs.backbone)
        self.train_data, self.test_data = inputs.train, inputs.test
        pattern = present(self.model, part_names(self.model))
        self.heads = [
            labelled(
                self.model,
                pattern,
                [f"LABEL_{label}" for label in range(task.num_labels)],
                seed=f"{protocol.seed}/{task.name}",
            )
            for task in protocol.tasks
        ]
        self.strategy = all_strategies()[protocol.strategy](self.model, protocol)
        self.stages = self.strategy.stages(len(protocol.tasks))
        self.first: dict[str, torch.Tensor] = {}  # the backbone after the first stage
        self.numbers: dict[str, Any] = {
            "stages_done": 0,
            "matrix": [[None] * len(protocol.tasks) for _ in protocol.tasks],
            "predictions": [
                {"task": task.name, "labels": as_text(rows["labels"]), "learnt": None}
                for task, rows in zip(protocol.tasks, self.test_data, strict=True)
            ],
            "lock_stats": [],
            "steps": [],
            "times": {"begin": [], "train": [], "update": [], "evaluate": []},
            "peak_memory": {},
            "drift": {},
            # Taken now, because the checkout may move on while the run goes on.
            "origin": {
                **provenance(command=command),
                "device": str(device),
                "model": inputs.backbone.provenance,
                "data": {data.task.name: data.provenance for data in inputs.tasks},
            },
        }

    def run(self, *, progress: bool) -> Result:
        """Carry out the stages that are left, and give the result."""
        self._resume()
        done, label = self.numbers["stages_done"], self.strategy.label
        total = sum(self.batches(len(self.stages) - done))
        with tqdm(total=total, desc=label, unit="batch", disable=not progress) as bar:
            for number, stage in list(enumerate(self.stages))[done:]:
                last = self.protocol.tasks[stage[-1]].name
                bar.set_description(f"{label}, seed {self.protocol.seed}, up to {last}")
                self.train_stage(number, stage, bar)
                self.lock(number, stage)
                self.evaluate(stage, bar)
                self._follow_drift(number, bar)
                self.save_stage(number + 1)
        return self._result()

    def train_stage(self, number: int, stage: list[int], bar: tqdm) -> None:
        """Train on a stage's tasks, after what the strategy does before it."""
        rows = self._rows(stage)
        model = MultiHead(self.model, self.heads) if len(rows) > 1 else self._use_head(stage[0])
        with self._timed("begin"):
            self.strategy.before_stage(number, self._loader(number, rows))
            if self.protocol.head_steps:  # as exact recall fits it: on the new task alone
                own = self._loader(number, {stage[0]: self.train_data[stage[0]]})
                fit_head(self._use_head(stage[0]), own, steps=self.protocol.head_steps)
        with self._timed("train"):
            steps = self.strategy.trains and train(
                model,
                mixed(rows),
                self.collate,
                protocol=self.protocol,
                seed=self.protocol.stage_seed(number),
                device=self.device,
                callbacks=[*self.strategy.callbacks(), ProgressBar(bar)],
            )
        self.numbers["steps"].append(int(steps))

    def lock(self, number: int, stage: list[int]) -> None:
        """Let the strategy do what it does after a stage, and keep its statistics."""
        with self._timed("update"):
            self.strategy.after_stage(number, self._loader(number, self._rows(stage)))
        if (stats := self.strategy.stats()) is not None:
            self.numbers["lock_stats"].append(stats)

    def evaluate(self, stage: list[int], bar: tqdm) -> None:
        """Fill a row of the accuracy matrix: every task up to the last one trained.

        An earlier task whose model is still the same has the accuracy of its own stage.
        """
        last, matrix = stage[-1], self.numbers["matrix"]
        row = matrix[last]
        row[:last] = [matrix[task][task] for task in range(last)]
        with self._timed("evaluate"):
            for task in self._tested(stage):
                with self.strategy.model_of(task):
                    found = self._predict(task, bar)
                row[task] = self._accuracy(task, found)
                kept = self.numbers["predictions"][task]
                kept["final"] = as_text(found)
                if task == last:
                    kept["learnt"] = kept["final"]
        shown = " ".join(f"{value:.1f}" for value in row[: last + 1])
        logger.info("%s after task %d: %s", self.protocol.name, last + 1, shown)

    def accuracy_of(self, task: int, bar: tqdm) -> float:
        """Percent of a task's test examples that the present backbone classifies rightly."""
        return self._accuracy(task, self._predict(task, bar))

    def _accuracy(self, task: int, predicted: np.ndarray) -> float:
        return 100 * float(np.mean(predicted == np.array(self.test_data[task]["labels"])))

    def _predict(self, task: int, bar: tqdm) -> np.ndarray:
        """The label that the present backbone gives to each of a task's test texts."""
        return predict(
            self._use_head(task),
            self.test_data[task],
            self.collate,
            protocol=self.protocol,
            device=self.device,
            bar=bar,
        )

    def _follow_drift(self, number: int, bar: tqdm) -> None:
        """Keep the backbone after the first stage; after the last, measure its drift's effect."""
        if not self._drifts:
            return
        if number == 0:
            self.first = drift.copied(self.model)
        elif number == len(self.stages) - 1:
            with self._timed("drift"):
                self.numbers["drift"] = drift.attribute(
                    self.model, self.first, self.strategy.masks(), lambda: self.accuracy_of(0, bar)
                )

    @property
    def _drifts(self) -> bool:
        return self.strategy.drifts and len(self.stages) > 1

    def _tested(self, stage: list[int]) -> list[int]:
        """The tasks to measure after a stage."""
        return list(range(stage[-1] + 1)) if self.strategy.drifts else stage

    def _rows(self, stage: list[int]) -> dict[int, Dataset]:
        return self.strategy.rows(stage, self.train_data, self.protocol)

    def _loader(self, number: int, rows: dict[int, Dataset]) -> DataLoader:
        """Batches of a stage's training rows in an order of their own, for the strategy."""
        return DataLoader(
            mixed(rows),
            batch_size=self.protocol.batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(self.protocol.stage_seed(number)),
            collate_fn=self.collate,
        )

    def _use_head(self, task: int) -> torch.nn.Module:
        """The model with a task's head."""
        place(self.model, self.heads[task])
        return self.model

    def steps(self, stage: list[int]) -> int:
        """Steps of training on a stage."""
        if not self.strategy.trains:
            return 0
        rows = sum(map(len, self._rows(stage).values()))
        return math.ceil(self.protocol.epochs * math.ceil(rows / self.protocol.batch_size))

    def batches(self, left: int) -> tuple[int, int]:
        """Steps of training and batches of evaluation in the last ``left`` stages."""
        stages = self.stages[len(self.stages) - left :]
        # Batches of evaluation are four times those of training.
        tests = [math.ceil(len(rows) / 4 / self.protocol.batch_size) for rows in self.test_data]
        evaluation = sum(tests[task] for stage in stages for task in self._tested(stage))
        if stages and self._drifts:
            evaluation += tests[0] * len(drift.groups(self.model, self.strategy.masks()))
        return sum(map(self.steps, stages)), evaluation

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.numbers["times"].setdefault(what, []).append(time.perf_counter() - start)

    # Resuming -----------------------------------------------------------------------------------

    def save_stage(self, stages_done: int) -> None:
        """Write what is needed to go on after a stage."""
        self.numbers["stages_done"] = stages_done
        self.numbers["peak_memory"] = peak_memory(self.numbers["peak_memory"], self.device)
        self._use_head(self.stages[stages_done - 1][-1])  # drift is measured with the first task's
        # Clones, because safetensors refuses tensors that share memory (tied weights).
        weights = {
            name: tensor.cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in self.model.state_dict().items()
        }
        try:
            with stages.saving(self.state, stages_done, self.numbers) as folder:
                save_file(weights, folder / "model.safetensors")
                for task, head in enumerate(self.heads):
                    save_file(head.state_dict(), folder / f"head-{task}.safetensors")
                save_file(self.first, folder / "first.safetensors")
                self.strategy.save(folder)
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"cannot write the state after stage {stages_done} to {self.state} ({error}): make "
                "room, or choose another folder; the stages before it are kept"
            ) from error

    def _resume(self) -> None:
        """Go on from the newest stage that is whole, if there is any stage."""
        saved = stages.saved_stages(self.state)
        for done in saved:
            folder = self.state / f"stage-{done}"
            if (numbers := stages.read_numbers(folder)) is not None:
                return self._take_up(numbers, folder)
            logger.warning("%s: stage %d is damaged and passed over", self.state, done)
        if saved:
            raise ValueError(
                f"the state to resume from is damaged: delete {self.state} to start this run again"
            )
        return None

    def _take_up(self, numbers: dict[str, Any], folder: Path) -> None:
        logger.info("resuming %s from %s", self.protocol.name, folder)
        origin, now = numbers["origin"], self.numbers["origin"]
        stages.check_origin(origin, now, self.state)
        if elsewhere := stages.differences(origin, now):
            logger.warning("%s goes on with another %s", self.state, ", ".join(elsewhere))
            elsewhere = {"stage": numbers["stages_done"], "date": now["date"], **elsewhere}
            origin["resumed"] = [*origin.get("resumed", []), elsewhere]
        try:
            for task, head in enumerate(self.heads):
                head.load_state_dict(load_file(folder / f"head-{task}.safetensors"))
            self.strategy.load(folder)  # before the weights, because recall takes them at its base
            self._use_head(self.stages[numbers["stages_done"] - 1][-1])
            self.model.load_state_dict(load_file(folder / "model.safetensors"))
            self.first = load_file(folder / "first.safetensors")
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"cannot go on from {folder} ({error}): delete {self.state} to start this run again"
            ) from error
        self.numbers = numbers

    def _result(self) -> Result:
        times = self.numbers["times"]
        steps = zip(times["train"], self.numbers["steps"], strict=True)
        return Result(
            protocol=self.protocol.to_dict(),
            matrix=self.numbers["matrix"],
            metrics=metrics.summarize(self.numbers["matrix"]),
            predictions=self.numbers["predictions"],
            locks=self.strategy.layer_records(),
            lock_stats=self.numbers["lock_stats"],
            importance=self.strategy.importance_record(),
            times={
                **times,
                "step": [seconds / count if count else None for seconds, count in steps],
                "total": sum(sum(parts) for parts in times.values()),
            },
            peak_memory=self.numbers["peak_memory"],
            provenance=self.numbers["origin"],
            drift=self.numbers["drift"],
            storage={
                "bytes": self.strategy.storage(self.train_data),
                "best_bytes": self.strategy.best_storage(self.train_data),
            },
        )
