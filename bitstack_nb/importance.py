"""How much each entry of the backbone matters for a task: gradients summed over its batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from numbers import Integral
from typing import Any

import torch
from torch import nn

from bitstack_nb import ranks
from bitstack_nb.rng import undisturbed_rng

Importance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Each takes a parameter and its gradient for one batch, both of the parameter's shape, and gives
# the batch's non-negative contribution to the score. "gradient" is the published choice;
# "gradient-weight" says by how much the loss would change, to first order, without the entry;
# "fisher" is the diagonal of the empirical Fisher information, batch by batch.
IMPORTANCE: dict[str, Importance] = {
    "gradient": lambda parameter, gradient: gradient.abs(),
    "gradient-weight": lambda parameter, gradient: (parameter.float() * gradient.float()).abs(),
    "fisher": lambda parameter, gradient: gradient.float().square(),
}


def measure(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    loader: Iterable[Mapping[str, Any]],
    *,
    n_batches: int,
    importance: str,
) -> dict[str, torch.Tensor]:
    """Scores by parameter name: float32, the parameter's shape and device, non-negative.

    Runs up to ``n_batches`` batches forward and backward in evaluation mode (dropout off) without
    autocast. The model's training flags and gradients and the global random generators are left as
    found.

    With several ranks each gives batches of its own, up to ``n_batches``, and the scores are summed
    over all: they have the same bits on every rank. One process that sees the same ``n`` batches
    adds in another order, and so rounds otherwise: its scores differ by less than ``n * 2^-23`` of
    themselves, and an entry that near to the threshold may be chosen by one and not by the other.

    Raises:
        ValueError: the loader is empty, a batch has no labels, no gradient arrives, or a score is
            NaN or infinite.
        TypeError: a batch is not a mapping or the model's output has no loss.
        ranks.RankError: another rank failed, or has other parameters.
    """
    with ranks.agreed():
        check_batches(loader, n_batches)
        trainable = {name: p for name, p in parameters.items() if p.requires_grad}
        if not trainable:
            raise ValueError("every eligible parameter is frozen, so none can get a gradient")
    ranks.check_equal({"importance": importance}, "settings")
    ranks.check_same(parameters, "parameters")
    scores = {
        name: torch.zeros_like(p, dtype=torch.float32, requires_grad=False)
        for name, p in parameters.items()
    }
    device = next(iter(parameters.values())).device
    seen = 0
    with ranks.agreed(), undisturbed(model, device):
        for batch in islice(loader, n_batches):
            loss = batch_loss(model, batch, device)
            gradients = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
            _accumulate(scores, trainable, gradients, IMPORTANCE[importance])
            seen += 1
        check_seen(seen)
    ranks.add_up(scores)
    _check(scores)
    return scores


def draw(parameters: Mapping[str, torch.Tensor], *, seed: int) -> dict[str, torch.Tensor]:
    """Scores by chance, uniform up to 1, as :func:`measure` gives them: above 0, which is no score.

    A seed draws the same on every device; the global random generators are left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    plain = {"dtype": torch.float32, "device": "cpu"}  # whatever the user's defaults are
    least = torch.finfo(torch.float32).tiny
    return {
        name: torch.rand(p.shape, generator=generator, **plain).clamp_(min=least).to(p.device)
        for name, p in parameters.items()
    }


def check_batches(loader: Iterable[Mapping[str, Any]], n_batches: int) -> None:
    """Raise a ValueError or TypeError that names what is no loader or no number of batches."""
    if not isinstance(n_batches, Integral) or n_batches < 1:
        raise ValueError(f"n_batches is {n_batches!r}, expected a whole number, at least 1")
    if not isinstance(loader, Iterable):
        raise TypeError(f"loader is {loader!r}, expected an iterable of batches")


def check_seen(seen: int) -> None:
    """Raise a ValueError where a loader gave no batch."""
    if not seen:
        raise ValueError("the loader gave no batch: it is empty or already used up")


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode, gradients on, autocast off; training flags and global RNGs come back."""
    training = {module: module.training for module in model.modules()}
    # A Trainer in half precision leaves accelerate's autocast wrapper on the instance's forward.
    wrapped = "_original_forward" in vars(model) and "_hf_hook" not in vars(model)
    forward = vars(model).pop("forward", None) if wrapped else None
    try:
        model.eval()
        with (
            undisturbed_rng(device),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        if forward is not None:
            model.forward = forward
        for module, flag in training.items():
            module.training = flag


def batch_loss(model: nn.Module, batch: Mapping[str, Any], device: torch.device) -> torch.Tensor:
    """The model's loss on a batch, whose unknown keys are dropped; errors as in :func:`measure`."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"a batch is a {type(batch).__name__}, expected a mapping such as "
            "{'input_ids': ..., 'labels': ...}: give the loader a collate function that makes one"
        )
    if "labels" not in batch:
        raise ValueError(f"a batch has no 'labels', only {sorted(batch)}: rename the label column")
    known = inspect.signature(model.forward).parameters
    takes_all = "labels" not in known  # then it takes them through **kwargs
    inputs = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
        if takes_all or key in known
    }
    loss = getattr(model(**inputs), "loss", None)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise TypeError(
            f"{type(model).__name__} returned no scalar .loss (got {loss!r}): its forward must "
            "return an object with the mean loss of the batch"
        )
    if not loss.requires_grad:
        raise ValueError("the loss needs no gradient: every parameter is frozen or it is detached")
    return loss


def _accumulate(
    scores: dict[str, torch.Tensor],
    parameters: Mapping[str, nn.Parameter],
    gradients: Iterable[torch.Tensor | None],
    importance: Importance,
) -> None:
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        if gradient is not None:
            if gradient.is_sparse:
                raise ValueError(f"{name} has a sparse gradient, which has no mask: exclude it")
            scores[name] += importance(parameter.detach(), gradient).float()


def _check(scores: Mapping[str, torch.Tensor]) -> None:
    bad = [name for name, score in scores.items() if not torch.isfinite(score).all()]
    if bad:
        raise ValueError(
            f"importance is NaN or infinite in {', '.join(bad[:5])}"
            f"{f' and {len(bad) - 5} more' if len(bad) > 5 else ''}: "
            "training has diverged (a smaller learning rate helps), or the labels are wrong"
        )
    if not any(score.any() for score in scores.values()):
        raise ValueError(
            "no eligible parameter got a gradient: does the loss depend on them? (Reentrant "
            "checkpointing hides them: use_reentrant=False)"
        )
