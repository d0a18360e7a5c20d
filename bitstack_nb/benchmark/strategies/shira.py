"""SHiRA: each task adds values to a few random weights of every linear layer of the backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from bitstack_nb.benchmark.adapters import Adapters, linear_layers
from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.strategy import Data
from bitstack_nb.settings import check_settings


class SHiRA(Adapters):
    """Sparse adapters with random masks: a share ``sparsity`` of each matrix, by the run's seed.

    Bhardwaj et al. (2024), "Sparse High Rank Adapters". The package peft has it too. Its layers
    refuse GPT-2's, and their size follows from a rank. A test compares the two.
    """

    name, label, order, colour = "shira", "SHiRA", 80, "#882255"
    settings = ("sparsity", "head_steps")

    def __init__(self, model: nn.Module, protocol: Protocol) -> None:
        super().__init__(model, protocol)
        backbone = model.base_model.requires_grad_(False)
        seeds = map(protocol.stage_seed, range(len(protocol.tasks)))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._layers = []
        for layer in linear_layers(backbone).values():
            count = max(1, round(protocol.sparsity * layer.weight.numel()))
            every = [torch.randperm(layer.weight.numel(), generator=g) for g in generators]
            added = Added([one[:count].sort().values.to(layer.weight.device) for one in every])
            register_parametrization(layer, "weight", added)
            self._layers.append(added)
        self._show(0)

    @classmethod
    def check(cls, protocol: Protocol) -> None:
        check_settings(protocol.sparsity)

    def storage(self, data: Data) -> int:
        """Twelve bytes a weight, as in peft: a float32 value, its row and its column in int32."""
        return 12 * sum(own.numel() for layer in self._layers for own in layer.values)

    def best_storage(self, data: Data) -> int:
        """Four bytes a weight: a bf16 value, and two bytes for the gap to the position before."""
        return self.storage(data) // 3

    def activate(self, task: int) -> None:
        for layer in self._layers:
            layer.shown = task
            for number, values in enumerate(layer.values):
                values.requires_grad_(number == task)


class Added(nn.Module):
    """The values that tasks add to a matrix, at first 0; its forward adds those of one task.

    Args:
        where: each task's positions in the flattened matrix, ascending.

    Attributes:
        shown: the task whose values are added.
    """

    def __init__(self, where: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._where, self.shown = list(where), 0
        self.values = nn.ParameterList(torch.zeros(len(own), device=own.device) for own in where)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The matrix of the shown task."""
        where, values = self._where[self.shown], self.values[self.shown]
        return weight.flatten().index_add(0, where, values).view_as(weight)
