"""BitFit: every task trains the backbone's biases alone, from the base."""

from __future__ import annotations

import torch
from torch import nn

from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.strategies.single import Single


class BitFit(Single):
    """Separate biases, of norms too, on one backbone. The package peft does not have it.

    Ben Zaken et al. (2022), "BitFit: Simple Parameter-efficient Fine-tuning".
    """

    name, label, order, colour = "bitfit", "BitFit", 75, "#44AA99"

    def __init__(self, model: nn.Module, protocol: Protocol) -> None:
        super().__init__(model, protocol)
        for name, parameter in model.base_model.named_parameters():
            parameter.requires_grad_(name in self._base)

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: bias for name, bias in super()._weights().items() if name.endswith("bias")}
