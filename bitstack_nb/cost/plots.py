"""The figure of how costs grow; it returns a Figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from bitstack_nb.cost.report import LIMITS, CostReport
from bitstack_nb.figures.style import COLOURS, GREY, Figure, styled
from bitstack_nb.results.result import ResultError

_TITLES = {"parameters": "5 tasks", "tasks": "{:.0f} M parameters"}


@styled
def cost_growth(report: CostReport) -> Figure:
    """Each cost over what it is compared with, against parameters and against tasks.

    Dashed: what it may be at most. Raises ResultError where no growth was measured.
    """
    if not report.growth:
        raise ResultError("this report has no growth: measure it with measure_growth")
    works = list(dict.fromkeys(row["what"] for row in report.growth))
    numbers = Counter(row["parameters"] for row in report.growth)
    most = max(numbers, key=numbers.get)  # measured: the size that the tasks vary at
    panels = {
        "parameters": [row for row in report.growth if row["tasks"] == 5],
        "tasks": [row for row in report.growth if row["parameters"] == most],
    }
    figure = Figure(1.6 + 2.2 * len(works))
    axes = figure.subplots(len(works), 2, sharex="col", sharey="row", squeeze=False)
    for line, what in enumerate(works):
        for ax, (against, rows) in zip(axes[line], panels.items(), strict=True):
            own = [row for row in rows if row["what"] == what]
            _draw(ax, own, against, colour=COLOURS[line], limit=LIMITS[what][1])
        highest = max(row["ratio"] for row in report.growth if row["what"] == what)
        axes[line][0].set_ylim(0, 1.15 * max(highest, LIMITS[what][1]))  # of both: they share it
        axes[line][0].set_ylabel(f"{what} /\n{LIMITS[what][0]}")
    for ax, against in zip(axes[0], panels, strict=True):
        ax.set_title(_TITLES[against].format(most / 1e6))
    axes[-1][0].set_xlabel("parameters (M)")
    axes[-1][1].set_xlabel("tasks locked")
    axes[0][0].set_xscale("log")
    ticks = sorted({row["parameters"] / 1e6 for row in panels["parameters"]})
    axes[-1][0].set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes[-1][0].set_xticks([], minor=True)
    figure.suptitle(f"How costs grow ({report.device}; dashed: what they may be at most)")
    return figure


def _draw(
    ax: Axes, rows: Sequence[dict[str, Any]], against: str, *, colour: Any, limit: float
) -> None:
    scale = 1e6 if against == "parameters" else 1
    points = sorted((row[against] / scale, row["ratio"]) for row in rows)
    ax.plot(*zip(*points, strict=True), "o-", color=colour, markersize=5)
    ax.axhline(limit, color=GREY, linestyle="--", linewidth=1)
