"""Fitting a new task's head alone, with the backbone as it is, before the task trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn

from bitstack_nb import ranks
from bitstack_nb.eligible import trainable_heads
from bitstack_nb.importance import batch_loss, check_seen, undisturbed, with_tensors
from bitstack_nb.rng import undisturbed_rng

HEAD_STEPS = 32
HEAD_LEARNING_RATE = 5e-3


def check_fitting(steps: int, learning_rate: float) -> None:
    """Raise a ValueError if the number of steps or the learning rate is out of range."""
    if not isinstance(steps, Integral) or steps < 0:
        raise ValueError(f"head_steps is {steps!r}, expected a whole number, at least 0")
    if not isinstance(learning_rate, Real) or not 0 < learning_rate < float("inf"):
        raise ValueError(f"head_learning_rate is {learning_rate!r}, expected more than 0")


def fit_heads(
    model: nn.Module,
    heads: Sequence[nn.Parameter],
    batches: Sequence[Mapping[str, Any]],
    *,
    steps: int,
    learning_rate: float,
) -> None:
    """Train the heads alone: Adam steps, one batch a step, with the batches repeated in turn.

    Dropout, weight decay and autocast are off. Adam works in float32 at least: in float16 its
    squared gradients become zero, and it divides by them. Training flags, gradients and the global
    random generators are left as found. Errors are those of
    :func:`bitstack_nb.importance.measure`, and a ValueError if a head becomes NaN or infinite.

    Several ranks start from rank 0's heads and average their gradients, so the heads stay equal.
    """
    ranks.check_equal({"head_steps": steps, "head_learning_rate": learning_rate}, "settings")
    ranks.take_firsts({f"head parameter {i}": head for i, head in enumerate(heads)}, "heads")
    # A head in float32 is not copied here, so Adam changes the head itself.
    wide = [h.detach().to(torch.promote_types(h.dtype, torch.float32)) for h in heads]
    optimizer = torch.optim.Adam(wide, lr=learning_rate)
    device = heads[0].device
    with undisturbed(model, device):
        for batch in islice(cycle(batches), steps):
            with ranks.agreed():
                loss = batch_loss(model, batch, device)
                gradients = torch.autograd.grad(loss, heads, allow_unused=True)
            for own, gradient in zip(wide, ranks.averaged(gradients, heads), strict=True):
                own.grad = None if gradient is None else gradient.to(own.dtype)
            optimizer.step()
            with torch.no_grad():
                for head, own in zip(heads, wide, strict=True):
                    head.copy_(own)
    _check_finite(heads)


def _check_finite(heads: Iterable[nn.Parameter]) -> None:
    for head in heads:
        if not head.isfinite().all():
            raise ValueError(
                f"fitting the head made it NaN or infinite (it is {head.dtype}): the loss is, or "
                "head_learning_rate is too large"
            )


def first_batches(
    loader: Iterable[Mapping[str, Any]], count: int, device: torch.device
) -> list[Mapping[str, Any]]:
    """Copies of a loader's first batches, at least one; the global RNGs are left as found.

    They are copies because a loader may fill the same tensors again for its next batch.
    """
    with undisturbed_rng(device):
        batches = [with_tensors(batch, torch.clone) for batch in islice(loader, count)]
    check_seen(len(batches))
    return batches


def fit_head(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    *,
    steps: int,
    learning_rate: float = HEAD_LEARNING_RATE,
) -> None:
    """Fit the model's own head by ``fit_heads`` on a loader's first batches, one a step."""
    heads = trainable_heads(model)
    batches = first_batches(loader, steps, heads[0].device)
    fit_heads(model, heads, batches, steps=steps, learning_rate=learning_rate)


@contextmanager
def put_back_on_error(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """If the block raises, give the tensors the values that they had before it."""
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        raise
