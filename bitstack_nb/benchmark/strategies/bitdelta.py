"""BitDelta: separate models of one bit a weight, compressed after training."""

from __future__ import annotations

import torch
from torch import nn

from bitstack_nb.benchmark.adapters import linear_layers
from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.strategies.single import Single
from bitstack_nb.benchmark.strategy import Batches, Data


class Compressed(Single):
    """Separate models, each kept as a compressed difference to the base; subclasses say how.

    Embeddings become the base's again. All other parameters outside the linear layers (norms and
    biases) keep their difference in float16. Nothing is trained after the compression.
    """

    def __init__(self, model: nn.Module, protocol: Protocol) -> None:
        super().__init__(model, protocol)
        modules = dict(model.base_model.named_modules())
        self._matrices = {f"{name}.weight" for name in linear_layers(model.base_model)}
        self._others = {
            name
            for name, _ in model.base_model.named_parameters()
            if name not in self._matrices
            and not isinstance(modules[name.rpartition(".")[0]], nn.Embedding)
        }

    def after_stage(self, number: int, loader: Batches) -> None:
        """Keep the model that comes out of the compressed difference."""
        found = dict(self._base)
        for name, weight in self._weights().items():
            if name in self._matrices:
                found[name] = found[name] + self.matrix(weight - self._base[name])
            elif name in self._others:
                found[name] = found[name] + (weight - self._base[name]).half().float()
        if not all(tensor.isfinite().all() for tensor in found.values()):
            raise ValueError(f"{self.label}: the training has diverged; try a lower learning rate")
        self._tasks.append(found)

    def storage(self, data: Data) -> int:
        """Bytes of the compressed differences; of norms and biases two bytes a weight."""
        sizes = (self.matrix_bytes(self._base[name].shape) for name in self._matrices)
        others = sum(2 * self._base[name].numel() for name in self._others)
        return len(self.protocol.tasks) * (sum(sizes) + others)

    def best_storage(self, data: Data) -> int:
        return self.storage(data)  # small already

    def matrix(self, difference: torch.Tensor) -> torch.Tensor:
        """The difference of a linear layer's weight as it comes out of the compression."""
        raise NotImplementedError

    def matrix_bytes(self, shape: torch.Size) -> int:
        """Bytes that the compressed difference of a matrix takes."""
        raise NotImplementedError


class BitDelta(Compressed):
    """The sign of each difference, times the mean absolute difference of its matrix.

    Liu et al. (2024), "BitDelta: Your Fine-Tune May Only Be Worth One Bit" (arXiv 2402.10193),
    without its distillation of the scales.
    """

    name, label, order, colour = "bitdelta", "BitDelta", 102, "#6A3D9A"

    def matrix(self, difference: torch.Tensor) -> torch.Tensor:
        scale = difference.abs().mean()
        return torch.where(difference > 0, scale, -scale)

    def matrix_bytes(self, shape: torch.Size) -> int:
        return (shape.numel() + 7) // 8 + 4  # the bits, and a float32 scale
