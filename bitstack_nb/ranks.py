"""Data-parallel training: sums over processes (ranks), and checks that the ranks agree.

Ranks are those of torch.distributed's default process group, which torchrun, ``accelerate launch``
or the user makes. Without a group, or with one rank, no function changes a bit. With more ranks
every function is collective: it waits until all ranks call it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from bitstack_nb.bits import digest


class RankError(RuntimeError):
    """Ranks hold different things, one of them failed, or no process group connects them."""


def count() -> int:
    """How many ranks there are; 1 without a process group.

    Raises:
        RankError: torchrun started several processes, but no process group connects them.
    """
    if not dist.is_available():
        return 1
    if dist.is_initialized():
        return dist.get_world_size()
    started = int(os.environ.get("WORLD_SIZE", 1)) if dist.is_torchelastic_launched() else 1
    if started > 1:
        raise RankError(
            f"{started} processes were started together, but torch.distributed is not initialised, "
            "so each would choose other weights: make the TrainingArguments or the Accelerator "
            "before this, or call torch.distributed.init_process_group()"
        )
    return 1


@contextmanager
def agreed() -> Iterator[None]:
    """Turn an exception in the block on one rank into one on all ranks, so that none waits.

    The rank that failed raises its own exception. The others raise a RankError that names the rank
    and the cause. The block must not call collective functions.
    """
    if count() == 1:
        yield
        return
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    reports = _gathered(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for number, report in enumerate(reports):
        if report is not None:
            raise RankError(f"rank {number} failed: {report}")


def check_same(tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Raise a RankError on every rank unless all have tensors of these names and bits."""
    if count() > 1:
        check_equal(
            {n: (tuple(t.shape), str(t.dtype), digest(t)) for n, t in tensors.items()}, what
        )


def check_equal(own: Mapping[str, Any], what: str) -> None:
    """Raise a RankError on every rank unless all give the same values by name."""
    first, *others = _gathered(dict(own))
    for number, other in enumerate(others, start=1):
        differ = [n for n in first | other if n not in first or first[n] != other.get(n)]
        if differ or list(first) != list(other):
            names = f" in {', '.join(differ[:3])}{' ...' if differ[3:] else ''}" if differ else ""
            raise RankError(
                f"rank {number} has other {what} than rank 0{names}: every rank must build the "
                "same model and stack, and train it data-parallel with the others"
            )


@torch.no_grad()
def take_firsts(tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Put rank 0's values into every rank's tensors; a RankError if their shapes differ."""
    if count() > 1:
        check_equal({n: (tuple(t.shape), str(t.dtype)) for n, t in tensors.items()}, what)
        for tensor in tensors.values():
            tensor.copy_(_firsts(tensor))


@torch.no_grad()
def add_up(scores: Mapping[str, torch.Tensor]) -> None:
    """Replace each tensor by its sum over the ranks, with the same bits on all of them.

    Rank 0 gets the sum in float64, rounds it once and sends it to all. Without that, a backend may
    give every rank another sum.
    """
    if count() > 1:
        for score in scores.values():
            score.copy_(_summed(score))


@torch.no_grad()
def averaged(
    gradients: Sequence[torch.Tensor | None], like: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """Gradients averaged over the ranks, with the same bits on all of them.

    Args:
        gradients: None counts as zeros if there are several ranks.
        like: the tensors of these gradients, in the same order.
    """
    if count() == 1:
        return list(gradients)
    return [
        _summed(torch.zeros_like(tensor) if own is None else own, divisor=count())
        for own, tensor in zip(gradients, like, strict=True)
    ]


def _gathered(value: Any) -> list[Any]:
    """The ``value`` that each rank gave (anything that can be pickled), by rank."""
    everyone = [value] * count()
    if count() > 1:
        dist.all_gather_object(everyone, value)
    return everyone


def _summed(tensor: torch.Tensor, *, divisor: int = 1) -> torch.Tensor:
    if not tensor.numel():
        return tensor
    total = tensor.detach().clone(memory_format=torch.contiguous_format).double()
    dist.reduce(total, dst=0)  # the result is defined on rank 0 only
    return _firsts((total / divisor).to(tensor.dtype))


def _firsts(tensor: torch.Tensor) -> torch.Tensor:
    """Rank 0's tensor, contiguous, as a new one."""
    sent = tensor.detach().clone(memory_format=torch.contiguous_format)
    if sent.numel():
        dist.broadcast(sent, src=0)
    return sent
