"""Figures of accuracy, forgetting and storage. Each function returns a Figure.

Means over seeds come with 95 % Student intervals (``results.metrics.mean_interval``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, MaxNLocator

from bitstack_nb.benchmark.drift import KINDS, STATES
from bitstack_nb.figures.methods import (
    Group,
    counted,
    grouped,
    labels,
    method,
    shared_task_names,
    titled,
)
from bitstack_nb.figures.style import GREY, Figure, colour_bar, heatmap, note, panels, styled
from bitstack_nb.results import frame, task_frame
from bitstack_nb.results.frames import COLUMNS, averages
from bitstack_nb.results.metrics import accuracy_matrix, mean_interval
from bitstack_nb.results.pairs import METRICS, OTHER, no_pairs, pairs
from bitstack_nb.results.result import Result, ResultError

_BYTES = EngFormatter(unit="B", places=0)  # 100 kB
_RUN = ["configuration", "seed", "order"]


@styled
def accuracy_matrices(results: Iterable[Result]) -> Figure:
    """The accuracy on each task after each training task, in %: a panel per configuration.

    Averaged over seeds; blank where a run did not measure. Configurations without a matrix
    (published ones) are left out; raises ResultError if that leaves none.
    """
    groups = [g for g in grouped(frame(results)) if all(r.matrix is not None for r in g.results)]
    if not groups:
        raise ResultError("no result has an accuracy matrix: give measured ones")
    tasks = [shared_task_names(group.results) for group in groups]
    many = max(map(len, tasks)) > 10
    columns = 2 if many else 3
    figure, axes = panels(len(groups), columns, above=1.2, each=4.2 if many else 2.8)
    for at, (group, ax) in enumerate(zip(groups, axes, strict=True)):
        mean = np.mean([accuracy_matrix(r.matrix) for r in group.results], axis=0)
        # Labels are left out where the panel to the left, or the one below, has the same.
        left = at % columns == 0 or tasks[at - 1] != tasks[at]
        below = tasks[at] not in tasks[at + columns : at + columns + 1]
        percent = pd.DataFrame(mean, index=tasks[at], columns=tasks[at])
        heatmap(ax, percent, rows=left, columns=below)
        ax.set_title(counted(group.label, [len(group.results)]))
        ax.set_ylabel("after training" if at % columns == 0 else "")
        ax.set_xlabel("accuracy on" if at + columns >= len(groups) else "")
    colour_bar(figure, axes, "accuracy (%)", shrink=0.6, aspect=30)
    title = "Accuracy on every task after every task, mean over n seeds"
    figure.suptitle(titled(title, _members(groups)))
    return figure


@styled
def forgetting_per_task(results: Iterable[Result]) -> Figure:
    """Points lost on each task between learning it and the end: a panel per task.

    Tasks in training order, without the last, which nothing follows. Configurations that do not
    measure it (joint training, published ones) are left out; raises ResultError if that leaves
    none.
    """
    results = list(results)
    lost = task_frame(results).groupby(_RUN).head(-1)
    lost = lost.assign(lost=lost["learnt"] - lost["final"])
    title = "Forgetting per task: accuracy after learning it − after the last task"
    names = list(lost["task"].unique())
    points = lost.pivot(index=_RUN, columns="task", values="lost").reset_index()
    quantities = {name: (name, "points lost") for name in names}
    groups = grouped(frame(results))
    return dots(title, groups, points, quantities, zero=True, same_scale=True)


@styled
def comparison(results: Iterable[Result]) -> Figure:
    """Average accuracy, learning accuracy and forgetting of every configuration.

    Published numbers are hollow diamonds. Raises ResultError where no result has any of the three.
    """
    runs = frame(results)
    units = {
        "average_accuracy": "% after the last task\nhigher is better",
        "learning_accuracy": "% right after each task\nhigher is better",
        "forgetting": "points lost\nlower is better",
    }
    quantities = {name: (COLUMNS[name], unit) for name, unit in units.items()}
    return dots("Accuracy and forgetting", grouped(runs), runs, quantities)


@styled
def paired_differences(results: Iterable[Result], baseline: str = "finetune") -> Figure:
    """The three metrics of every configuration less the baseline's, seed by seed, in points.

    Pairs are those of ``results.pairs.pairs``; raises ResultError where there is none.
    """
    runs = frame(results)
    minus = _differences(runs, [*METRICS], baseline)
    quantities = {
        name: (COLUMNS[name], f"difference (points)\n{'higher' if more else 'lower'} is better")
        for name, more in METRICS.items()
    }
    title = f"Difference to {method(baseline).label}, the same seeds paired"
    return dots(title, grouped(runs), minus, quantities, zero=True)


@styled
def task_differences(results: Iterable[Result], baseline: str = "single") -> Figure:
    """The accuracy on each task after the last one, less the baseline's, seed by seed, in points.

    Tasks in the order of the lowest seed. Pairs are those of ``results.pairs.pairs``; raises
    ResultError where there is none.
    """
    results = list(results)
    runs, tasks = frame(results), task_frame(results)
    final = tasks.pivot(index=_RUN, columns="task", values="final").add_prefix("final ")
    quantities = {f"final {name}": (name, "points") for name in tasks["task"].unique()}
    minus = _differences(runs.join(final, on=_RUN), [*quantities], baseline)
    title = "Accuracy on each task at the end, difference to {}, the same seeds paired"
    title = title.format(method(baseline).label)
    parts = [name for name in tasks["task"].unique() if re.search(r"_\d+-\d+$", name)]
    remark = (
        f"\n{parts[0]}: these two labels of {parts[0].rpartition('_')[0]} alone" if parts else ""
    )
    return dots(title, grouped(runs), minus, quantities, zero=True, same_scale=True, remark=remark)


def _differences(runs: pd.DataFrame, columns: Sequence[str], baseline: str) -> pd.DataFrame:
    """Columns of each run less those of the baseline's run that it is paired with."""
    paired = pairs(runs, baseline)
    minus = {name: paired[name] - paired[f"{name}{OTHER}"] for name in columns}
    found = paired[["configuration"]].assign(**minus)
    if found[list(columns)].isna().all(axis=None):
        raise no_pairs(baseline)
    return found


@styled
def accuracy_for_storage(results: Iterable[Result], *, best: bool = False) -> Figure:
    """Average accuracy after the last task against the storage per task, a point each.

    Storage is the bytes beside one backbone and the heads (``Result.storage``), on a logarithmic
    scale. Methods that store nothing are at its left edge. Sparsities or ranks stand above the
    points of a method that has several.

    Args:
        results: the runs.
        best: show the bytes of each method's smallest usual form: values in bf16, positions packed.

    Raises:
        ResultError: no run has recorded any, or with ``best``, a run has not recorded that.
    """
    runs = frame(results)
    runs["bytes_per_task"] = [_bytes_per_task(result, best=best) for result in runs["result"]]
    columns = ["bytes_per_task", "average_accuracy"]
    runs = runs.astype(dict.fromkeys(columns, float))
    groups = [g for g in grouped(runs) if g.runs[columns].notna().any().all()]
    if not groups:
        raise ResultError("no result has recorded its storage: run it again")
    points = averages(pd.concat(g.runs for g in groups), columns).loc[[g.key for g in groups]]
    sizes = points["bytes_per_task"].to_numpy()
    smallest = min(sizes[sizes > 0], default=1000.0)
    places = _side_by_side(np.where(sizes > 0, sizes, smallest / 10))
    means, halves = (
        points[name].fillna(0).to_numpy()
        for name in ("average_accuracy", "average_accuracy_interval")
    )
    figure = Figure(5.2)
    ax = figure.subplots()
    variants = _by_variant(groups)
    above = True  # sizes of one variant stand above its points, those of the next one below
    for label, own in variants.items():
        several, size = len(own) > 1, _size(groups[own[0]])
        if size and not several and size not in label:
            label += f", {size}"
        look = {"color": groups[own[0]].colour, "marker": groups[own[0]].marker}
        look |= {"ls": ":" if several else "", "markersize": 8, "capsize": 4}
        ax.errorbar(places[own], means[own], halves[own], label=label, **look)
        if several:
            for at, (side, flipped) in zip(own, _sides(places[own], places), strict=True):
                over = above != flipped
                end = means[at] + halves[at] if over else means[at] - halves[at]
                _name_size(ax, groups[at], (places[at], end), above=over, side=side)
            above = not above
    _set_storage_scale(ax, smallest, nothing=bool((sizes == 0).any()))
    form = "\n(smallest usual form: values in bf16, positions packed)" if best else ""
    ax.set_xlabel(f"storage per task, beside the backbone and the heads{form}")
    ax.set_ylabel("average accuracy at the end (%)")
    figure.legend(loc="outside right center", frameon=False)
    figure.suptitle(titled("Average accuracy against storage", _members(groups)))
    text = counted("95 % Student intervals", [len(group.runs) for group in groups])
    if best:
        text = f"accuracies were measured with float32 values; {text}"
    named = any("%" in text.get_text() for text in ax.texts)
    note(figure, f"percentages: sparsity; {text}" if named else text)
    return figure


def _bytes_per_task(result: Result, *, best: bool) -> float | None:
    """Stored bytes per task; None where none were recorded."""
    stored = result.storage.get("bytes")
    if best and stored:
        if "best_bytes" not in result.storage:
            name = method(result.protocol["strategy"]).label
            raise ResultError(f"a run of {name} has not recorded its smallest form: run it again")
        stored = result.storage["best_bytes"]
    return None if stored is None else stored / len(result.protocol["tasks"])


def _size(group: Group) -> str:
    """The setting that says how much a configuration stores, in words; empty where none does."""
    if (share := group.settings.get("sparsity")) is not None:
        return f"{100 * share:g} %"
    return "" if (rank := group.settings.get("rank")) is None else f"rank {rank:g}"


def _sides(own: np.ndarray, places: np.ndarray) -> list[tuple[str, bool]]:
    """For points close together: where their text begins or ends, and whether it changes ends.

    Close is a twentieth of the axis. The first text ends at its point, the last begins there, and
    those between stand at the other end of their intervals.
    """
    close = np.diff(np.log10(own)) < 0.05 * np.log10(places.max() / places.min())
    before, after = [False, *close], [*close, False]
    aligned = {(False, True): "right", (True, False): "left"}
    return [(aligned.get(pair, "center"), all(pair)) for pair in zip(before, after, strict=True)]


def _name_size(ax: Axes, group: Group, end: tuple[float, float], *, above: bool, side: str) -> None:
    """The sparsity or rank of a point at the upper or the lower end of its interval."""
    text = ax.annotate(
        _size(group),
        end,
        xytext=(0, 5 if above else -5),
        textcoords="offset points",
        ha=side,
        va="bottom" if above else "top",
        size=9,
        color=group.colour,
        zorder=2.05,  # over the intervals of other points, under their markers
    )
    text.set_path_effects([withStroke(linewidth=3, foreground="white")])


def _set_storage_scale(ax: Axes, smallest: float, *, nothing: bool) -> None:
    """A logarithmic scale in bytes. No storage has a tick at a tenth of the smallest one."""
    ax.set_xscale("log")
    ax.margins(x=0.08, y=0.1)  # room for the sparsity above the highest
    largest = ax.get_xlim()[1]
    ticks = {smallest / 10: "no storage"} if nothing else {}
    if nothing:  # the scale begins to the right of this line
        ax.axvline(smallest / 10**0.5, color=GREY, linewidth=1, linestyle=":")
    decades = 10.0 ** np.arange(math.floor(math.log10(smallest)), math.log10(largest))
    ticks |= {size: _BYTES(size) for size in decades if size > smallest / 4}
    ax.set_xticks(list(ticks), list(ticks.values()))
    ax.set_xticks([], minor=True)


def _by_variant(groups: Sequence[Group]) -> dict[str, list[int]]:
    """The places of groups of one method, budget and importance, by what tells these apart.

    Groups that then have the same sparsity or rank keep their full labels.
    """
    names = ("strategy", "budget", "importance")
    short = labels([{name: g.settings.get(name) for name in names} for g in groups])
    points = [(label, _size(g)) for label, g in zip(short, groups, strict=True)]
    found: dict[str, list[int]] = {}
    for at, (group, point) in enumerate(zip(groups, points, strict=True)):
        label = point[0] if points.count(point) == 1 else group.label
        found.setdefault(label, []).append(at)
    return found


def _side_by_side(places: np.ndarray) -> np.ndarray:
    """Places on a logarithmic axis, points at the same place moved apart."""
    moved = places.copy()
    for place in np.unique(places):
        same = np.flatnonzero(places == place)
        moved[same] *= 1.12 ** (np.arange(len(same)) - (len(same) - 1) / 2)
    return moved


@styled
def drift_attribution(results: Iterable[Result]) -> Figure:
    """Points of task 1's accuracy that return when weights are put back to where task 1 left them.

    A panel for all weights, which is all that task 1 has lost, and one per group of weights: those
    of ``benchmark.drift``. Configurations without drift are left out; raises ResultError if that
    leaves none.
    """
    runs = frame(results)
    returned = [_returned(result) for result in runs["result"]]
    if not any(returned):
        raise ResultError("no result has recorded its drift: give runs of strategies that drift")
    values = runs[["configuration"]].join(pd.DataFrame(returned))
    names = {"all": "all weights", "other": "other (a pooler)"}
    shown = [name for name in ("all", *KINDS, *STATES) if name in values]
    quantities = {name: (names.get(name, name), "points that return") for name in shown}
    title = "Which weights hold the forgetting? Task 1, with one group of weights put back"
    return dots(title, grouped(runs), values, quantities, zero=True, same_scale=True)


def _returned(result: Result) -> dict[str, float]:
    """Points of task 1 that return, by group of weights."""
    if not result.drift:
        return {}
    own = {name: put_back["accuracy"] for name, put_back in result.drift.items()}
    return {k: v - result.matrix[-1][0] for k, v in {"all": result.matrix[0][0], **own}.items()}


# Dots: a row per configuration, a panel per quantity ----------------------------------------------


def dots(
    title: str,
    groups: Sequence[Group],
    values: pd.DataFrame,
    quantities: Mapping[str, tuple[str, str]],
    *,
    zero: bool = False,
    same_scale: bool = False,
    remark: str = "",
) -> Figure:
    """A figure with a row per group that has any number, and a panel per quantity.

    Args:
        title: of the figure.
        groups: in order.
        values: a row per run; ``configuration`` is the key of its group.
        quantities: column of ``values`` -> title and unit of its panel.
        zero: whether it is marked.
        same_scale: for quantities in one unit.
        remark: added to the note below it.

    Raises:
        ResultError: no group has a number.
    """
    columns = list(quantities)
    counts = values.groupby("configuration")[columns].count()
    groups = [g for g in groups if g.key in counts.index and counts.loc[g.key].any()]
    if not groups:
        raise ResultError(f"no result has the numbers of this figure ({title})")
    names = [counted(g.label, counts.loc[g.key][counts.loc[g.key] > 0]) for g in groups]
    each = 0.6 + 0.16 * len(names) * (max(name.count("\n") for name in names) + 1.6)
    beside = 5
    figure, axes = panels(
        len(columns), beside, above=0.9, each=each, sharex=same_scale, sharey=True
    )
    for place, (ax, column) in enumerate(zip(axes, columns, strict=True)):
        for row, group in enumerate(groups):
            own = values.loc[values["configuration"] == group.key, column].dropna()
            if len(own):
                _draw_dots(ax, row, group, own.tolist())
        if zero:
            ax.axvline(0, color=GREY, linewidth=1)
        heading, unit = quantities[column]
        ax.set_title(heading)
        if place + beside >= len(columns) or not same_scale:
            ax.set_xlabel(unit)
            ax.tick_params("x", labelbottom=True)
        _set_scale(ax, values[columns if same_scale else [column]], 5 if len(columns) > 3 else 6)
        ax.grid(visible=False, axis="y")
    axes[0].set_yticks(range(len(groups)), names)
    axes[0].set_ylim(len(groups) - 0.4, -0.6)
    figure.suptitle(titled(title, _members(groups)))
    seeds = counts.loc[[g.key for g in groups]].max(axis=None)
    interval = "mean and 95 % Student interval over n seeds (3 or more); small dots: single seeds"
    note(figure, f"{interval if seeds > 1 else 'one seed, so no intervals'}{remark}")
    return figure


def _set_scale(ax: Axes, values: pd.DataFrame, ticks: int) -> None:
    """Few round ticks; where all values are zero, a scale of points and not of rounding errors."""
    zeros = not values.fillna(0).any(axis=None)
    if zeros:
        ax.set_xlim(-1, 1)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=2 if zeros else ticks, steps=[1, 2, 5, 10]))


def _draw_dots(ax: Axes, row: int, group: Group, values: Sequence[float]) -> None:
    """One mean with its interval, and the single seeds below it.

    The interval of two seeds is left out: no other could be read on its scale.
    """
    mean, half = mean_interval(values)
    ax.errorbar(
        [mean],
        [row],
        xerr=[half] if len(values) > 2 else None,
        fmt=group.marker,
        color=group.colour,
        markerfacecolor="white" if group.marker == "D" else group.colour,
        markersize=7,
        capsize=4,
    )
    if half is not None:
        ax.plot(values, [row + 0.25] * len(values), "o", color=group.colour, ms=4, mfc="none")


def _members(groups: Iterable[Group]) -> list[Result]:
    return [result for group in groups for result in group.results]
