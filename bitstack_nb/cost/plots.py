"""The figures of costs: measured times, and how they grow; and the files of a cost report."""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from pathlib import Path

from matplotlib.lines import Line2D

from bitstack_nb.cost.report import LIMITS, CostReport, cost_table
from bitstack_nb.figures.methods import method
from bitstack_nb.figures.style import GREY, Figure, png, styled
from bitstack_nb.files import replacing
from bitstack_nb.results.result import ResultError
from bitstack_nb.results.tables import format_table

_DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def write_cost_figures(report: CostReport, folder: str | os.PathLike[str]) -> list[Path]:
    """Write the table of a report and the figure of how costs grow to ``folder``."""
    table = f"{format_table(cost_table(report).round(3))}\n"
    contents = {"cost_growth.png": png(cost_growth(report)), "tables.md": table.encode()}
    folder = Path(folder).expanduser()
    for name, content in contents.items():
        with replacing(folder / name) as temporary:
            temporary.write_bytes(content)
    return [folder / name for name in contents]


@styled
def cost_ratios(report: CostReport) -> Figure:
    """Each measured time as a multiple of the work that it is compared with, and its limit.

    Raises:
        ResultError: the report has no times.
    """
    times = {name: report.costs[name] for name in LIMITS if "seconds" in report.costs.get(name, {})}
    if not times:
        raise ResultError("this report has no times: measure them with measure_costs")
    figure = Figure(1.5 + 0.55 * len(times))
    ax = figure.subplots()
    for row, (name, found) in enumerate(times.items()):
        colour = _colour(name)
        _, limit = LIMITS[name]
        ax.plot([limit] * 2, [row - 0.35, row + 0.35], color=GREY, linestyle="--")
        if "plain" in found:
            ax.plot(found["plain"], row, "o", color=colour, markersize=8, markerfacecolor="none")
        ax.plot(found["value"], row, "o", color=colour, markersize=8)
    if max(max(found["value"], found.get("plain", 0)) for found in times.values()) > 3:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
    else:
        ax.set_xlim(left=0)
    ax.axvline(1, color=GREY, linewidth=1)
    ax.set_yticks(
        range(len(times)), [f"{name}\nagainst {LIMITS[name][0]}" for name in times], size=9
    )
    ax.set_ylim(len(times) - 0.4, -0.6)
    ax.secondary_yaxis("right").set_yticks(
        range(len(times)), [f"{found['value']:.2f}" for found in times.values()]
    )
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("times as long (1: equally long)")
    figure.suptitle(f"Times of BitStack and exact recall on a {_DEVICES[report.device]}")
    dot = {"marker": "o", "linestyle": ""}
    looks = {
        "BitStack": {"color": method("bitstack").colour, **dot},
        "exact recall": {"color": method("recall").colour, **dot},
        "plain implementation": {"color": GREY, "markerfacecolor": "none", **dot},
        "limit": {"color": GREY, "linestyle": "--"},
    }
    handles = [Line2D([], [], label=label, **look) for label, look in looks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _colour(cost: str) -> str:
    """Of the method that a cost is of."""
    return method("recall" if cost.startswith("recall") else "bitstack").colour


@styled
def cost_growth(report: CostReport) -> Figure:
    """Each cost's ratio against parameters and against tasks; a dashed line is its limit.

    Raises:
        ResultError: the report has no growth.
    """
    if not report.growth:
        raise ResultError("this report has no growth: measure it with measure_growth")
    works = list(dict.fromkeys(row["what"] for row in report.growth))
    # The number of tasks varies at one size only, which so has the most rows.
    ((size, _),) = Counter(row["parameters"] for row in report.growth).most_common(1)
    figure = Figure(1.6 + 2.2 * len(works))
    axes = figure.subplots(len(works), 2, sharex="col", sharey="row", squeeze=False)
    for (left, right), what in zip(axes, works, strict=True):
        colour = _colour(what)
        compared, limit = LIMITS[what]
        rows = [row for row in report.growth if row["what"] == what]
        sizes = [(row["parameters"] / 1e6, row["ratio"]) for row in rows if row["tasks"] == 5]
        tasks = [(row["tasks"], row["ratio"]) for row in rows if row["parameters"] == size]
        for ax, points in ((left, sizes), (right, tasks)):
            ax.plot(*zip(*sorted(points), strict=True), "o-", color=colour, markersize=5)
            ax.axhline(limit, color=GREY, linestyle="--", linewidth=1)
        left.set_ylim(0, 1.15 * max(limit, *(row["ratio"] for row in rows)))
        left.set_ylabel(textwrap.fill(f"{what}, times {compared}", 28))
    (left, right), (lowest_left, lowest_right) = axes[0], axes[-1]
    left.set_title("larger models, 5 tasks locked")
    right.set_title(f"more tasks, {size / 1e6:.0f} M parameters")
    lowest_left.set_xlabel("parameters (M)")
    lowest_right.set_xlabel("tasks locked")
    left.set_xscale("log")
    ticks = sorted({row["parameters"] / 1e6 for row in report.growth})
    lowest_left.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    lowest_left.set_xticks([], minor=True)
    lowest_right.set_xticks(sorted({row["tasks"] for row in report.growth}))
    device = _DEVICES[report.device]
    figure.suptitle(
        f"Times of BitStack (orange) and exact recall (blue) on a {device}; dashed: limit"
    )
    return figure
