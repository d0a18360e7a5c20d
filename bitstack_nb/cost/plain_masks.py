"""The published method in its plainest form: what ``cost`` compares the stack with.

Bool masks, hooks that multiply, scores gathered on the CPU, ``kthvalue`` over all of them at once,
a copy of every weight and boolean indexing to put locked ones back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn


class PlainMasks:
    """Locks the top ``sparsity`` of the entries of some parameters after each task.

    Args:
        model: gives ``.loss``.
        parameters: the eligible ones, by name.
        sparsity: share of their entries that a task locks.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], *, sparsity: float
    ) -> None:
        self.model, self.parameters, self.sparsity = model, dict(parameters), sparsity
        self.masks = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in parameters.items()}
        self.saved: dict[str, torch.Tensor] = {}
        self._handles: list = []

    def update(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Lock what mattered in these batches."""
        scores = {n: torch.zeros(p.shape) for n, p in self.parameters.items()}
        for batch in batches:
            self.model.zero_grad()
            self.model(**batch).loss.backward()
            for name, parameter in self.parameters.items():
                scores[name] += parameter.grad.abs().cpu()
        self.model.zero_grad()
        everything = torch.cat([score.flatten() for score in scores.values()])
        k = round(self.sparsity * everything.numel())
        threshold = everything.kthvalue(everything.numel() - k + 1).values
        for name, parameter in self.parameters.items():
            self.masks[name] |= (scores[name] >= threshold).to(parameter.device)
        self.saved = {n: p.detach().clone() for n, p in self.parameters.items()}

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero locked gradients and put locked entries back after each step."""
        for name, parameter in self.parameters.items():
            hook = parameter.register_hook(lambda g, mask=self.masks[name]: g * ~mask)
            self._handles.append(hook)
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self.restore()))

    def detach(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    @torch.no_grad()
    def restore(self) -> None:
        """Put locked entries back."""
        for name, parameter in self.parameters.items():
            parameter[self.masks[name]] = self.saved[name][self.masks[name]]
