"""Magnitude mask: the largest weights are locked, for which no gradient has to be measured."""

from __future__ import annotations

import torch

from bitstack_nb.benchmark.locking import Control


class MagnitudeMask(Control):
    """Locks as many weights as BitStack, those of the largest absolute value."""

    name, label, order, colour = "magnitude-mask", "magnitude mask", 55, "#8C6D1F"

    def _scores(self, number: int) -> dict[str, torch.Tensor]:
        weights = dict(self.model.named_parameters())
        return {name: weights[name].detach().abs().float() for name in self._stack.masks}
