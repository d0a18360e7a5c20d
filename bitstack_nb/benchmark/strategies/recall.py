"""Exact recall: each task trains weights of its own on the base, and none is forgotten."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bitstack_nb import maskfile
from bitstack_nb.benchmark.locking import records
from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.strategy import Strategy, n_bytes
from bitstack_nb.recall import ExactRecall
from bitstack_nb.settings import IMPORTANCES, RANDOM, check_settings

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerCallback


class Recall(Strategy):
    """Our extension of BitStack: the model of a task is the base with the task's own weights."""

    name, label, order, colour = "recall", "exact recall", 90, "#56B4E9"
    settings = ("sparsity", "n_batches", "importance")
    drifts = False

    def __init__(self, model: nn.Module, protocol: Protocol) -> None:
        super().__init__(model, protocol)
        importance = protocol.importance or "gradient"
        self._tasks = ExactRecall(model, protocol.sparsity, importance=importance)

    @classmethod
    def check(cls, protocol: Protocol) -> None:
        """Raise a ValueError for settings that exact recall refuses."""
        importance, known = protocol.importance or "gradient", (*IMPORTANCES, RANDOM)
        check_settings(protocol.sparsity, importance=importance, importances=known)
        count = len(protocol.tasks)
        if protocol.sparsity * count > 1 + 1e-9:
            raise ValueError(
                f"sparsity is {protocol.sparsity:g}, but {count} tasks have room in one set of "
                f"weights up to {1 / count:g}: each owns weights of its own"
            )

    def callbacks(self) -> list[TrainerCallback]:
        """Keeps everything but the task's own weights exact."""
        return [self._tasks.callback()]

    def before_stage(self, number: int, loader: Iterable[Mapping[str, Any]]) -> None:
        """Open the task: fit its head, choose its own weights."""
        name, n_batches = self._name(number), self.protocol.n_batches or 1
        self._tasks.begin(name, loader=loader, n_batches=n_batches)

    def after_stage(self, number: int, loader: Iterable[Mapping[str, Any]]) -> None:
        """Close the task."""
        self._tasks.close()

    def model_of(self, task: int) -> AbstractContextManager[nn.Module]:
        """The task's own model, whatever came after it."""
        return self._tasks.using(self._name(task))

    def stats(self) -> dict[str, float] | None:
        """How many weights the tasks own."""
        return self._tasks.stats()

    def masks(self) -> Mapping[str, torch.Tensor]:
        """The weights that any task owns."""
        return self._tasks.masks

    def layer_records(self) -> list[dict[str, Any]]:
        """The layer table."""
        return records(self._tasks.layer_table())

    def storage(self, data: Sequence[Dataset]) -> int:
        """The owners of the weights as they are stored, and the tasks' values."""
        state = self._tasks.state_dict()
        values = [own for task in state["values"] for own in task.values()]
        return n_bytes([maskfile.packed_owners(state), *values])

    def save(self, folder: Path) -> None:
        """Write owners and values."""
        self._tasks.save(folder / "masks.safetensors")

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote, and hook the model."""
        self._tasks = ExactRecall.load(folder / "masks.safetensors", self.model)

    def _name(self, task: int) -> str:
        return self.protocol.tasks[task].name
