"""The router of a task bank: of which task is a text, by its mean-pooled features on the base?

A task's part is the mean of its texts' features and a low-rank part of their scatter, some tens of
kB. The covariance that tasks share is a sum over their parts, so a task is added or removed with
its part alone. A linear discriminant over the means decides. A text of no task is one that points
further away from the chosen task's mean than nearly all of the task's held-out texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

RANK = 64  # directions of a task's scatter that are kept
SHRINKAGE = 0.1  # share of the shared covariance that is made equal in all directions
_LEVELS = 101  # quantiles of the held-out distances that are kept


class Part(NamedTuple):
    """One task's part of the router.

    Attributes:
        mean: of the features: float32 ``[size]``.
        axes: float16 ``[rank, size]``, orthogonal: the directions of largest variance, each as long
            as the standard deviation along it.
        rest: float32 ``[2]``: the variance along any other direction, and the number of texts.
        held: float32: ascending quantiles of the distances of held-out texts.
    """

    mean: torch.Tensor
    axes: torch.Tensor
    rest: torch.Tensor
    held: torch.Tensor

    def limit(self, unknown: float) -> float:
        """The distance that this share of the task's held-out texts exceeds."""
        return float(torch.quantile(self.held.double(), 1 - unknown))

    def covariance(self) -> torch.Tensor:
        """The covariance as far as the part tells it: float64 ``[size, size]``."""
        axes, rest = self.axes.double(), self.rest[0].double()
        directions = torch.nn.functional.normalize(axes, dim=1)
        beside = torch.eye(len(self.mean), dtype=torch.float64) - directions.T @ directions
        return axes.T @ axes + rest * beside


class Choice(NamedTuple):
    """The task of a text, None if it is of no task, and the probability of the nearest task."""

    task: str | None
    score: float


def fit(features: torch.Tensor, held: torch.Tensor | None = None) -> Part:
    """The part of a task in a router.

    Args:
        features: of its texts ``[texts, size]``, two texts or more, in random order.
        held: of other texts of the task. ``None`` takes every fifth text for the distances, which
            are then from the mean of the others.
    """
    features = features.double().cpu()
    fitted = features
    if held is None:
        last = torch.arange(len(features)) % 5 == 4
        fitted, held = (features[~last], features[last]) if last.any() else (features, features)
    levels = torch.linspace(0, 1, _LEVELS, dtype=torch.float64)
    quantiles = torch.quantile(_distances(held, fitted.mean(0)), levels)
    (count, size), mean = features.shape, features.mean(0)
    _, deviations, directions = torch.linalg.svd(
        (features - mean) / count**0.5, full_matrices=False
    )
    rank = min(RANK, size - 1, int((deviations > 1e-6 * deviations[0]).sum()))
    rest = deviations[rank:].square().sum() / (size - rank)
    return Part(
        mean.float(),
        (deviations[:rank, None] * directions[:rank]).half(),
        torch.tensor([float(rest), count]),
        quantiles.float(),
    )


def _distances(features: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """1 minus the cosine between each text's features and a mean: float64 ``[texts]``."""
    mean = mean.double()[None]
    return 1 - torch.nn.functional.cosine_similarity(features.double().cpu(), mean)


class Router:
    """Chooses among tasks by a linear discriminant over their means.

    Args:
        parts: by task, one or more.
    """

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = dict(parts)
        counts = {name: float(part.rest[1]) for name, part in parts.items()}
        summed = sum(counts[name] * part.covariance() for name, part in parts.items())
        covariance = summed / sum(counts.values())
        # Never zero, for texts that are all equal.
        variance = covariance.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        equal = variance * torch.eye(len(covariance), dtype=torch.float64)
        means = torch.stack([part.mean.double() for part in parts.values()])
        shrunk = torch.lerp(covariance, equal, SHRINKAGE)
        self._weights = torch.linalg.solve(shrunk, means.T)
        self._bias = -(means.T * self._weights).sum(0) / 2

    def choose(self, features: torch.Tensor, *, unknown: float = 0.0) -> list[Choice]:
        """The task of each text.

        Args:
            features: of the texts ``[texts, size]``.
            unknown: share of a task's own texts that may count as texts of no task, from 0 to 1. At
                0 every text gets a task.

        Raises:
            ValueError: ``unknown`` is out of range.
        """
        if not 0 <= unknown <= 1:
            raise ValueError(f"unknown is {unknown!r}, expected a share from 0 to 1, as 0.05")
        features, names = features.double().cpu(), list(self._parts)
        found = (features @ self._weights + self._bias).softmax(1).max(1)
        tasks: list[str | None] = [names[place] for place in found.indices.tolist()]
        if unknown:
            for name, part in self._parts.items():
                far = _distances(features, part.mean) > part.limit(unknown)
                tasks = [None if t == name and f else t for t, f in zip(tasks, far, strict=True)]
        return [Choice(*pair) for pair in zip(tasks, found.values.tolist(), strict=True)]
