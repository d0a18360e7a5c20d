"""Two strategies on the same seeds: differences run by run, with intervals and a verdict in words.

Seeds differ more than strategies do (they draw the samples), so a strategy is compared with the
baseline seed by seed and the differences are averaged, not the two averages subtracted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitstack_nb.results.plain_json import canonical
from bitstack_nb.results.result import Result, ResultError
from bitstack_nb.results.tables import column_value, configurations, mean_and_half

if TYPE_CHECKING:
    import pandas as pd

# Column -> whether more of it is better.
METRICS = {"average_accuracy": True, "learning_accuracy": True, "forgetting": False}
_TUNED = ("warmup_steps", "learning_rate", "head_learning_rate")
_DRAW = ("seed", "tasks")


def partner(result: Result, results: Iterable[Result], strategy: str) -> Result | None:
    """The run of ``strategy`` on the same seed, order of the tasks and settings; None without one.

    Settings that one of the two strategies does not have are no difference. Warm-up and learning
    rates are one where the baseline was run at several: then they have to be equal. Where all of
    its runs (whatever their seeds) have the same, these were tuned for it, and may be others than
    those of ``result``.
    """
    alike = [other for other in results if _comparable(result, other, strategy)]
    for tuned in (_warm_up, _rates):
        if len({tuned(other) for other in alike}) > 1:
            alike = [other for other in alike if tuned(other) == tuned(result)]
    draw = [result.protocol.get(name) for name in _DRAW]
    return next((o for o in alike if [o.protocol.get(name) for name in _DRAW] == draw), None)


def _comparable(result: Result, other: Result, strategy: str) -> bool:
    """Whether a run is of the strategy, and agrees in all but _TUNED, seed and order of tasks."""
    if other.protocol["strategy"] != strategy:
        return False
    from bitstack_nb.benchmark.strategies import all_strategies

    known = all_strategies()
    names = (r.protocol["strategy"] for r in (result, other))
    own, others = ({*known[name].settings} if name in known else set() for name in names)
    left_out = {"strategy", *_TUNED, *_DRAW, *(own ^ others)}
    settings = [
        {k: v for k, v in r.protocol.items() if k not in left_out and v is not None}
        | {"tasks": sorted(map(canonical, r.protocol.get("tasks") or []))}
        | {"published": r.provenance.get("published")}
        for r in (result, other)
    ]
    return settings[0] == settings[1]


def _warm_up(result: Result) -> int | None:
    """The steps in which the rates rise, of every task."""
    return result.protocol.get("warmup_steps")


def _rates(result: Result) -> tuple[float | None, float | None]:
    """The learning rates of the backbone and of the heads."""
    rate = result.protocol.get("learning_rate")
    return rate, result.protocol.get("head_learning_rate") or rate


def with_partners(
    members: Iterable[Result], results: Iterable[Result], *, baseline: str
) -> list[tuple[Result, Result]]:
    """Runs, each with its partner of the baseline strategy; those without one are left out."""
    results = list(results)
    both = ((member, partner(member, results, baseline)) for member in members)
    return [(member, other) for member, other in both if other is not None]


def differences(
    pairs: Iterable[tuple[Result, Result]], value: Callable[[Result], float | None]
) -> list[float]:
    """A number of each run less that of its partner, where both have it; in points."""
    both = [(value(member), value(other)) for member, other in pairs]
    return [own - other for own, other in both if own is not None and other is not None]


def metric(column: str) -> Callable[[Result], float | None]:
    """One run's number for a column of ``tables.COLUMNS``; None where it has none."""
    return lambda result: column_value(result, column)


def final_accuracy(task: str) -> Callable[[Result], float | None]:
    """One run's accuracy (%) on a task after the last one; None where it does not have that."""

    def value(result: Result) -> float | None:
        names = [own["name"] for own in result.protocol.get("tasks") or []]
        measured = result.matrix is not None and task in names
        return result.matrix[-1][names.index(task)] if measured else None

    return value


def paired_table(results: Iterable[Result], baseline: str = "finetune") -> pd.DataFrame:
    """One row per configuration with partners: its differences to the baseline, seed by seed.

    Columns: what ``tables.configurations`` shows; ``seeds`` (pairs); then each of METRICS in
    points and, as ``<column>_interval``, the half width of the 95 % Student interval, NaN for one
    pair. ``tables.readable`` shows it.

    Raises:
        ResultError: no run has a partner.
    """
    return _paired(results, baseline, {column: metric(column) for column in METRICS})


def paired_tasks(results: Iterable[Result], baseline: str = "single") -> pd.DataFrame:
    """As ``paired_table``, of the accuracy on each task after the last one: a column per task.

    Tasks are in the order of the lowest seed.
    """
    results = list(results)
    return _paired(results, baseline, {name: final_accuracy(name) for name in all_tasks(results)})


def all_tasks(results: Iterable[Result]) -> list[str]:
    """The names of the tasks in results, each once, in the order of the lowest seed."""
    orders = [
        (result.protocol.get("seed") or 0, [task["name"] for task in result.protocol["tasks"]])
        for result in results
        if result.protocol.get("tasks")
    ]
    return list(dict.fromkeys(name for _, order in sorted(orders) for name in order))


def _paired(
    results: Iterable[Result], baseline: str, values: dict[str, Callable[[Result], float | None]]
) -> pd.DataFrame:
    import pandas as pd

    results = list(results)
    rows = []
    for item in configurations(results):
        pairs = with_partners(item.results, results, baseline=baseline)
        found = {column: differences(pairs, value) for column, value in values.items()}
        seeds = max(map(len, found.values()), default=0)
        if not seeds or item.shown["strategy"] == baseline:
            continue
        row = item.shown | {"seeds": seeds}
        for column, own in found.items():
            row[column], row[f"{column}_interval"] = mean_and_half(own)
        rows.append(row)
    if not rows:
        raise no_pairs(baseline)
    return pd.DataFrame(rows)


def no_pairs(baseline: str) -> ResultError:
    """The error where results hold no pair with the baseline."""
    return ResultError(
        f"nothing to pair: no run of {baseline!r} has the seed, tasks and settings of another "
        "strategy's run"
    )


@dataclass(frozen=True)
class Verdict:
    """What paired seeds say about one strategy and one metric.

    Attributes:
        better: whether the mean difference favours the strategy over the baseline.
        settled: whether the 95 % interval excludes zero; False with one pair.
        text: both in a sentence.
    """

    better: bool
    settled: bool
    text: str

    def __str__(self) -> str:
        return self.text


def verdict(
    results: Iterable[Result], column: str = "forgetting", *, baseline: str = "finetune"
) -> Verdict:
    """Judge the one strategy in ``results`` that is not the baseline.

    Raises:
        ResultError: there is no pair, or more than one configuration to judge.
    """
    frame = paired_table(results, baseline)
    if len(frame) > 1:
        raise ResultError(
            f"a verdict is about one configuration, got {len(frame)}: choose, or use paired_table"
        )
    row = frame.iloc[0]
    mean, half, pairs = row[column], row[f"{column}_interval"], int(row["seeds"])
    better = bool(mean > 0) == METRICS[column] and mean != 0
    settled = bool(abs(mean) > half)  # NaN, of one pair, settles nothing
    certainty = "the 95 % interval excludes zero" if settled else "not settled: "
    if not settled:
        certainty += "one seed has no interval" if pairs == 1 else "the 95 % interval includes zero"
    number = f"{mean:+.1f}" if math.isnan(half) else f"{mean:+.1f} ± {half:.1f}"
    return Verdict(
        better,
        settled,
        f"{column.replace('_', ' ')}, {row['strategy']} minus {baseline}: {number} points over "
        f"{pairs} paired seed{'s' if pairs > 1 else ''} ({certainty})",
    )
