"""The field's metrics of an accuracy matrix, and intervals over seeds. Needs numpy only.

The matrix ``a`` is [T, T] in percent: ``a[t, i]`` is the accuracy on task ``i`` after training task
``t``. None or NaN stands for values that were not measured. Values above the diagonal are ignored,
as a task has no head before its turn; joint training has only the last row. A metric that needs a
missing value, or more tasks than there are, is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np

Matrix = Sequence[Sequence[float | None]] | np.ndarray


def accuracy_matrix(matrix: Matrix) -> np.ndarray:
    """Check a matrix and return it as float64 [T, T], NaN where nothing was measured.

    Raises ValueError where it is empty, not square, or holds a value that is no percentage.
    """
    try:
        a = np.array(matrix, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"the accuracy matrix must have rows of equal length holding numbers or None ({error})"
        ) from error
    if a.ndim != 2 or a.shape[0] != a.shape[1] or a.size == 0:
        raise ValueError(
            f"the accuracy matrix must be [T, T] for T >= 1 tasks, got shape {a.shape}: "
            "give a row per trained task, with None for a value that was not measured"
        )
    wrong = a[(a < 0) | (a > 100)]
    if wrong.size:
        raise ValueError(f"accuracies are percentages from 0 to 100, got {wrong[0]:g}")
    return a


def average_accuracy(matrix: Matrix) -> float:
    """Mean accuracy over all tasks after the last one, in percent.

    ACC of Lopez-Paz & Ranzato 2017, "Gradient Episodic Memory for Continual Learning".
    """
    return _mean(accuracy_matrix(matrix)[-1])


def learning_accuracy(matrix: Matrix) -> float:
    """Mean accuracy on each task just after it was trained, ``mean a[i, i]``, in percent."""
    return _mean(np.diagonal(accuracy_matrix(matrix)))


def forgetting_per_task(matrix: Matrix) -> np.ndarray:
    """Points lost on each task but the last, ``a[i, i] - a[T, i]``: float64 [T - 1]."""
    a = accuracy_matrix(matrix)
    return (np.diagonal(a) - a[-1])[:-1]


def forgetting(matrix: Matrix) -> float:
    """Mean of ``forgetting_per_task``, in points: the definition of Avalanche and, here, of the
    published table. It equals ``-backward_transfer`` and can be negative."""
    return _mean(forgetting_per_task(matrix))


def forgetting_chaudhry(matrix: Matrix) -> float:
    """Mean over the tasks but the last of ``max over l < T of a[l, i] - a[T, i]``, in points.

    The forgetting measure F of Chaudhry et al. 2018, "Riemannian Walk for Incremental Learning:
    Understanding Forgetting and Intransigence". The maximum runs over the rows from task i's own
    on, as there is no accuracy before; so it is never below ``forgetting``.
    """
    a = accuracy_matrix(matrix)
    last = len(a) - 1
    lost = [a[i:last, i].max() - a[last, i] for i in range(last)]
    return _mean(np.array(lost))


def backward_transfer(matrix: Matrix) -> float:
    """Mean over the tasks but the last of ``a[T, i] - a[i, i]``, in points; negative: forgotten.

    BWT of Lopez-Paz & Ranzato 2017, "Gradient Episodic Memory for Continual Learning", equation 3.
    """
    # Not -forgetting(), which would make a -0.0 of no forgetting at all.
    a = accuracy_matrix(matrix)
    return _mean((a[-1] - np.diagonal(a))[:-1])


def forward_transfer(matrix: Matrix, separate: Matrix) -> float:
    """Mean over the tasks but the first of ``a[i, i] - s[i, i]``, in points; negative: hindered.

    ``separate`` is the matrix ``s`` of separate models with the same tasks, texts and order. FWT of
    Lopez-Paz & Ranzato 2017 needs ``a[i - 1, i]``, the accuracy before a task is trained. With a
    head per task it does not exist, because a head is made with its task. So this compares what is
    learnt, as Wolczyk et al. 2021, "Continual World", do with training curves. It counts what a
    method cannot learn as negative transfer, which Chen et al. 2023, "Is forgetting less a good
    inductive bias for forward transfer?", object to.
    """
    a, s = accuracy_matrix(matrix), accuracy_matrix(separate)
    if a.shape != s.shape:
        raise ValueError(f"{len(a)} tasks cannot be compared with {len(s)}")
    return _mean((np.diagonal(a) - np.diagonal(s))[1:])


def first_task_after_last(matrix: Matrix) -> float:
    """Accuracy on the first task after the last one was trained, in percent."""
    return float(accuracy_matrix(matrix)[-1, 0])


def summarize(matrix: Matrix) -> dict[str, float | None]:
    """Every metric above that is one number of one matrix, by name; None: cannot be computed."""
    metrics = (
        average_accuracy,
        learning_accuracy,
        forgetting,
        forgetting_chaudhry,
        backward_transfer,
        first_task_after_last,
    )
    values = {metric.__name__: metric(matrix) for metric in metrics}
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of ``values`` and the half width of its 95 % Student interval.

    The half width is None for one value, which says nothing of the spread. Raises ValueError for no
    values and for values that are not finite.
    """
    sample = np.array(values, dtype=np.float64)
    if sample.ndim != 1 or not sample.size or not np.isfinite(sample).all():
        raise ValueError(f"an interval needs one or more finite numbers, got {values!r}")
    mean, n = float(sample.mean()), sample.size
    if n == 1:
        return mean, None
    return mean, student_quantile(n - 1) * float(sample.std(ddof=1)) / math.sqrt(n)


@cache
def student_quantile(degrees: int, confidence: float = 0.95) -> float:
    """The ``t`` with ``P(|T| < t) = confidence`` for Student's T with ``degrees`` of freedom.

    Abramowitz & Stegun 1964, equations 26.7.3 and 26.7.4, give the probability as a finite series
    in the angle ``atan(t / sqrt(degrees))``. Bisection inverts it, to about 1e-9.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(64):
        middle = (low + high) / 2
        if _central_probability(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def student_tail(t: float, degrees: int) -> float:
    """``P(T > t)`` for Student's T with ``degrees`` of freedom; see ``student_quantile``."""
    beyond = (1 - _central_probability(math.atan(abs(t) / math.sqrt(degrees)), degrees)) / 2
    beyond = max(beyond, 0.0)  # a rounding error of the series may reach below
    return beyond if t > 0 else 1 - beyond


def _mean(values: np.ndarray) -> float:
    """Mean that is NaN, without numpy's warning, for no values."""
    return float(values.mean()) if values.size else math.nan


def _central_probability(angle: float, degrees: int) -> float:
    """``P(|T| < sqrt(degrees) * tan(angle))``, see ``student_quantile``."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cosine * cosine * (k - 1) / k
    if odd:
        return 2 / math.pi * (angle + sine * total)
    return sine * total
