"""Several processes that train one model: what they add up, and what they must agree on.

Ranks are those of torch.distributed's default process group, which torchrun, ``accelerate launch``
or the user makes. Without one, or in one of a single process, nothing here changes a bit. With more
these are collective: every rank has to call them, or the others wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from bitstack_nb.bits import digest

if dist.is_available() and not dist.is_initialized():
    # Its default arguments keep the process group that stands when it is first imported, which
    # torch would do at the first optimizer: the group would outlive `leave`, its threads too.
    import torch.distributed.nn.functional

SAME_MODEL = (
    "every rank must build the same model and stack, and train it data-parallel with the others"
)


class RankError(RuntimeError):
    """Ranks that should hold the same do not, one of them failed, or nothing connects them."""


def count() -> int:
    """How many ranks there are; 1 without a process group.

    Raises:
        RankError: torchrun started several processes, but no process group connects them.
    """
    if _connected():
        return dist.get_world_size()
    if (started := _launched("WORLD_SIZE", 1)) > 1:
        raise RankError(
            f"{started} processes were started together, but torch.distributed is not initialised, "
            "so each would choose entries of its own: make the TrainingArguments or the "
            "Accelerator before this, or call torch.distributed.init_process_group()"
        )
    return 1


def rank() -> int:
    """This process's rank, 0 where it is alone. Rank 0 alone writes and prints."""
    return dist.get_rank() if _connected() else _launched("RANK", 0)


def leave() -> None:
    """End the connection to the other ranks, if there is one: the last thing a process does.

    The threads of a connection that is still open can abort the interpreter while it shuts down.
    """
    if _connected():
        dist.destroy_process_group()


def _connected() -> bool:
    return dist.is_available() and dist.is_initialized()


def _launched(variable: str, alone: int) -> int:
    """What torchrun tells a process that it started, or ``alone`` in any other process."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return alone
    return int(os.environ.get(variable, alone))


def gathered(value: Any) -> list[Any]:
    """What every rank gave for ``value`` (anything that can be pickled), by rank."""
    everyone = [value] * count()
    if count() > 1:
        dist.all_gather_object(everyone, value)
    return everyone


@contextmanager
def agreed() -> Iterator[None]:
    """An exception in the block on one rank is one on all, so that none waits for it for ever.

    The rank that failed raises its own, the others a RankError that says whose and what. The block
    itself must do nothing collective.
    """
    if count() == 1:
        yield
        return
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    reports = gathered(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for number, report in enumerate(reports):
        if report is not None:
            raise RankError(f"rank {number} failed: {report}")


def check_same(tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Raise a RankError on every rank unless all have these names with the same bits."""
    if count() > 1:
        check_equal(
            {n: (tuple(t.shape), str(t.dtype), digest(t)) for n, t in tensors.items()}, what
        )


def check_equal(own: Mapping[str, Any], what: str, *, advice: str = SAME_MODEL) -> None:
    """Raise a RankError on every rank unless all give the same values by name."""
    first, *others = gathered(dict(own))
    for number, other in enumerate(others, start=1):
        differ = [n for n in first | other if n not in first or first[n] != other.get(n)]
        if differ or list(first) != list(other):
            names = f" in {', '.join(differ[:3])}{' ...' if differ[3:] else ''}" if differ else ""
            raise RankError(f"rank {number} has other {what} than rank 0{names}: {advice}")


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

    Added in float64, rounded once on rank 0 and sent from there, so that no bit depends on whether
    the backend gives every rank the same sum.
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
        gradients: None counts as zeros where there are several ranks.
        like: what they are the gradients of.
    """
    if count() == 1:
        return list(gradients)
    return [
        _summed(torch.zeros_like(tensor) if own is None else own, divisor=count())
        for own, tensor in zip(gradients, like, strict=True)
    ]


def _summed(tensor: torch.Tensor, *, divisor: int = 1) -> torch.Tensor:
    if not tensor.numel():
        return tensor
    total = tensor.detach().clone(memory_format=torch.contiguous_format).double()
    dist.reduce(total, dst=0)  # what the others hold then is not defined
    return _firsts((total / divisor).to(tensor.dtype))


def _firsts(tensor: torch.Tensor) -> torch.Tensor:
    """Rank 0's tensor, contiguous, as a new one."""
    sent = tensor.detach().clone(memory_format=torch.contiguous_format)
    if sent.numel():
        dist.broadcast(sent, src=0)
    return sent
