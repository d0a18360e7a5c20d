"""A comparison in brief: a table of five columns, and two sentences that the numbers decide."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING

from bitstack_nb.figures.methods import method
from bitstack_nb.figures.report import summary
from bitstack_nb.results.frames import frame
from bitstack_nb.results.pairs import paired_table
from bitstack_nb.results.result import Result, ResultError

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = (
    *("method", "average_accuracy", "forgetting"),
    *("storage_per_task", "minus_separate_models"),
)


def brief(results: Iterable[Result]) -> pd.DataFrame:
    """``summary`` with at most five columns; ``results.readable`` shows it."""
    found = summary(results)
    return found[[name for name in found if name.removesuffix("_interval") in _COLUMNS]]


def conclusions(results: Iterable[Result]) -> list[str]:
    """Up to two sentences: BitStack against fine-tuning, and exact recall against the bounds.

    A method with several configurations, or without a partner on the same seeds, is left out.
    """
    results = list(results)
    first = _clauses(results, "bitstack", {"finetune": ("forgetting", "average_accuracy")})
    bounds = {"single": ("average_accuracy",), "probe": ("average_accuracy",)}
    second = _clauses(results, "recall", bounds)
    if second:
        second = [_forgets(results, "recall"), *second]
    return [
        f"{_seeds(results)}, {method(name).label} {_joined(clauses)}."
        for name, clauses in (("bitstack", first), ("recall", second))
        if clauses
    ]


def _clauses(
    results: list[Result], strategy: str, against: dict[str, tuple[str, ...]]
) -> list[str]:
    """Comparisons of one strategy with others, by metric."""
    found = []
    for baseline, metrics in against.items():
        own = [r for r in results if r.protocol["strategy"] in (strategy, baseline)]
        try:
            table = paired_table(own, baseline)
        except ResultError:  # no pairs
            continue
        if len(table) == 1:
            row = table.iloc[0]
            found += [_clause(m, row[m], row[f"{m}_interval"], baseline) for m in metrics]
    return found


def _clause(metric: str, mean: float, half: float, baseline: str) -> str:
    """A difference in words, which its sign and its interval choose; half is NaN for one seed."""
    forgets = metric == "forgetting"
    other = f"{'the ' if baseline == 'probe' else ''}{method(baseline).label}"
    if f"{abs(mean):.1f}" == "0.0" and not half > 0.05:
        return f"forgets as much as {other}" if forgets else f"ends level with {other}"
    words = ("less than", "more than") if forgets else ("below", "above")
    number = f"{abs(mean):.1f}" if math.isnan(half) else f"{abs(mean):.1f} ± {half:.1f}"
    left_open = " (not settled)" if half >= abs(mean) else ""
    verb = "forgets" if forgets else "ends"
    return f"{verb} {number} points {words[int(mean > 0)]} {other}{left_open}"


def _forgets(results: list[Result], strategy: str) -> str:
    values = [r.metrics["forgetting"] for r in results if r.protocol["strategy"] == strategy]
    mean = sum(values) / len(values)
    return f"forgets {f'{mean:.1f} points' if any(values) else 'nothing'}"


def _seeds(results: list[Result]) -> str:
    seeds = frame(results)["seed"].unique()
    return f"On seed {seeds[0]} alone" if len(seeds) == 1 else f"Over {len(seeds)} seeds"


def _joined(clauses: list[str]) -> str:
    """Clauses as a list in prose, which says the verb once where it is the same."""
    short = [
        now.removeprefix("ends ") if now.startswith("ends ") and before.startswith("ends ") else now
        for before, now in pairwise(["", *clauses])
    ]
    return " and ".join(filter(None, [", ".join(short[:-1]), short[-1]]))
