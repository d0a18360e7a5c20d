"""The router of a task bank: of which task is a text, by its features on the base?

A task's part is the mean of its texts' features and a low-rank part of their scatter, some tens of
kB. The covariance that tasks share is a sum over their parts, so a task is added or removed with
its part alone. A linear discriminant over the means decides. A text of no task is one that lies
further from the chosen task's mean than nearly all of the task's held-out texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

RANK = 16  # directions of a task's scatter that are kept
SHRINKAGE = 0.1  # share of the shared covariance that is made equal in all directions
_LEVELS = 101  # quantiles of the held-out distances that are kept


class Part(NamedTuple):
    """One task's part of the router, in float32.

    Attributes:
        mean: of the features ``[size]``.
        axes: ``[rank, size]``, orthogonal: the directions of largest variance, each as long as the
            standard deviation along it.
        rest: ``[2]``, the variance along any other direction, and the number of texts.
        held: ascending quantiles of the distances of held-out texts.
    """

    mean: torch.Tensor
    axes: torch.Tensor
    rest: torch.Tensor
    held: torch.Tensor

    def distances(self, features: torch.Tensor) -> torch.Tensor:
        """Squared Mahalanobis distance of each text from the mean: float64 ``[texts]``.

        The covariance is the task's own, so other tasks do not change it.
        """
        mean, axes = self.mean.double(), self.axes.double()
        off, variances = features.double() - mean, axes.square().sum(1)
        along = off @ axes.T / variances.sqrt()
        beside = (off.square().sum(1) - along.square().sum(1)).clamp(min=0)
        return (along.square() / variances).sum(1) + beside / self.rest[0].double()

    def limit(self, unknown: float) -> float:
        """The distance that this share of the task's held-out texts exceeds."""
        return float(torch.quantile(self.held.double(), 1 - unknown))


def fit(features: torch.Tensor, held: torch.Tensor | None = None) -> Part:
    """The part of a task in a router.

    Args:
        features: of its texts ``[texts, size]``, two texts or more.
        held: features of other texts of the task. ``None`` holds out every fifth of its texts for
            the distances, and then takes all of them for the mean and the scatter.
    """
    features = features.double().cpu()
    if held is None:
        last = torch.arange(len(features)) % 5 == 4
        some = len(features) >= 10
        part = _statistics(features[~last] if some else features)
        distances = part.distances(features[last] if some else features)
        part = _statistics(features)
    else:
        part = _statistics(features)
        distances = part.distances(held.cpu())
    levels = torch.linspace(0, 1, _LEVELS, dtype=torch.float64)
    return part._replace(held=torch.quantile(distances, levels).float())


def _statistics(features: torch.Tensor) -> Part:
    count, size = features.shape
    mean = features.mean(0)
    scatter = (features - mean) / count**0.5
    _, deviations, directions = torch.linalg.svd(scatter, full_matrices=False)
    rank = min(RANK, size - 1, count - 1, int((deviations > 1e-6 * deviations[0]).sum()))
    axes = deviations[:rank, None] * directions[:rank]
    # Never zero: few texts lie in few directions, and others are only more.
    floor = 1e-6 * float(mean.square().mean()) + torch.finfo(torch.float32).tiny
    rest = max(float(deviations[rank:].square().sum()) / (size - rank), floor)
    return Part(mean.float(), axes.float(), torch.tensor([rest, count]), torch.zeros(0))


class Router:
    """Chooses among tasks by a linear discriminant over their means.

    Args:
        parts: by task, one or more.
    """

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self.names, self._parts = list(parts), dict(parts)
        covariance = sum(float(part.rest[1]) * _covariance(part) for part in parts.values())
        covariance /= sum(float(part.rest[1]) for part in parts.values())
        equal = covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
        shrunk = torch.lerp(covariance, equal, SHRINKAGE)
        means = torch.stack([part.mean.double() for part in parts.values()])
        self._weights = torch.linalg.solve(shrunk, means.T)
        self._bias = -(means.T * self._weights).sum(0) / 2

    def choose(self, features: torch.Tensor, *, unknown: float = 0.0) -> list[Choice]:
        """The task of each text.

        Args:
            features: of the texts ``[texts, size]``.
            unknown: share of a task's own texts that may count as texts of no task, from 0 to 1. At
                0 every text gets a task.
        """
        features = features.double().cpu()
        found = (features @ self._weights + self._bias).softmax(1).max(1)
        choices = [
            Choice(self.names[task], score)
            for score, task in zip(found.values.tolist(), found.indices.tolist(), strict=True)
        ]
        if unknown > 0:
            for name, part in self._parts.items():
                far = part.distances(features) > part.limit(unknown)
                for number in far.nonzero().flatten().tolist():
                    if choices[number].task == name:
                        choices[number] = Choice(None, choices[number].score)
        return choices


class Choice(NamedTuple):
    """The task of a text, None if it is of no task, and the probability of the nearest task."""

    task: str | None
    score: float


def _covariance(part: Part) -> torch.Tensor:
    """A task's covariance as far as its part tells it."""
    axes, rest = part.axes.double(), part.rest[0].double()
    directions = torch.nn.functional.normalize(axes, dim=1)
    inside = axes.T @ axes - rest * (directions.T @ directions)
    return inside + rest * torch.eye(len(part.mean), dtype=torch.float64)
