"""Tests of contrasts that were named beforehand: paired differences, Holm, and equivalence.

Seeds are the sample: a test is one of the mean difference over seeds, by Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bitstack_nb.results.frames import frame
from bitstack_nb.results.metrics import mean_interval, student_tail
from bitstack_nb.results.pairs import OTHER, Choice, chosen_pairs
from bitstack_nb.results.result import Result, ResultError

if TYPE_CHECKING:
    import pandas as pd


def contrasts(
    results: Iterable[Result],
    pairs: Mapping[str, tuple[Choice, Choice]],
    *,
    column: str = "average_accuracy",
    margin: float | None = None,
    level: float = 0.05,
) -> pd.DataFrame:
    """One row per contrast: the first configuration's number minus the second's, seed by seed.

    All contrasts of a call are one family for Holm's correction, so a call should hold exactly
    those that were named before the results were seen. ``tables.readable`` shows the table.

    Args:
        results: the runs.
        pairs: the name of each contrast and its two configurations, each by its strategy's name or
            by settings such as ``{"strategy": "recall", "sparsity": 0.01}``.
        column: one of ``frames.COLUMNS``.
        margin: the largest difference, in points, that counts as none; set beforehand.
        level: the error rate of the family.

    Returns:
        Columns ``contrast``; ``seeds``; ``difference`` and the half width of its 95 % interval;
        ``p`` (two-sided), ``p_holm`` and ``different``. With a margin also ``p_equivalence``, of
        two one-sided tests; ``p_equivalence_holm`` and ``equivalent``.

    Raises:
        ResultError: a choice is not clear, or a contrast has fewer than two pairs.
    """
    import pandas as pd

    if margin is not None and not margin > 0:
        raise ValueError(f"the margin must be above 0 points, got {margin!r}")
    runs, rows = frame(results), []
    for name, (one, other) in pairs.items():
        paired = chosen_pairs(runs, one, other)
        differences = (paired[column] - paired[f"{column}{OTHER}"]).dropna().tolist()
        if len(differences) < 2:
            raise ResultError(f"the contrast {name!r} has {len(differences)} pair: it needs two")
        mean, half = mean_interval(differences)
        own = {"contrast": name, "seeds": len(differences), "difference": mean}
        own |= {"difference_interval": half, "p": paired_p(differences)}
        rows.append(own | ({"p_equivalence": tost(differences, margin)} if margin else {}))
    table = pd.DataFrame(rows)
    table.insert(table.columns.get_loc("p") + 1, "p_holm", holm(table["p"]))
    table.insert(table.columns.get_loc("p_holm") + 1, "different", table["p_holm"] < level)
    if margin:
        table["p_equivalence_holm"] = holm(table["p_equivalence"])
        table["equivalent"] = table["p_equivalence_holm"] < level
    return table


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of the paired t-test: that the mean difference is zero."""
    return min(1.0, 2 * student_tail(abs(_t(differences, 0.0)), len(differences) - 1))


def tost(differences: Sequence[float], margin: float) -> float:
    """P-value of two one-sided t-tests: that the mean difference is ``margin`` or more from zero.

    Schuirmann 1987. Below 0.05 exactly where the 90 % interval lies within the margins.
    """
    degrees = len(differences) - 1
    above, below = student_tail(_t(differences, -margin), degrees), _t(differences, margin)
    return max(above, student_tail(-below, degrees))


def holm(p: Iterable[float]) -> list[float]:
    """P-values corrected for their number, in their order; Holm 1979, step down."""
    values = np.array([*p], dtype=np.float64)
    order = np.argsort(values, kind="stable")
    steps = np.minimum(1, values[order] * np.arange(len(values), 0, -1))
    corrected = np.empty_like(values)
    corrected[order] = np.maximum.accumulate(steps)
    return corrected.tolist()


def mcnemar_p(first: int, second: int) -> float:
    """Mid-p of McNemar's test, of counts of texts that only one of two models has right.

    The exact binomial p-value less half the probability of the outcome on each side, which is less
    conservative: Fagerland, Lydersen & Laake 2013. 1 where the models agree on every text.
    """
    texts, fewer = first + second, min(first, second)
    ways = [math.comb(texts, count) for count in range(fewer + 1)]
    return (2 * sum(ways) - ways[-1]) / 2**texts


def _t(differences: Sequence[float], centre: float) -> float:
    """Student's statistic of a mean less ``centre``; infinite where all are equal."""
    sample = np.array(differences, dtype=np.float64)
    distance, spread = float(sample.mean()) - centre, float(sample.std(ddof=1))
    if spread == 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / (spread / math.sqrt(sample.size))
