"""BitStack, strict: embeddings, norms and biases are frozen too after the first task."""

from __future__ import annotations

from torch import nn

from bitstack_nb.benchmark.strategies.bitstack import Published
from bitstack_nb.benchmark.strategy import Batches


class Strict(Published):
    """The published method, which leaves embeddings, norms and biases free, with these frozen."""

    name, label, order, colour = "bitstack-strict", "BitStack (strict)", 65, "#FBAFE4"

    def before_stage(self, number: int, loader: Batches) -> None:
        if number:
            for parameter in small_parameters(self.model.base_model):
                parameter.requires_grad_(False)


def small_parameters(backbone: nn.Module) -> list[nn.Parameter]:
    """Embeddings, and all parameters of one dimension: norms and biases."""
    embeddings = {
        parameter
        for module in backbone.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    return [p for p in backbone.parameters() if p.ndim < 2 or p in embeddings]
