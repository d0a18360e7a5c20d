"""The figure of how costs grow, and the files of a cost report."""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from pathlib import Path

from bitstack_nb.cost.report import LIMITS, CostReport, cost_table
from bitstack_nb.figures.style import COLOURS, GREY, Figure, png, styled
from bitstack_nb.files import replacing
from bitstack_nb.results.result import ResultError
from bitstack_nb.results.tables import format_table


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
    for (left, right), what, colour in zip(axes, works, COLOURS, strict=False):
        compared, limit = LIMITS[what]
        rows = [row for row in report.growth if row["what"] == what]
        sizes = [(row["parameters"] / 1e6, row["ratio"]) for row in rows if row["tasks"] == 5]
        tasks = [(row["tasks"], row["ratio"]) for row in rows if row["parameters"] == size]
        for ax, points in ((left, sizes), (right, tasks)):
            ax.plot(*zip(*sorted(points), strict=True), "o-", color=colour, markersize=5)
            ax.axhline(limit, color=GREY, linestyle="--", linewidth=1)
        left.set_ylim(0, 1.15 * max(limit, *(row["ratio"] for row in rows)))
        left.set_ylabel(textwrap.fill(f"{what} / {compared}", 28))
    (left, right), (lowest_left, lowest_right) = axes[0], axes[-1]
    left.set_title("5 tasks")
    right.set_title(f"{size / 1e6:.0f} M parameters")
    lowest_left.set_xlabel("parameters (M)")
    lowest_right.set_xlabel("tasks locked")
    left.set_xscale("log")
    ticks = sorted({row["parameters"] / 1e6 for row in report.growth})
    lowest_left.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    lowest_left.set_xticks([], minor=True)
    figure.suptitle(f"How costs grow ({report.device}; dashed: limit)")
    return figure
