"""Base class of strategies with an adapter per task, and the layers that get one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.pytorch_utils import Conv1D

from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.strategy import Batches, Strategy


class Adapters(Strategy):
    """Every task has an adapter on one frozen backbone; subclasses make the adapters."""

    drifts = False

    def __init__(self, model: nn.Module, protocol: Protocol) -> None:
        super().__init__(model, protocol)
        self._shown = 0

    def before_stage(self, number: int, loader: Batches) -> None:
        self._show(number)

    @contextmanager
    def model_of(self, task: int) -> Iterator[nn.Module]:
        present = self._shown
        self._show(task)
        try:
            yield self.model
        finally:
            self._show(present)

    def _show(self, task: int) -> None:
        self.activate(task)
        self._shown = task

    def activate(self, task: int) -> None:
        """Let the model use a task's adapter, and training change this one alone."""
        raise NotImplementedError


def linear_layers(backbone: nn.Module) -> dict[str, nn.Module]:
    """The linear layers by name; GPT-2's are of a class of their own."""
    modules = backbone.named_modules()
    return {name: m for name, m in modules if isinstance(m, nn.Linear | Conv1D)}
