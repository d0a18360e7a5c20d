"""Figures of what is locked and what it costs. Each function returns a Figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from bitstack_nb.figures.style import (
    GREY,
    SHARES,
    Figure,
    counted,
    described,
    draw_shares,
    grouped,
    is_published,
    names,
    shared_task_names,
    styled,
    task_names,
    titled,
)
from bitstack_nb.results.metrics import mean_interval
from bitstack_nb.results.pairs import metric, partner
from bitstack_nb.results.result import Result, ResultError

OUTSIDE = "other"
_LEFT = "0.95"
_LEGEND_COLUMNS = 3
_DASHES = ("-", "--", ":", "-.")


@styled
def ablation(results: Iterable[Result]) -> Figure:
    """Metrics, locks and the masks' weight against sparsity: a line per budget.

    A line whose runs have no sparsity 0 of their own starts with the fine-tuning runs that agree
    with them in all settings (but not one of exact recall), and needs three sparsities: two would
    be a comparison drawn as a trend. A mask weighs one bit per eligible entry and 4 bytes per
    locked one, its float32 value (``storage``; headers aside). Raises ResultError without a line.
    """
    results = list(results)
    lines = [line for line in _sparsity_lines(results) if len(line.points) > 2]
    if not lines:
        raise ResultError(
            "no configuration has three sparsities: give runs of a strategy that locks (bitstack) "
            "with more of them"
        )
    figure = Figure(6.2)
    axes = figure.subplots(2, 3, sharex=True).ravel()
    members = [r for line in lines for runs in line.points.values() for r in runs]
    large = max(mask_bytes(run) or 0 for run in members) >= 2**20
    unit, size = ("MiB", 2**20) if large else ("KiB", 2**10)
    panels = {
        "forgetting (points)": metric("forgetting"),
        "learning accuracy (%)": metric("learning_accuracy"),
        "average accuracy at the end (%)": metric("average_accuracy"),
        "locked (% of eligible)": _locked,
        f"masks and locked values ({unit})": lambda result: (
            None if (weight := mask_bytes(result)) is None else weight / size
        ),
    }
    for ax, (title, value) in zip(axes, panels.items(), strict=False):
        for line in lines:
            _draw_line(ax, line, value)
        ax.set_title(title)
        ax.set_xlabel("sparsity (share a task may lock)")
        ax.tick_params("x", labelbottom=True)
    handles, labels = axes[3].get_legend_handles_labels()
    axes[5].axis("off")
    axes[5].legend(handles, labels, loc="center", frameon=False)
    figure.suptitle(titled("Sparsity: what a task may lock, and what follows", members))
    figure.supxlabel("mean and 95 % Student interval over n seeds", fontsize=9, color=GREY)
    return figure


class _Line(NamedTuple):
    label: str
    colour: Any
    marker: str
    dash: str
    points: dict[float, list[Result]]  # by sparsity


def _sparsity_lines(results: list[Result]) -> list[_Line]:
    groups = [g for g in grouped(results) if g.settings["sparsity"] is not None]
    others = [{k: v for k, v in g.settings.items() if k != "sparsity"} for g in groups]
    lines: dict[str, _Line] = {}
    for group, label in zip(groups, names(others), strict=True):
        if label not in lines:  # lines of one budget share its colour and differ in their dashes
            alike = sum(line.colour == group.colour for line in lines.values())
            dash = _DASHES[alike % len(_DASHES)]
            lines[label] = _Line(label, group.colour, group.marker, dash, {})
        lines[label].points[group.settings["sparsity"]] = group.results
    for line in lines.values():
        runs = [run for own in line.points.values() for run in own]
        # Recall without entries would be a head on the base, and not fine-tuning.
        if 0 not in line.points and runs[0].protocol["strategy"] != "recall":
            partners = [p for run in runs if (p := partner(run, results, "finetune"))]
            zero = [p for at, p in enumerate(partners) if p not in partners[:at]]
            line.points.update({0: zero} if zero else {})
    return list(lines.values())


def _draw_line(ax: Axes, line: _Line, value: Callable[[Result], float | None]) -> None:
    xs, means, halves = [], [], []
    for sparsity, runs in sorted(line.points.items()):
        values = [number for run in runs if (number := value(run)) is not None]
        if values:
            mean, half = mean_interval(values)
            xs.append(sparsity)
            means.append(mean)
            halves.append(half or 0.0)
    look = {"color": line.colour, "linestyle": line.dash, "marker": line.marker}
    face = "white" if line.marker == "D" else line.colour
    label = counted(line.label, map(len, line.points.values()))
    ax.plot(xs, means, label=label, markersize=5, markerfacecolor=face, **look)
    low, high = np.subtract(means, halves), np.add(means, halves)
    ax.fill_between(xs, low, high, color=line.colour, alpha=0.15, linewidth=0)


def _locked(result: Result) -> float | None:
    """Locked % of the eligible entries after the last task; 0 for strategies that do not lock."""
    if not result.lock_stats:
        return 0.0 if _locks_nothing(result) else None
    return result.lock_stats[-1].get("frozen_pct")


def mask_bytes(result: Result) -> float | None:
    """Bytes of a run's masks and the values under them; None where it is not known.

    One bit per eligible entry and 4 bytes per locked one (float32), as ``storage`` writes them;
    names, counts per task and the bits that fill a parameter's last byte come on top. Of exact
    recall what the run recorded, its owners being compressed. 0 for strategies that do not lock.
    """
    if result.protocol.get("strategy") == "recall":
        return result.storage.get("bytes")
    if not result.lock_stats:
        return 0.0 if _locks_nothing(result) else None
    stats = result.lock_stats[-1]
    if not {"eligible", "locked"} <= stats.keys():
        return None
    return stats["eligible"] / 8 + 4 * stats["locked"]


def _locks_nothing(result: Result) -> bool:
    return result.protocol.get("sparsity") is None and not is_published(result)


# What is locked where -------------------------------------------------------------------------


@styled
def lock_heatmaps(locks: Result | pd.DataFrame) -> Figure:
    """What each task chose, and what is locked after all of them, layer by module.

    Args:
        locks: a result, or the ``BitStack.layer_table()`` of a live stack.

    Shares of a module's eligible entries, in %. A task's panel shows all that it chose: with the
    budget ``union`` some of that was locked before. The row "other" is what lies outside the
    blocks. Raises ResultError where there are no locks.
    """
    table, tasks = layer_table(locks)
    panels = []
    for number, name in enumerate(tasks, start=1):
        own = table[table["task"] == number]
        share = own["selected"].sum() / own["eligible"].sum()
        panels.append((f"{name} chose {share:.1%}", _shares(own, "selected")))
    share = own["locked"].sum() / own["eligible"].sum()
    panels.append((f"after all: {share:.1%} locked", _shares(own, "locked")))
    down = math.ceil(len(panels) / 3)
    names_below = short_names(panels[0][1].columns)
    figure = Figure(
        1.3 + down * (0.4 + 0.23 * len(panels[0][1])) + 0.08 * max(map(len, names_below))
    )
    axes = figure.subplots(down, min(3, len(panels)), squeeze=False).ravel()
    for at, (ax, (title, shares)) in enumerate(zip(axes, panels, strict=False)):
        draw_shares(
            ax,
            100 * shares.to_numpy(),
            rows=list(shares.index) if at % 3 == 0 else None,
            columns=names_below if at + 3 >= len(panels) else None,
        )
        ax.tick_params("x", rotation=90)
        ax.set_title(title)
        ax.set_ylabel("layer" if at % 3 == 0 else "")
    for ax in axes[len(panels) :]:
        ax.remove()
    drawn = axes[: len(panels)]
    bar = figure.colorbar(drawn[0].collections[0], ax=drawn.tolist(), location="bottom", aspect=60)
    bar.set_label("share of the module's eligible entries (%)")
    figure.suptitle(_heatmap_title(locks))
    return figure


def _heatmap_title(locks: Result | pd.DataFrame) -> str:
    title = "Locked entries by layer and module"
    if not isinstance(locks, Result):
        return title
    return titled(f"{title}: {described(locks)}", [locks])


def layer_table(locks: Result | pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """A layer table whose layer is text, and a name per task."""
    is_result = isinstance(locks, Result)
    table = pd.DataFrame(locks.locks) if is_result else locks
    if table.empty:
        whose = f"of strategy {locks.protocol['strategy']!r}" if is_result else "in this table"
        raise ResultError(
            f"there are no locks {whose}: give a result of a strategy that locks (bitstack), or "
            "the layer_table() of a stack after its first update"
        )
    missing = {"layer", "module", "task", "eligible", "selected", "locked"} - set(table)
    if missing:
        raise ResultError(f"the layer table lacks {', '.join(sorted(missing))}")
    numbers = range(1, int(table["task"].max()) + 1)
    known = task_names(locks) if is_result else []
    tasks = [known[n - 1] if n <= len(known) else f"task {n}" for n in numbers]
    return table, tasks


def _shares(table: pd.DataFrame, what: str) -> pd.DataFrame:
    """``what`` over eligible of one task's rows: layer by module, NaN where there is none."""
    blocks = table["layer"].notna()
    layers = [*sorted(table["layer"][blocks].unique()), *([None] if not blocks.all() else [])]
    modules = list(dict.fromkeys([*table["module"][blocks], *table["module"][~blocks]]))
    shares = np.full((len(layers), len(modules)), np.nan)
    for row in table.to_dict("records"):
        layer = None if pd.isna(row["layer"]) else row["layer"]
        at = layers.index(layer), modules.index(row["module"])
        shares[at] = row[what] / row["eligible"] if row["eligible"] else 0.0
    index = [OUTSIDE if layer is None else int(layer) for layer in layers]
    return pd.DataFrame(shares, index=index, columns=modules)


def short_names(modules: Sequence[str]) -> list[str]:
    """Each name's shortest end that no other one has, whole parts only."""
    short = []
    for module in modules:
        parts = module.split(".")
        ends = [".".join(parts[at:]) for at in reversed(range(len(parts)))]
        unique = (e for e in ends if sum(f".{m}".endswith(f".{e}") for m in modules) == 1)
        short.append(next(unique, module))
    return short


@styled
def capacity(locks: Iterable[Result] | pd.DataFrame) -> Figure:
    """Locked % of the eligible entries, task by task, and what is left: a bar per configuration.

    Takes results (those without locks are left out) or one ``BitStack.layer_table()``. Means over
    seeds; the numbers beside a bar come with their 95 % Student interval. Raises ResultError where
    there are no locks.
    """
    if isinstance(locks, pd.DataFrame):
        table, tasks = layer_table(locks)
        bars, members = {"this stack": [_locked_after(table)]}, []
    else:
        groups = [g for g in grouped(locks) if all(r.locks for r in g.results)]
        if not groups:
            raise ResultError("no result has locks: give runs of a strategy that locks (bitstack)")
        members = [r for g in groups for r in g.results]
        tasks = shared_task_names(members)
        bars = {
            counted(g.label, [len(g.results)]): [
                _locked_after(layer_table(r)[0]) for r in g.results
            ]
            for g in groups
        }
    lines = sum(label.count("\n") + 1.6 for label in bars)
    legend = max(2, math.ceil((len(tasks) + 1) / _LEGEND_COLUMNS))
    figure = Figure(1.3 + 0.2 * legend + 0.16 * lines)
    ax = figure.subplots()
    colours = SHARES(np.linspace(0.25, 0.9, len(tasks)))
    notes = [_draw_bar(ax, row, seeds, colours) for row, seeds in enumerate(bars.values())]
    ax.set_yticks(range(len(bars)), list(bars))
    ax.set(xlim=(0, 100), ylim=(len(bars) - 0.4, -0.6), xlabel="share of the eligible entries (%)")
    ax.grid(visible=False, axis="y")
    ax.secondary_yaxis("right").set_yticks(range(len(bars)), notes)
    patches = [
        Patch(color=colour, label=f"locked by {task}")
        for task, colour in zip(tasks, colours, strict=True)
    ]
    patches.append(Patch(color=_LEFT, label="left"))
    figure.legend(handles=patches, loc="outside lower center", ncols=_LEGEND_COLUMNS, frameon=False)
    figure.suptitle(titled("Capacity used by each task, and left", members))
    return figure


def _locked_after(table: pd.DataFrame) -> np.ndarray:
    """Locked % of the eligible entries after each task: float64 [tasks]."""
    sums = table.groupby("task")[["locked", "eligible"]].sum()
    return (100 * sums["locked"] / sums["eligible"]).to_numpy()


def _draw_bar(ax: Axes, row: int, seeds: list[np.ndarray], colours: np.ndarray) -> str:
    """Draw a bar of what is locked after each task, per seed, and say what it ends at."""
    after = np.mean(seeds, axis=0)
    starts = [0.0, *after]
    faces = [*colours[: len(after)], _LEFT]
    for start, end, face in zip(starts, [*after, 100.0], faces, strict=True):
        ax.barh([row], [end - start], left=[start], height=0.6, color=[face], edgecolor="white")
    mean, half = mean_interval([own[-1] for own in seeds])
    spread = "" if half is None else f" ± {half:.1f}"
    return f"{mean:.1f}{spread} % locked\n{100 - mean:.1f} % left"
