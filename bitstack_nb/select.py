"""Which entries to lock: the exact k-th largest score over many tensors, and the masks it gives.

Scores are never concatenated, sorted or sampled. The bit pattern of a non-negative float32, read
as an integer, sorts like the number itself, so a radix select finds the k-th largest exactly in
two passes over 16-bit histograms; the extra memory is one chunk and one histogram.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

_CHUNK = 1 << 21
_BUCKETS = 1 << 16


def kth_largest(scores: Sequence[torch.Tensor], k: int) -> torch.Tensor:
    """The exact k-th largest value (k counts from 1) over all ``scores`` together.

    Args:
        scores: float32 tensors of any shapes and devices, without NaN or negative values.
        k: rank, 1 for the largest, at most the number of entries.

    Returns:
        A float32 scalar tensor on the CPU.
    """
    total = sum(score.numel() for score in scores)
    if not 1 <= k <= total:
        raise ValueError(f"k is {k}, expected 1 to {total}, the number of scores")
    for score in scores:
        if score.dtype != torch.float32:
            raise TypeError(f"scores must be float32, got {score.dtype}")
    high, rank = _descend(_histogram(scores, lambda pattern: pattern >> 16), k)
    low, _ = _descend(
        _histogram(scores, lambda pattern: pattern[pattern >> 16 == high] & 0xFFFF), rank
    )
    return torch.tensor((high << 16) | low, dtype=torch.int32, device="cpu").view(torch.float32)


def top_masks(
    scores: Mapping[str, torch.Tensor], k: int, *, ties: bool = True
) -> dict[str, torch.Tensor]:
    """Bool masks of the k largest scores over all tensors.

    Ties with the k-th are all taken, or without ``ties`` the first of them until there are k. An
    entry whose score is zero did not matter for the task and is never taken, so fewer than k are
    when fewer than k have a gradient.
    """
    if k == 0:
        return {name: torch.zeros_like(score, dtype=torch.bool) for name, score in scores.items()}
    threshold = float(kth_largest(list(scores.values()), k))
    masks = {name: (score >= threshold) & (score > 0) for name, score in scores.items()}
    if not ties:
        _drop_last_ties(masks, scores, threshold, sum(int(m.sum()) for m in masks.values()) - k)
    return masks


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


def _histogram(
    scores: Sequence[torch.Tensor], digit: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    counts = torch.zeros(_BUCKETS, dtype=torch.int64, device="cpu")
    for pattern in _patterns(scores):
        counts += torch.bincount(digit(pattern), minlength=_BUCKETS).cpu()
    return counts


def _patterns(scores: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    for score in scores:
        for chunk in score.detach().reshape(-1).split(_CHUNK):
            if chunk.numel():
                yield chunk.view(torch.int32)


def _descend(counts: torch.Tensor, k: int) -> tuple[int, int]:
    """The bucket that holds the k-th largest, and its rank among that bucket's entries."""
    from_top = counts.flip(0).cumsum(0)
    position = int((from_top < k).sum())
    above = int(from_top[position - 1]) if position else 0
    return len(counts) - 1 - position, k - above
