"""Figures of results: accuracy, forgetting, comparison. Each function returns a Figure.

Means over seeds come with 95 % Student intervals (``metrics.mean_interval``). What is locked where
is drawn by ``lock_plots``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from bitstack_nb.figures.style import (
    GREY,
    Figure,
    Group,
    counted,
    draw_shares,
    grouped,
    names,
    shared_task_names,
    styled,
    task_names,
    titled,
)
from bitstack_nb.results.metrics import accuracy_matrix, mean_interval
from bitstack_nb.results.metrics import forgetting_per_task as points_lost
from bitstack_nb.results.pairs import METRICS, differences, metric, no_pairs, with_partners
from bitstack_nb.results.result import Result, ResultError
from bitstack_nb.results.tables import COLUMNS

_UNITS = {"average_accuracy": "%", "learning_accuracy": "%", "forgetting": "points"}
_PANELS = 5  # side by side
_INTERVALS = "mean and 95 % Student interval over n seeds (3 or more); small dots: single seeds"


@styled
def accuracy_matrices(results: Iterable[Result]) -> Figure:
    """The accuracy on each task after each training task, in %: a panel per configuration.

    Averaged over seeds; blank where a run did not measure. Configurations without a matrix
    (published ones) are left out; raises ResultError if that leaves none.
    """
    groups = [g for g in grouped(results) if all(r.matrix is not None for r in g.results)]
    if not groups:
        raise ResultError("no result has an accuracy matrix: give measured ones")
    tasks = [shared_task_names(group.results) for group in groups]
    many = max(map(len, tasks)) > 10
    columns = min(2 if many else 3, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure = Figure(1.2 + (4.2 if many else 2.8) * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for at, (group, ax) in enumerate(zip(groups, axes, strict=False)):
        mean = np.mean([accuracy_matrix(r.matrix) for r in group.results], axis=0)
        # Not where the panel to the left, or the one below, has the same.
        left = at % columns == 0 or tasks[at - 1] != tasks[at]
        below = tasks[at] not in tasks[at + columns : at + columns + 1]
        draw_shares(
            ax, mean, rows=tasks[at] if left else None, columns=tasks[at] if below else None
        )
        ax.tick_params("x", rotation=90 if many else 45)
        ax.set_title(counted(group.label, [len(group.results)]))
        ax.set_ylabel("after training" if at % columns == 0 else "")
        ax.set_xlabel("accuracy on" if at + columns >= len(groups) else "")
    for ax in axes[len(groups) :]:
        ax.remove()
    drawn = axes[: len(groups)]
    bar = figure.colorbar(drawn[0].collections[0], ax=drawn.tolist(), shrink=0.6, aspect=30)
    bar.set_label("accuracy (%)")
    members = [r for group in groups for r in group.results]
    figure.suptitle(titled("Accuracy on every task after every task, mean over n seeds", members))
    return figure


@styled
def forgetting_per_task(results: Iterable[Result]) -> Figure:
    """Points lost on each task between learning it and the end: a panel per task.

    Tasks in training order, without the last, which nothing follows. Configurations that do not
    measure it (joint training, published ones) are left out; raises ResultError if that leaves
    none.
    """
    groups = grouped(results)
    tasks = dict.fromkeys(
        name
        for group in groups
        for result in group.results
        if result.matrix is not None
        for name in task_names(result)[:-1]
    )
    panels = [
        Panel(name, "points lost", [numbers(g.results, _lost_on(name)) for g in groups])
        for name in tasks
    ]
    title = "Forgetting per task: accuracy after learning it − after the last task"
    return dots(title, groups, panels, zero=True, same_scale=True)


@styled
def comparison(results: Iterable[Result]) -> Figure:
    """Average accuracy, learning accuracy and forgetting of every configuration.

    Published numbers are grey diamonds. Raises ResultError where no result has any of the three.
    """
    groups = grouped(results)
    panels = [
        Panel(COLUMNS[name], unit, [numbers(g.results, metric(name)) for g in groups])
        for name, unit in _UNITS.items()
    ]
    return dots("Accuracy and forgetting after all tasks", groups, panels)


@styled
def paired_differences(results: Iterable[Result], baseline: str = "finetune") -> Figure:
    """Every configuration less the baseline strategy, seed by seed, in points.

    Pairs are those of ``pairs.partner``. Raises ResultError where there is none.
    """
    panels = {}
    for name in _UNITS:
        better = "higher" if METRICS[name] else "lower"
        panels[COLUMNS[name]] = (f"difference (points)\n{better} is better", metric(name))
    return difference_dots("Difference to {}, the same seeds paired", results, panels, baseline)


def difference_dots(
    title: str,
    results: Iterable[Result],
    panels: Mapping[str, tuple[str, Callable[[Result], float | None]]],
    baseline: str,
    *,
    same_scale: bool = False,
) -> Figure:
    """``dots`` of every configuration less the baseline strategy, seed by seed.

    Args:
        title: with ``{}`` for the baseline's name.
        results: all runs, the baseline's too.
        panels: a panel's title -> its unit, and what of a run it is about.
        baseline: a strategy.
        same_scale: of ``dots``.

    Raises ResultError where no run has a partner.
    """
    results = list(results)
    groups = [g for g in grouped(results) if g.settings["strategy"] != baseline]
    pairs = [with_partners(g.results, results, baseline=baseline) for g in groups]
    drawn = [
        Panel(name, unit, [differences(own, value) for own in pairs])
        for name, (unit, value) in panels.items()
    ]
    if not any(values for panel in drawn for values in panel.values):
        raise no_pairs(baseline)
    what = names([{"strategy": baseline, "budget": None}])[0]
    return dots(title.format(what), groups, drawn, zero=True, same_scale=same_scale)


# Dots: a row per configuration, a panel per quantity ----------------------------------------------


class Panel(NamedTuple):
    """A quantity that ``dots`` draws."""

    title: str
    unit: str
    values: list[list[float]]  # per group, per seed; empty where not measured


def dots(
    title: str,
    groups: list[Group],
    panels: list[Panel],
    *,
    zero: bool = False,
    same_scale: bool = False,
) -> Figure:
    """A figure with a row per group that has anything to draw, and a panel per quantity.

    ``zero`` marks it; ``same_scale`` is for quantities in one unit. Raises ResultError where no
    group has anything.
    """
    kept = [at for at in range(len(groups)) if any(panel.values[at] for panel in panels)]
    if not kept:
        raise ResultError(f"no result has what is drawn here ({title})")
    labels = []
    for at in kept:
        seeds = [len(panel.values[at]) for panel in panels if panel.values[at]]
        labels.append(counted(groups[at].label, seeds))
    lines = sum(label.count("\n") + 1.6 for label in labels)
    columns = min(_PANELS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(0.9 + (0.6 + 0.16 * lines) * rows)
    axes = figure.subplots(rows, columns, sharex=same_scale, sharey=True, squeeze=False).ravel()
    ticks = 6 if columns < 4 else 5  # numbers of two digits and a sign, side by side
    for place, (ax, panel) in enumerate(zip(axes, panels, strict=False)):
        for row, at in enumerate(kept):
            if panel.values[at]:
                draw_dots(ax, row, groups[at], panel.values[at])
        if zero:
            ax.axvline(0, color=GREY, linewidth=1)
        ax.set_title(panel.title)
        if place + columns >= len(panels) or not same_scale:
            ax.set_xlabel(panel.unit)
            ax.tick_params("x", labelbottom=True)
        _set_scale(ax, panels if same_scale else [panel], ticks)
        ax.grid(visible=False, axis="y")
    for ax in axes[len(panels) :]:
        ax.remove()
    axes[0].set_yticks(range(len(kept)), labels)
    axes[0].set_ylim(len(kept) - 0.4, -0.6)
    figure.suptitle(titled(title, (r for at in kept for r in groups[at].results)))
    figure.supxlabel(_INTERVALS, fontsize=9, color=GREY)
    return figure


def _set_scale(ax: Axes, panels: list[Panel], ticks: int) -> None:
    """Few round ticks for what panels hold; around nothing but zeros, or rounding would show."""
    zeros = not any(any(values) for panel in panels for values in panel.values)
    if zeros:
        ax.set_xlim(-1, 1)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=2 if zeros else ticks, steps=[1, 2, 5, 10]))


def draw_dots(ax: Axes, row: int, group: Group, values: list[float]) -> None:
    """One mean with its interval, and the single seeds below it.

    No interval of two seeds: it is wider than any scale the others can be read on.
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


def numbers(results: list[Result], value: Callable[[Result], float | None]) -> list[float]:
    """A number per run, without those that have none."""
    return [number for result in results if (number := value(result)) is not None]


def _lost_on(task: str) -> Callable[[Result], float | None]:
    def lost(result: Result) -> float | None:
        order = task_names(result)[:-1]
        if result.matrix is None or task not in order:
            return None
        points = float(points_lost(result.matrix)[order.index(task)])
        return None if math.isnan(points) else points

    return lost
