"""Figures of what a method is worth: per task, per byte, and where forgetting lives.

Each function returns a Figure; intervals are 95 % Student intervals over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes

from bitstack_nb.benchmark.drift import KINDS, STATES
from bitstack_nb.figures.accuracy import difference_dots, draw_dots, numbers
from bitstack_nb.figures.style import (
    GREY,
    Figure,
    Group,
    counted,
    grouped,
    styled,
    titled,
)
from bitstack_nb.results.metrics import mean_interval
from bitstack_nb.results.pairs import all_tasks, final_accuracy, metric
from bitstack_nb.results.result import Result, ResultError

_ROWS = {"other": "other (a pooler)"}


@styled
def task_differences(results: Iterable[Result], baseline: str = "single") -> Figure:
    """The accuracy on each task after the last one, less the baseline's, seed by seed, in points.

    Tasks in the order of the lowest seed. Pairs are those of ``pairs.partner``; raises
    ResultError where there is none.
    """
    results = list(results)
    panels = {task: ("points", final_accuracy(task)) for task in all_tasks(results)}
    title = "Accuracy on each task at the end, difference to {}, the same seeds paired"
    return difference_dots(title, results, panels, baseline, same_scale=True)


@styled
def accuracy_for_storage(results: Iterable[Result]) -> Figure:
    """Average accuracy after the last task against the bytes kept per task, a point each.

    Bytes are those beside one backbone and the heads (``Result.storage``), on a logarithmic scale
    with nothing at its left. Where sparsities tell a method's points apart, they stand above them.
    Raises ResultError where no run has recorded any.
    """
    groups = [
        g
        for g in grouped(results)
        if numbers(g.results, metric("storage_per_task"))
        and numbers(g.results, metric("average_accuracy"))
    ]
    if not groups:
        raise ResultError("no result has recorded what its tasks take: run it again")
    stored = [np.mean(numbers(g.results, metric("storage_per_task"))) for g in groups]
    smallest = min([size for size in stored if size > 0], default=1.0)
    places = np.array([size or smallest / 10 for size in stored])
    figure = Figure(5.2)
    ax = figure.subplots()
    short = _shortened(groups)
    labels = [group.label for group in short]
    several = {label for label in labels if labels.count(label) > 1}
    for place in np.unique(places):
        same = [short[at] for at in np.flatnonzero(places == place)]
        _draw_stored(ax, place, same, several)
    ax.set_xscale("log")
    ax.set_xlim(places.min() / 2, places.max() * 10)  # room for the last one's name
    ax.margins(y=0.1)  # room for what stands above the highest
    # Names are longer than points are wide, so neighbours are named together.
    order = np.argsort(places, kind="stable")
    steps = np.flatnonzero(np.diff(np.log(places[order])) > np.log(2)) + 1
    for near in np.split(order, steps):
        named = {short[at].label: short[at] for at in near}
        _name_stored(ax, places[near[-1]], list(named.values()))
    decades = 10.0 ** np.arange(np.floor(np.log10(smallest)), np.log10(places.max()) + 1)
    ticks = {smallest / 10: "nothing"} if 0 in stored else {}
    ticks |= {size: f"{size:,.10g}" for size in decades if size > smallest / 4}
    ax.set_xticks(list(ticks), list(ticks.values()))
    ax.set_xticks([], minor=True)
    ax.set_xlabel("kept per task beside the backbone (kB)")
    ax.set_ylabel("average accuracy at the end (%)")
    members = [r for group in groups for r in group.results]
    figure.suptitle(titled("What an accuracy costs in storage", members))
    text = counted("95 % Student intervals", [len(group.results) for group in groups])
    if several:
        text = f"above points: sparsity; {text}"
    figure.supxlabel(text, fontsize=9, color=GREY)
    return figure


def _shortened(groups: list[Group]) -> list[Group]:
    """Groups by their method's name alone, where no two of it have the same sparsity."""
    methods = [group.label.partition("\n")[0] for group in groups]
    points = [(m, g.settings.get("sparsity")) for m, g in zip(methods, groups, strict=True)]
    return [
        group._replace(label=point[0]) if points.count(point) == 1 else group
        for group, point in zip(groups, points, strict=True)
    ]


def _draw_stored(ax: Axes, place: float, groups: list[Group], several: set[str]) -> None:
    """Points that belong at one place, the lowest first, side by side around it.

    Those whose name several points have get their sparsity written above.
    """
    for shift, (accuracy, half, group) in zip(_shifts(len(groups)), _kept(groups), strict=True):
        ax.errorbar(
            [place * shift],
            [accuracy],
            yerr=None if half is None else [half],
            fmt=group.marker,
            color=group.colour,
            markersize=8,
            capsize=4,
        )
        if group.label in several:
            ax.annotate(
                f"{group.settings['sparsity']:g}",
                (place * shift, accuracy + (half or 0)),
                textcoords="offset points",
                xytext=(0, 6),
                ha="center",
                size=9,
                color=GREY,
            )


def _name_stored(ax: Axes, place: float, groups: list[Group]) -> None:
    """Names to the right of a place, apart from each other, with a mark each where several are."""
    found = _kept(groups)
    low, high = ax.get_ylim()
    line = (high - low) / 32  # of text
    gap = line * (1 + max(group.label.count("\n") for group in groups)) * 1.1
    heights = _spread([accuracy for accuracy, _, _ in found], gap)
    at = place * _shifts(len(groups))[-1] * 1.15
    for (_, _, group), height in zip(found, heights, strict=True):
        if len(groups) > 1:
            ax.plot([at], [height], group.marker, color=group.colour, markersize=4)
        ax.text(
            at * (1.12 if len(groups) > 1 else 1),
            height,
            group.label,
            va="center",
            size=9,
            color=GREY,
            linespacing=1.0,
        )


def _kept(groups: list[Group]) -> list[tuple[float, float | None, Group]]:
    """Mean accuracy, half width and group, ascending."""
    found = [(*mean_interval(numbers(g.results, metric("average_accuracy"))), g) for g in groups]
    return sorted(found, key=lambda point: point[0])


def _shifts(count: int) -> np.ndarray:
    """Factors that set points at one place of a logarithmic axis side by side."""
    return 1.12 ** (np.arange(count) - (count - 1) / 2)


def _spread(heights: list[float], gap: float) -> np.ndarray:
    """Ascending heights moved apart to at least ``gap``, their middle where it was."""
    spread = np.array(heights)
    for at in range(1, len(spread)):
        spread[at] = max(spread[at], spread[at - 1] + gap)
    return spread - (spread - heights).mean()


@styled
def drift_attribution(results: Iterable[Result]) -> Figure:
    """Points of task 1's accuracy that return when one group of weights is put back to task 1.

    A panel per configuration; the dashed line is all that task 1 has lost. Groups are those of
    ``drift``. Configurations without drift are left out; raises ResultError if that leaves none.
    """
    groups = [g for g in grouped(results) if any(r.drift for r in g.results)]
    if not groups:
        raise ResultError("no result has recorded its drift: give runs of strategies that drift")
    rows = [
        name
        for name in (*KINDS, *STATES)
        if any(name in r.drift for group in groups for r in group.results)
    ]
    columns = min(3, len(groups))
    height = math.ceil(len(groups) / columns)
    figure = Figure(1.0 + height * (0.9 + 0.27 * len(rows)))
    axes = figure.subplots(height, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for at, (group, ax) in enumerate(zip(groups, axes, strict=False)):
        _draw_drift(ax, group, rows)
        if at + columns >= len(groups):
            ax.set_xlabel("points that return")
            ax.tick_params("x", labelbottom=True)
    axes[0].set_yticks(range(len(rows)), [_ROWS.get(name, name) for name in rows])
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    for ax in axes[len(groups) :]:
        ax.remove()
    members = [r for group in groups for r in group.results]
    title = "Where forgetting lives: task 1's accuracy with one group of weights put back"
    figure.suptitle(titled(title, members))
    text = (
        "dashed: all that task 1 has lost (groups act together, so theirs need not add up to it); "
        "mean and 95 % Student interval over n seeds"
    )
    figure.supxlabel(text, fontsize=9, color=GREY)
    return figure


def _draw_drift(ax: Axes, group: Group, rows: list[str]) -> None:
    drifted = [result for result in group.results if result.drift]
    lost = np.mean([result.matrix[0][0] - result.matrix[-1][0] for result in drifted])
    ax.axvline(lost, color=GREY, linestyle="--", linewidth=1)
    ax.axvline(0, color=GREY, linewidth=1)
    for row, name in enumerate(rows):
        returned = [
            result.drift[name]["accuracy"] - result.matrix[-1][0]
            for result in drifted
            if name in result.drift
        ]
        if returned:
            draw_dots(ax, row, group, returned)
    # Above it the weights divided by what they are, below it by what a stack does with them.
    ax.axhline(sum(name in KINDS for name in rows) - 0.35, color=GREY, linewidth=0.5)
    ax.grid(visible=False, axis="y")
    ax.set_title(counted(group.label, [len(drifted)]))
