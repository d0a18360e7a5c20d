"""A comparison in brief: a table of five columns, and two sentences that the numbers decide."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING

from bitstack_nb.figures.methods import method
from bitstack_nb.figures.report import summary
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

    Seeds that one of the compared methods lacks are left out. So is a method with several
    configurations, or without a partner on the same seeds.
    """
    results = list(results)
    bounds = {"single": ["average_accuracy"], "probe": ["average_accuracy"]}
    sentences = (
        _sentence(results, "bitstack", {"finetune": ["forgetting", "average_accuracy"]}),
        _sentence(results, "recall", bounds),
    )
    return list(filter(None, sentences))


def _sentence(results: list[Result], strategy: str, against: dict[str, list[str]]) -> str | None:
    """One method compared with others by some metrics."""
    runs = {name: [r for r in results if r.protocol["strategy"] == name] for name in against}
    runs = {name: found for name, found in runs.items() if found}
    own = [r for r in results if r.protocol["strategy"] == strategy]
    shared = set.intersection(*({r.protocol["seed"] for r in f} for f in (own, *runs.values())))
    own, *others = ([r for r in f if r.protocol["seed"] in shared] for f in (own, *runs.values()))
    clauses = [
        clause
        for name, found in zip(runs, others, strict=True)
        for clause in _clauses([*own, *found], name, against[name])
    ]
    if not clauses:
        return None
    if not any("forgetting" in metrics for metrics in against.values()):
        clauses.insert(0, _forgets(own))
    seeds = f"On seed {min(shared)} alone" if len(shared) == 1 else f"Over {len(shared)} seeds"
    return f"{seeds}, {method(strategy).label} {_joined(clauses)}."


def _clauses(results: list[Result], baseline: str, metrics: list[str]) -> list[str]:
    """Comparisons of one strategy with the baseline, by metric; none if it has no pairs."""
    try:
        table = paired_table(results, baseline)
    except ResultError:
        return []
    if len(table) > 1:
        return []
    row = table.iloc[0]
    return [_clause(name, row[name], row[f"{name}_interval"], baseline) for name in metrics]


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


def _forgets(results: list[Result]) -> str:
    values = [result.metrics["forgetting"] for result in results]
    mean = sum(values) / len(values)
    return f"forgets {f'{mean:.1f} points' if any(values) else 'nothing'}"


def _joined(clauses: list[str]) -> str:
    """Clauses as a list in prose, which says the verb once where it is the same."""
    short = [
        now.removeprefix("ends ") if now.startswith("ends ") and before.startswith("ends ") else now
        for before, now in pairwise(["", *clauses])
    ]
    return " and ".join(filter(None, [", ".join(short[:-1]), short[-1]]))
