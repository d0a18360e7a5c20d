"""Separate models: one fine-tuned copy of the backbone per task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.strategy import Strategy, n_bytes

if TYPE_CHECKING:
    from datasets import Dataset


class Single(Strategy):
    """Every task is fine-tuned from the base: an upper bound, at a backbone of storage per task."""

    name, label, order, colour = "single", "separate models", 100, "#222222"
    drifts = False

    def __init__(self, model: nn.Module, protocol: Protocol) -> None:
        super().__init__(model, protocol)
        self._base = self._weights()
        self._tasks: list[dict[str, torch.Tensor]] = []

    def before_stage(self, number: int, loader: Iterable[Mapping[str, Any]]) -> None:
        """Put the backbone back to the base."""
        self.model.base_model.load_state_dict(self._base)

    def after_stage(self, number: int, loader: Iterable[Mapping[str, Any]]) -> None:
        """Keep the task's backbone."""
        self._tasks.append(self._weights())

    @contextmanager
    def model_of(self, task: int) -> Iterator[nn.Module]:
        """The task's own model; the present weights come back after the block."""
        present = self._weights()
        self.model.base_model.load_state_dict(self._tasks[task])
        try:
            yield self.model
        finally:
            self.model.base_model.load_state_dict(present)

    def storage(self, data: Sequence[Dataset]) -> int:
        """A backbone per task."""
        return n_bytes(tensor for task in self._tasks for tensor in task.values())

    def save(self, folder: Path) -> None:
        """Write every task's backbone, as ``task/name``."""
        tensors = {f"{t}/{n}": w for t, own in enumerate(self._tasks) for n, w in own.items()}
        save_file(tensors, folder / "tasks.safetensors")

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote."""
        device = next(self.model.parameters()).device
        tasks: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in load_file(folder / "tasks.safetensors").items():
            task, _, name = key.partition("/")
            tasks.setdefault(task, {})[name] = tensor.to(device)
        self._tasks = [tasks[task] for task in sorted(tasks, key=int)]

    def _weights(self) -> dict[str, torch.Tensor]:
        return {n: tensor.clone() for n, tensor in self.model.base_model.state_dict().items()}
