"""Two strategies on the same seeds: differences run by run, with intervals and a verdict in words.

A seed draws the samples, which differ more than strategies do. So a strategy is compared with the
baseline seed by seed, and the differences are averaged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bitstack_nb.results.frames import averages, frame, task_frame
from bitstack_nb.results.metrics import forward_transfer
from bitstack_nb.results.result import Result, ResultError
from bitstack_nb.results.tables import shown

if TYPE_CHECKING:
    import pandas as pd

# Column -> whether more of it is better.
METRICS = {"average_accuracy": True, "learning_accuracy": True, "forgetting": False}
# Settings that may have been tuned for each strategy by itself.
_TUNED = ("warmup_steps", "learning_rate", "head_learning_rate")
# Strategies whose protocol leaves ``head_steps`` out where there are none.
_HEAD_STEPS = (
    *("finetune", "bitstack", "bitstack-strict", "random-mask", "magnitude-mask"),
    *("frozen", "ewc", "replay", "lora", "single", "shira", "bitfit", "bitdelta", "delta-rank8"),
)
OTHER = "_other"
# A strategy's name, or settings of a protocol that tell one configuration from the others.
Choice = str | Mapping[str, Any]
_DRAW = ["seed", "order"]


def pairs(runs: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Each run of ``frames.frame`` beside the baseline strategy's run that it is compared with.

    That run, its partner, has the same seed, order of the tasks and settings; its columns end with
    ``_other``. Settings that one of the two strategies does not have are no difference. Warm-up and
    learning rates have to be equal where the baseline was run at several. Where all of its
    comparable runs have the same, they were tuned for it and may be others than the run's. Runs
    without a partner, and those of the baseline, are left out.
    """
    import pandas as pd

    settings = {text: _settings(text) for text in runs["configuration"].unique()}
    known = {
        name: {key for text in own["configuration"].unique() for key in settings[text]}
        for name, own in runs.groupby("strategy")
    }
    others = runs[runs["strategy"] == baseline]
    found = []
    for text, own in runs[runs["strategy"] != baseline].groupby("configuration"):
        alike = {
            other: settings[other]
            for other in others["configuration"].unique()
            if _alike(settings[text], settings[other], known)
        }
        for tuned in (_warm_up, _rates):
            if len({*map(tuned, alike.values())}) > 1:
                alike = {k: v for k, v in alike.items() if tuned(v) == tuned(settings[text])}
        partners = others[others["configuration"].isin(alike)].drop_duplicates(_DRAW)
        found.append(own.merge(partners, on=_DRAW, suffixes=("", OTHER)))
    return pd.concat(found or [runs[:0].merge(runs[:0], on=_DRAW, suffixes=("", OTHER))])


def _settings(configuration: str) -> dict[str, Any]:
    """A configuration's settings, also one that it has without naming it."""
    settings = json.loads(configuration)
    if settings["strategy"] in _HEAD_STEPS:
        settings.setdefault("head_steps", 0)
    return settings


def _alike(one: dict[str, Any], other: dict[str, Any], known: dict[str, set[str]]) -> bool:
    """Whether settings agree in all that both strategies have, but what is tuned."""
    both = known[one["strategy"]] & known[other["strategy"]]
    names = (both | {"published"}) - {"strategy", *_TUNED}
    return all(one.get(name) == other.get(name) for name in names)


def _warm_up(settings: dict[str, Any]) -> int | None:
    return settings.get("warmup_steps")


def _rates(settings: dict[str, Any]) -> tuple[float | None, float | None]:
    """The learning rates of the backbone and of the heads."""
    rate = settings.get("learning_rate")
    return rate, settings.get("head_learning_rate") or rate


def chosen(runs: pd.DataFrame, choice: Choice) -> pd.DataFrame:
    """The runs of ``frames.frame`` of the one configuration with a strategy's name, or settings.

    Raises ResultError where none has them, or several have.
    """
    wanted = {"strategy": choice} if isinstance(choice, str) else dict(choice)
    wanted = {"published": None} | wanted
    configurations = {text: _settings(text) for text in runs["configuration"].unique()}
    found = [t for t, own in configurations.items() if all(own.get(k) == wanted[k] for k in wanted)]
    if len(found) != 1:
        alike = [configurations[text] for text in found]
        differ = {k for own in alike for k in own if any(o.get(k) != own[k] for o in alike)}
        raise ResultError(
            f"{choice!r} chooses {len(found)} configurations: "
            + (f"name one of {sorted(differ)} too" if found else "no run has these settings")
        )
    return runs[runs["configuration"] == found[0]]


def chosen_pairs(runs: pd.DataFrame, one: Choice, other: Choice) -> pd.DataFrame:
    """The runs of one configuration beside those of another with the same seed and order.

    Columns are as in ``pairs``. Both need the same settings, but for tuned ones, those that only
    one of both has, and those that a choice names.

    Raises:
        ResultError: a choice is not clear, both differ in more, or there is no pair.
    """
    first, second = chosen(runs, one), chosen(runs, other)
    settings, others = (_settings(own["configuration"].iloc[0]) for own in (first, second))
    named = {name for choice in (one, other) if not isinstance(choice, str) for name in choice}
    compared = (settings.keys() & others.keys()) - {"strategy", *_TUNED, *named}
    if differ := sorted(name for name in compared if settings[name] != others[name]):
        raise ResultError(f"{one!r} and {other!r} differ in {differ}: name these where it is meant")
    paired = first.merge(second, on=_DRAW, suffixes=("", OTHER))
    if paired.empty:
        raise ResultError(f"{one!r} and {other!r} have no seed with the same order in common")
    return paired


def forward_transfers(results: Iterable[Result], baseline: str = "single") -> pd.DataFrame:
    """One row per configuration with partners: ``metrics.forward_transfer``, seed by seed.

    Columns: what ``tables.shown`` gives; ``seeds`` (pairs); ``forward_transfer`` in points and the
    half width of its 95 % Student interval.

    Raises:
        ResultError: no run has a partner.
    """
    runs = frame(results)
    paired = pairs(runs, baseline)
    both = zip(paired["result"], paired[f"result{OTHER}"], strict=True)
    values = [forward_transfer(own.matrix, other.matrix) for own, other in both]
    found = averages(paired.assign(forward_transfer=values), ["forward_transfer"])
    found.insert(0, "seeds", paired.groupby("configuration").size())
    found = found.dropna(subset="forward_transfer")
    if found.empty:
        raise no_pairs(baseline)
    return shown(runs).join(found, how="inner").reset_index(drop=True)


def mean_differences(paired: pd.DataFrame, columns: Collection[str]) -> pd.DataFrame:
    """``frames.averages`` of each run's numbers less its partner's, and ``seeds``, the pairs."""
    minus = paired[["configuration"]].assign(
        **{name: paired[name] - paired[f"{name}{OTHER}"] for name in columns}
    )
    counts = minus.groupby("configuration").count().max(axis="columns")
    found = averages(minus, columns)
    found.insert(0, "seeds", counts)
    return found[counts > 0]


def paired_table(results: Iterable[Result], baseline: str = "finetune") -> pd.DataFrame:
    """One row per configuration with partners: its differences to the baseline, seed by seed.

    Columns: what ``tables.shown`` gives; ``seeds`` (pairs); then each of METRICS in points and, as
    ``<column>_interval``, the half width of the 95 % Student interval, NaN for one pair.
    ``tables.readable`` shows it.

    Raises:
        ResultError: no run has a partner.
    """
    return _difference_table(frame(results), baseline, METRICS)


def paired_tasks(results: Iterable[Result], baseline: str = "single") -> pd.DataFrame:
    """As ``paired_table``, of the accuracy on each task after the last one: a column per task.

    Tasks are in the order of the lowest seed.
    """
    results = list(results)
    tasks, run = task_frame(results), ["configuration", "seed", "order"]
    final = tasks.pivot(index=run, columns="task", values="final").add_prefix("final ")
    names = [f"final {name}" for name in tasks["task"].unique()]
    found = _difference_table(frame(results).join(final, on=run), baseline, names)
    return found.rename(columns=lambda name: name.removeprefix("final "))


def _difference_table(runs: pd.DataFrame, baseline: str, columns: Collection[str]) -> pd.DataFrame:
    found = mean_differences(pairs(runs, baseline), columns)
    if found.empty:
        raise no_pairs(baseline)
    settings = shown(runs[runs.columns.difference(columns, sort=False)])
    return settings.join(found, how="inner").reset_index(drop=True)


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
        f"{column.replace('_', ' ')} {number} points over {pairs} paired "
        f"seed{'s' if pairs > 1 else ''} ({certainty})",
    )
