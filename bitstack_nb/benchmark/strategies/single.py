"""Separate models: one fine-tuned copy of the backbone per task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.strategy import Batches, Data, Strategy, n_bytes


class Single(Strategy):
    """Every task is fine-tuned from the base: an upper bound, at a backbone of storage per task."""

    name, label, order, colour = "single", "separate models", 100, "#222222"
    tiny: ClassVar = {"learning_rate": 2e-3}
    drifts = False

    def __init__(self, model: nn.Module, protocol: Protocol) -> None:
        super().__init__(model, protocol)
        self._base = self._weights()
        self._tasks: list[dict[str, torch.Tensor]] = []

    def before_stage(self, number: int, loader: Batches) -> None:
        self._put(self._base)

    def after_stage(self, number: int, loader: Batches) -> None:
        self._tasks.append(self._weights())

    @contextmanager
    def model_of(self, task: int) -> Iterator[nn.Module]:
        present = self._weights()
        self._put(self._tasks[task])
        try:
            yield self.model
        finally:
            self._put(present)

    def storage(self, data: Data) -> int:
        return n_bytes(tensor for task in self._tasks for tensor in task.values())

    def best_storage(self, data: Data) -> int:
        return self.storage(data) // 2  # float32

    def save(self, folder: Path) -> None:
        for task, weights in enumerate(self._tasks):
            save_file(weights, folder / f"task-{task}.safetensors")

    def load(self, folder: Path) -> None:
        device, count = str(self.model.device), len(list(folder.glob("task-*.safetensors")))
        files = [folder / f"task-{task}.safetensors" for task in range(count)]
        self._tasks = [load_file(file, device=device) for file in files]

    def _put(self, weights: dict[str, torch.Tensor]) -> None:
        self.model.base_model.load_state_dict(weights, strict=False)

    def _weights(self) -> dict[str, torch.Tensor]:
        """A copy of the present weights that a task keeps: all of the backbone's."""
        return {n: tensor.clone() for n, tensor in self.model.base_model.state_dict().items()}
