"""Importance of weights for a task, and the exact top k of it.

``measure`` adds up gradients over a task's batches; ``choose`` turns scores into the masks of the k
largest. Two passes over 16-bit histograms (a radix select) find the k-th largest score exactly: the
bit pattern of a non-negative float32, read as an integer, sorts like the number. The extra memory
is one chunk and one histogram; scores are not concatenated, sorted or sampled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from numbers import Integral, Number
from typing import Any

import torch
from torch import nn

from bitstack_nb import ranks
from bitstack_nb.gpu import kernels_on
from bitstack_nb.rng import undisturbed_rng

Importance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_CHUNK = 1 << 19
_BUCKETS = 1 << 16

# Each function takes a parameter and its gradient for one batch, and gives the batch's part of the
# score, at least 0. "gradient" is the published choice. "gradient-weight" is, to first order, the
# change of the loss without the weight. "fisher" is the diagonal of the empirical Fisher
# information, batch by batch.
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
    training: bool = False,
) -> dict[str, torch.Tensor]:
    """Importance by parameter name: float32, in the parameter's shape, at least 0.

    Runs up to ``n_batches`` batches forward and backward without autocast, in evaluation mode
    (dropout off) or with ``training`` in training mode. The model's training flags and gradients
    and the global random generators are left as found.

    Each of several ranks runs up to ``n_batches`` batches of its own. Scores are summed over the
    ranks, and every rank gets the same bits. One process that sees the same ``n`` batches adds them
    in another order. Its scores differ by rounding, by less than ``n * 2^-23`` of themselves.

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
    ranks.check_equal({"importance": importance, "training": training}, "settings")
    ranks.check_same(parameters, "parameters")
    scores = {
        name: torch.zeros_like(p, dtype=torch.float32, requires_grad=False)
        for name, p in parameters.items()
    }
    device = next(iter(parameters.values())).device
    seen = 0
    with ranks.agreed(), undisturbed(model, device, training=training):
        for batch in islice(loader, n_batches):
            loss = batch_loss(model, batch, device)
            gradients = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
            _accumulate(scores, trainable, gradients, IMPORTANCE[importance])
            seen += 1
        check_seen(seen)
    ranks.add_up(scores)
    _check(scores)
    return scores


def random_scores(parameters: Mapping[str, torch.Tensor], *, seed: int) -> dict[str, torch.Tensor]:
    """Random scores in the form of :func:`measure`'s: uniform, above 0 and at most 1.

    A seed gives the same scores on every device. The global random generators are not used.
    """
    generator = torch.Generator().manual_seed(seed)
    plain = {"dtype": torch.float32, "device": "cpu"}  # not the user's defaults
    least = torch.finfo(torch.float32).tiny
    return {
        name: torch.rand(p.shape, generator=generator, **plain).clamp_(min=least).to(p.device)
        for name, p in parameters.items()
    }


# The top k ------------------------------------------------------------------------------------


def choose(
    scores: Mapping[str, torch.Tensor],
    k: int,
    *,
    without: Mapping[str, torch.Tensor] | None = None,
    ties: bool = True,
) -> dict[str, torch.Tensor]:
    """Bool masks of the k largest scores over all tensors.

    A score of zero is never chosen: its weight did not matter for the task. So there may be fewer.

    Args:
        scores: as :func:`measure` gives them.
        k: how many scores to choose.
        without: bool masks of weights that may not be chosen, by name.
        ties: whether to choose all scores equal to the k-th, or only the first ones, up to k.
    """
    if without is not None:
        scores = {name: score.masked_fill(without[name], 0) for name, score in scores.items()}
    if k == 0:
        return {name: torch.zeros_like(score, dtype=torch.bool) for name, score in scores.items()}
    threshold = float(kth_largest(list(scores.values()), k))
    masks = {name: (score >= threshold) & (score > 0) for name, score in scores.items()}
    if not ties:
        _drop_last_ties(masks, scores, threshold, sum(int(m.sum()) for m in masks.values()) - k)
    return masks


def kth_largest(scores: Sequence[torch.Tensor], k: int) -> torch.Tensor:
    """The exact k-th largest value (k counts from 1) over all ``scores`` together.

    Args:
        scores: float32 tensors of any shapes and devices, without NaN or negative values.
        k: rank, 1 for the largest, at most the number of scores.

    Returns:
        A float32 scalar tensor on the CPU.
    """
    total = sum(score.numel() for score in scores)
    if not 1 <= k <= total:
        raise ValueError(f"k is {k}, expected 1 to {total}, the number of scores")
    for score in scores:
        if score.dtype != torch.float32:
            raise TypeError(f"scores must be float32, got {score.dtype}")
    high, rank = _descend(_histogram(scores), k)
    low, _ = _descend(_histogram(scores, high), rank)
    pattern = (high << 16) | low
    return pattern.to("cpu", torch.int32).view(torch.float32)  # waits for a GPU, the only time


def _drop_last_ties(
    masks: Mapping[str, torch.Tensor],
    scores: Mapping[str, torch.Tensor],
    threshold: float,
    surplus: int,
) -> None:
    for name in reversed(masks):
        if surplus <= 0:
            return
        tied = (masks[name] & (scores[name] == threshold)).nonzero()[-surplus:]
        if len(tied):
            masks[name][tied.unbind(1)] = False
        surplus -= len(tied)


def _histogram(scores: Sequence[torch.Tensor], high: torch.Tensor | None = None) -> torch.Tensor:
    """How many scores have each value of the upper 16 bits.

    With ``high`` how many of those whose upper bits it is have each value of the lower 16.
    """
    scores = [score.detach().reshape(-1) for score in scores if score.numel()]
    counts = torch.zeros(_BUCKETS, dtype=torch.int64, device=scores[0].device)
    for device in {score.device for score in scores}:
        there = [score for score in scores if score.device == device]
        kernels = kernels_on(device)
        counting = kernels.histogram if kernels else _counted
        counts += counting(there, None if high is None else high.to(device)).to(counts.device)
    return counts


def _counted(scores: Sequence[torch.Tensor], high: torch.Tensor | None) -> torch.Tensor:
    counts = torch.zeros(_BUCKETS, dtype=torch.int64, device=scores[0].device)
    for chunk in chain.from_iterable(score.split(_CHUNK) for score in scores):
        pattern = chunk.view(torch.int32)
        upper = pattern >> 16
        digit = upper if high is None else pattern & 0xFFFF
        counted = torch.ones_like(upper) if high is None else upper == high
        counts.scatter_add_(0, digit.long(), counted.long())
    return counts


def _descend(counts: torch.Tensor, k: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bucket that holds the k-th largest score, and the score's rank within that bucket."""
    from_top = counts.flip(0)
    above = from_top.cumsum(0) < k  # buckets of larger scores only
    return len(counts) - 1 - above.sum(), k - (from_top * above).sum()


def random_positions(
    parameters: Mapping[str, torch.Tensor], count: int, *, seed: int
) -> list[torch.Tensor]:
    """Positions in each parameter of ``count`` weights chosen at random, all equally likely.

    Their :func:`random_scores` are the largest. To save memory, only scores above a limit are kept.
    A seed gives the same positions on every device.
    """
    total, spread = sum(p.numel() for p in parameters.values()), 10 * count**0.5 + 100
    # Scores are uniform up to 1, so nearly surely at least count of them are above this limit.
    limit = max(0, 1 - (count + spread) / total)
    scores, where = _scores_from(limit, parameters, seed=seed, room=count + 2 * spread)
    if sum(map(len, where.values())) < count:
        scores, where = _scores_from(0, parameters, seed=seed, room=total)
    chosen = choose(scores, count, ties=False)
    return [positions[chosen[name]] for name, positions in where.items()]


def _scores_from(
    limit: float, parameters: Mapping[str, torch.Tensor], *, seed: int, room: float
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The random scores of each parameter that are at least ``limit``, and their positions.

    At most ``room`` of them, in two tensors: many small ones would leave holes in memory.
    """
    generator = torch.Generator().manual_seed(seed)
    scores, where, end = {}, {}, 0
    every_score = torch.empty(int(room), dtype=torch.float32, device="cpu")
    every_position = torch.empty(int(room), dtype=torch.int32, device="cpu")
    for name, p in parameters.items():
        drawn = torch.rand(p.shape, generator=generator, dtype=torch.float32, device="cpu")
        drawn = drawn.clamp_(min=torch.finfo(torch.float32).tiny).flatten()
        at = (drawn >= limit).nonzero().flatten()[: int(room) - end]
        start, end = end, end + len(at)
        where[name] = every_position[start:end].copy_(at)
        scores[name] = torch.index_select(drawn, 0, at, out=every_score[start:end])
    return scores, where


# Helpers of measure ---------------------------------------------------------------------------


def check_batches(loader: Iterable[Mapping[str, Any]], n_batches: int) -> None:
    """Check a loader and a number of batches: a ValueError or TypeError names the fault."""
    if not isinstance(n_batches, Integral) or n_batches < 1:
        raise ValueError(f"n_batches is {n_batches!r}, expected a whole number, at least 1")
    if not isinstance(loader, Iterable):
        raise TypeError(f"loader is {loader!r}, expected an iterable of batches")


def check_seen(seen: int) -> None:
    """Raise a ValueError if a loader gave no batch."""
    if not seen:
        raise ValueError("the loader gave no batch: it is empty or already used up")


@contextmanager
def undisturbed(
    model: nn.Module, device: torch.device, *, training: bool = False
) -> Iterator[None]:
    """Evaluation or training mode, gradients on, autocast off; restores flags and global RNGs."""
    flags = {module: module.training for module in model.modules()}
    # A Trainer in half precision leaves accelerate's autocast wrapper on the instance's forward.
    wrapped = "_original_forward" in vars(model) and "_hf_hook" not in vars(model)
    forward = vars(model).pop("forward", None) if wrapped else None
    try:
        model.train(training)
        with (
            undisturbed_rng(device),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        if forward is not None:
            model.forward = forward
        for module, flag in flags.items():
            module.training = flag


def batch_loss(model: nn.Module, batch: Mapping[str, Any], device: torch.device) -> torch.Tensor:
    """The loss on a batch; drops keys that forward does not take; raises as :func:`measure`."""
    _check_batch(batch)
    known = inspect.signature(model.forward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    given = {key: value for key, value in batch.items() if takes_all or key in known}
    inputs = with_tensors(given, lambda tensor: tensor.to(device))
    loss = getattr(model(**inputs), "loss", None)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise TypeError(
            f"{type(model).__name__} returned no scalar .loss (got {loss!r}): its forward must "
            "return an object with the mean loss of the batch"
        )
    if not loss.requires_grad:
        raise ValueError("the loss needs no gradient: every parameter is frozen or it is detached")
    return loss


def _check_batch(batch: Mapping[str, Any]) -> None:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"a batch is a {type(batch).__name__}, expected a mapping such as "
            "{'input_ids': ..., 'labels': ...}: give the loader a collate function that makes one"
        )
    if _is_row(batch):
        raise TypeError(
            "the loader gives single rows, expected batches: give trainer.get_train_dataloader(), "
            "or a DataLoader of the dataset with the collate function of training"
        )
    if "labels" not in batch:
        raise ValueError(f"a batch has no 'labels', only {sorted(batch)}: rename the label column")


def _is_row(batch: Mapping[str, Any]) -> bool:
    """Whether this is plainly one row of a tokenized dataset, as lists or tensors."""
    labels, ids = batch.get("labels", batch.get("label")), batch.get("input_ids")
    if isinstance(labels, torch.Tensor) and isinstance(ids, torch.Tensor):
        return (labels.dim(), ids.dim()) == (0, 1)
    return isinstance(labels, Number | str)


def with_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The value with a function applied to its tensors, also within mappings, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: with_tensors(inner, function) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(with_tensors(inner, function) for inner in value)
    return value


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
