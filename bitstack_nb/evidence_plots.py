"""Figures of what a method is worth: per task, per byte, and where forgetting lives.

Each function returns a Figure; intervals are 95 % Student intervals over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from bitstack_nb.drift import KINDS, STATES
from bitstack_nb.metrics import mean_interval
from bitstack_nb.pairs import all_tasks, final_accuracy, metric
from bitstack_nb.plot_style import (
    GREY,
    MARKERS,
    Figure,
    Group,
    counted,
    grouped,
    styled,
    titled,
)
from bitstack_nb.plots import difference_dots, draw_dots, numbers
from bitstack_nb.results import Result, ResultError


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
    with nothing at its left edge. Raises ResultError where no run has recorded any.
    """
    groups = [
        g
        for g in grouped(results)
        if numbers(g.results, metric("storage_per_task"))
        and numbers(g.results, metric("average_accuracy"))
    ]
    if not groups:
        raise ResultError("no result has recorded what its tasks take: run it again")
    figure = Figure(4.4 + 0.15 * len(groups))
    ax = figure.subplots()
    places = []
    for number, group in enumerate(groups):
        stored = np.mean(numbers(group.results, metric("storage_per_task")))
        accuracy, half = mean_interval(numbers(group.results, metric("average_accuracy")))
        ax.errorbar(
            [stored],
            [accuracy],
            yerr=None if half is None else [half],
            # Sparsities of one strategy have its colour.
            fmt=MARKERS[[g.colour for g in groups[:number]].count(group.colour) % len(MARKERS)],
            color=group.colour,
            markersize=8,
            capsize=4,
            label=counted(" ".join(group.label.split()), [len(group.results)]),
        )
        places.append(stored)
    # Below the smallest that is kept, so that no strategy is drawn on top of nothing.
    smallest = min([place for place in places if place > 0], default=1.0)
    ax.set_xscale("symlog", linthresh=smallest / 2, linscale=0.5)
    ax.set_xlim(-smallest / 8, 2.5 * max(places, default=1.0) + smallest)
    ax.set_xlabel("kept per task beside the backbone (kB)")
    ax.set_ylabel("average accuracy at the end (%)")
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    members = [r for group in groups for r in group.results]
    figure.suptitle(titled("What an accuracy costs in storage", members))
    return figure


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
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    for ax in axes[len(groups) :]:
        ax.remove()
    members = [r for group in groups for r in group.results]
    title = "Where forgetting lives: task 1's accuracy with one group of weights put back"
    figure.suptitle(titled(title, members))
    text = "dashed: all that task 1 has lost; mean and 95 % Student interval over n seeds"
    figure.supxlabel(text, fontsize=9, color=GREY)
    return figure


def _draw_drift(ax, group: Group, rows: list[str]) -> None:
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
    ax.grid(visible=False, axis="y")
    ax.set_title(counted(group.label, [len(drifted)]))
