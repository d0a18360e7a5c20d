"""Both methods in plain PyTorch, the first file to read: BitStack, and our exact recall.

This file holds the methods and nothing else. A model is any module whose forward gives ``.loss``,
and ``parameters`` are its eligible parameters by name. Masks are bool tensors. The modules
``stack`` and ``recall`` add packed masks, files, checks and errors. Tests compare them with this
file step by step, and ``cost`` times it as the plain implementation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

Batches = Iterable[Mapping[str, Tensor]]
Parameters = Mapping[str, nn.Parameter]


def measure(model: nn.Module, parameters: Parameters, batches: Batches) -> dict[str, Tensor]:
    """Importance of each weight for a task: |gradient| added up over batches, without dropout."""
    scores = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    training = model.training
    model.eval()
    for batch in batches:
        loss = model(**batch).loss
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for score, gradient in zip(scores.values(), gradients, strict=True):
            if gradient is not None:
                score += gradient.abs().float()
    model.train(training)
    return scores


def choose(scores: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """Bool masks of the k largest scores of all parameters together, without scores of zero."""
    everything = torch.cat([score.flatten() for score in scores.values()])
    threshold = everything.topk(k).values[-1] if k else torch.inf
    return {name: (score >= threshold) & (score > 0) for name, score in scores.items()}


class PlainBitStack:
    """The published method: after each task, lock the weights that matter most for it.

    A task chooses the share ``sparsity`` of all eligible weights. With budget ``"union"`` it may
    choose locked weights again; with ``"fresh"`` it chooses free weights only.
    """

    def __init__(
        self, model: nn.Module, parameters: Parameters, *, sparsity: float, budget: str = "union"
    ) -> None:
        self.model, self.parameters, self.budget = model, dict(parameters), budget
        self.k = round(sparsity * sum(p.numel() for p in parameters.values()))
        self.masks = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in parameters.items()}
        self.values = {n: p.detach().clone() for n, p in parameters.items()}

    def update(self, batches: Batches) -> None:
        """After a task, lock the weights that matter most on its batches, at their values now."""
        scores = measure(self.model, self.parameters, batches)
        if self.budget == "fresh":
            for name, score in scores.items():
                score[self.masks[name]] = 0
        for name, chosen in choose(scores, self.k).items():
            self.masks[name] |= chosen
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()}

    def zero_gradients(self, *_: object) -> None:
        """Before the optimizer's step, set the gradients of locked weights to zero."""
        for name, parameter in self.parameters.items():
            parameter.grad[self.masks[name]] = 0

    @torch.no_grad()
    def put_back(self, *_: object) -> None:
        """After the step, put locked values back: momentum and weight decay have moved them."""
        for name, parameter in self.parameters.items():
            parameter[self.masks[name]] = self.values[name][self.masks[name]]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Call ``zero_gradients`` before and ``put_back`` after each step of an optimizer."""
        self.handles = [
            optimizer.register_step_pre_hook(self.zero_gradients),
            optimizer.register_step_post_hook(self.put_back),
        ]

    def detach(self) -> None:
        """Undo ``attach``."""
        for handle in self.handles:
            handle.remove()


class PlainRecall:
    """Exact recall, our extension: a task has a few own weights and a head; all share one base.

    An optimizer trains the own weights and ``heads`` (the head's parameters), and nothing else. So
    the base with a task's own weights put in is that task's model, bit for bit. Tasks do not depend
    on each other. (Each task needs its own head. ``ExactRecall`` keeps it; here the user does.)
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Parameters,
        heads: Iterable[nn.Parameter],
        *,
        sparsity: float,
    ) -> None:
        self.model, self.parameters, self.heads = model, dict(parameters), list(heads)
        self.k = round(sparsity * sum(p.numel() for p in parameters.values()))
        self.base = {n: p.detach().clone() for n, p in parameters.items()}
        self.tasks: dict[str, tuple[dict[str, Tensor], Tensor]] = {}

    def begin(self, scores: Mapping[str, Tensor]) -> list[nn.Parameter]:
        """Start a task on the base; its own weights are those with the k highest scores.

        Random scores serve best; ``measure`` gives importance. Returns the parameters that an
        optimizer may train: one vector of the own weights, and the head's.
        """
        self.switch(None)
        self.own = choose(scores, self.k)
        values = [self.base[name][mask] for name, mask in self.own.items()]
        self.vector = nn.Parameter(torch.cat(values))
        return [self.vector, *self.heads]

    def gather(self, *_: object) -> None:
        """Before the optimizer's step, copy the gradients of own weights into the vector's."""
        parts = [self.parameters[name].grad[mask] for name, mask in self.own.items()]
        self.vector.grad = torch.cat(parts)
        for parameter in self.parameters.values():
            parameter.grad = None

    def write(self, *_: object) -> None:
        """After the step, write the vector into the model's own weights."""
        self._put(self.own, self.vector)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Call ``gather`` before and ``write`` after each step of an optimizer."""
        optimizer.register_step_pre_hook(self.gather)
        optimizer.register_step_post_hook(self.write)

    def close(self, name: str) -> None:
        """End the task: keep the masks of its own weights, and their values."""
        self.tasks[name] = self.own, self.vector.detach().clone()

    @torch.no_grad()
    def switch(self, name: str | None) -> None:
        """Put the base into the model, and then the own weights of a task, unless it is None."""
        for parameter, value in self.base.items():
            self.parameters[parameter].copy_(value)
        if name is not None:
            self._put(*self.tasks[name])

    @torch.no_grad()
    def _put(self, own: Mapping[str, Tensor], vector: Tensor) -> None:
        parts = vector.split([int(mask.sum()) for mask in own.values()])
        for (name, mask), values in zip(own.items(), parts, strict=True):
            self.parameters[name][mask] = values
