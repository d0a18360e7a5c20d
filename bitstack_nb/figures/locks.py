"""Figures of locked weights, own weights and masks. Each function returns a Figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter

from bitstack_nb.benchmark.curves import LockCurves
from bitstack_nb.figures.methods import (
    MARKERS,
    Group,
    counted,
    described,
    grouped,
    is_published,
    labels,
    shared_task_names,
    task_names,
    titled,
)
from bitstack_nb.figures.style import (
    BYTES,
    SHARES,
    Figure,
    colour_bar,
    heatmap,
    note,
    panels,
    styled,
)
from bitstack_nb.results.frames import averages, frame
from bitstack_nb.results.metrics import mean_interval
from bitstack_nb.results.pairs import OTHER, pairs
from bitstack_nb.results.result import Result, ResultError

if TYPE_CHECKING:
    from bitstack_nb.recall import ExactRecall

OUTSIDE = "other"  # the row of the weights outside the layers
_LEFT = "0.95"
_ABLATION = {
    "forgetting": "forgetting (points)",
    "learning_accuracy": "learning accuracy (%)",
    "average_accuracy": "average accuracy at the end (%)",
    "locked": "locked (% of eligible)",
    "stored": "storage of masks and locked values",
}
_DASHES = ("-", "--", ":", "-.")


@styled
def ablation(results: Iterable[Result]) -> Figure:
    """Metrics, locked weights and storage of the masks against sparsity: a line per budget.

    A line whose runs have no sparsity 0 of their own starts with the fine-tuning runs that agree
    with them in all settings (but not one of exact recall). It needs three sparsities. A mask
    takes one bit per eligible weight and 4 bytes per locked one. Raises ResultError without a line.
    """
    runs = frame(results)
    lines = {k: line for k, line in sparsity_lines(runs).items() if len(line.points) > 2}
    if not lines:
        raise ResultError(
            "no configuration has three sparsities: give runs of a strategy that locks (bitstack) "
            "with more of them"
        )
    figure, axes = panels(6, 3, above=0.6, each=2.8, sharex=True)
    for ax, (column, title) in zip(axes, _ABLATION.items(), strict=False):
        for label, line in lines.items():
            _draw_line(ax, label, line, column)
        ax.set_title(title)
        ax.set_xlabel("sparsity")
        ax.tick_params("x", labelbottom=True)
    axes[4].yaxis.set_major_formatter(EngFormatter("B"))
    axes[5].axis("off")
    axes[5].legend(*axes[3].get_legend_handles_labels(), loc="center", frameon=False)
    title = "Effects of the sparsity, the share that a task may lock"
    figure.suptitle(titled(title, runs["result"]))
    note(figure, "mean and 95 % Student interval over n seeds")
    return figure


class SparsityLine(NamedTuple):
    """Configurations that differ in nothing but their sparsity."""

    look: dict[str, str]
    points: pd.DataFrame  # by sparsity: means of _ABLATION, their intervals
    seeds: pd.Series  # by sparsity
    runs: pd.DataFrame  # of ``results.frame``


def sparsity_lines(runs: pd.DataFrame, *, ignoring: Iterable[str] = ()) -> dict[str, SparsityLine]:
    """The lines by their label.

    Args:
        runs: as of ``results.frame``.
        ignoring: settings that may differ too, as a learning rate chosen for each sparsity.
    """
    groups = [g for g in grouped(runs) if g.settings["sparsity"] is not None]
    left_out = {"sparsity", *ignoring}
    others = [{k: v for k, v in g.settings.items() if k not in left_out} for g in groups]
    members: dict[str, list[Group]] = {}
    for group, label in zip(groups, labels(others), strict=True):
        members.setdefault(label, []).append(group)
    lines: dict[str, SparsityLine] = {}
    for label, own in members.items():
        drawn = pd.concat(group.runs for group in own)
        # Exact recall without own weights would be a head on the base, and not fine-tuning.
        if not (drawn["sparsity"] == 0).any() and own[0].settings["strategy"] != "recall":
            drawn = pd.concat([drawn, _fine_tuned(runs, drawn).assign(sparsity=0.0)])
        locked, nothing = drawn["locked_of_eligible"], drawn["result"].map(_locks_nothing)
        drawn = drawn.assign(
            locked=locked.mask(nothing, 0.0),
            stored=drawn["result"].map(mask_bytes).astype(float),
            configuration=drawn["sparsity"],
        )
        at = sum(line.look["color"] == own[0].colour for line in lines.values())
        look = {"linestyle": _DASHES[at % len(_DASHES)], "marker": MARKERS[at % len(MARKERS)]}
        points = averages(drawn, _ABLATION)
        seeds = drawn.groupby("sparsity").size()
        look["color"] = own[0].colour
        lines[label] = SparsityLine(look, points, seeds, drawn)
    return lines


def _fine_tuned(runs: pd.DataFrame, own: pd.DataFrame) -> pd.DataFrame:
    """The runs of fine-tuning that some runs are compared with, each once."""
    paired = pairs(runs, "finetune")
    partners = paired.loc[paired["configuration"].isin(own["configuration"]), f"result{OTHER}"]
    return runs[runs["result"].map(id).isin(partners.map(id))]


def _draw_line(ax: Axes, label: str, line: SparsityLine, column: str) -> None:
    points = line.points[[column, f"{column}_interval"]].dropna(subset=column)
    means, halves = points[column], points[f"{column}_interval"].fillna(0)
    ax.plot(means.index, means, label=counted(label, line.seeds), markersize=5, **line.look)
    colour = line.look["color"]
    band = {"facecolor": (colour, 0.12), "edgecolor": (colour, 0.5), "linewidth": 0.8}
    look = band | {"linestyle": line.look["linestyle"]}
    ax.fill_between(means.index, means - halves, means + halves, **look)


def mask_bytes(result: Result) -> float | None:
    """Storage of a run's masks and the values under them in bytes; None where it is not known.

    One bit per eligible weight and 4 bytes per locked one (float32), headers aside. For exact
    recall the bytes that the run recorded. 0 for strategies that do not lock.
    """
    if result.protocol.get("strategy") == "recall":
        return result.storage.get("bytes")
    if not result.lock_stats:
        return 0.0 if _locks_nothing(result) else None
    stats = result.lock_stats[-1]
    if not {"eligible", "locked"} <= stats.keys():  # published numbers
        return None
    return stats["eligible"] / 8 + 4 * stats["locked"]


def _locks_nothing(result: Result) -> bool:
    return result.protocol.get("sparsity") is None and not is_published(result)


# Shares of each layer and module ------------------------------------------------------------------


@styled
def lock_heatmaps(locks: Result | pd.DataFrame) -> Figure:
    """The weights that each task chose, and those locked after all, layer by module.

    Args:
        locks: a result, or the ``layer_table()`` of a live stack.

    Shares of a module's eligible weights, in %. A task's panel shows all that it chose: with the
    budget ``union`` some of that was locked before. The row "other" is what lies outside the
    layers. Raises ResultError where there are no locks.
    """
    table, tasks = layer_table(locks)
    shown = {}
    for number, name in tasks.items():
        own = table[table["task"] == number]
        shown[f"{name} chose {_share(own, 'selected')}"] = shares(own, "selected")
    shown[f"after all: {_share(own, 'locked')} locked"] = shares(own, "locked")
    first = next(iter(shown.values()))
    below = 0.08 * max(map(len, first.columns))
    figure, axes = panels(len(shown), 3, above=1.3 + below, each=0.4 + 0.23 * len(first))
    for at, (ax, (title, percent)) in enumerate(zip(axes, shown.items(), strict=True)):
        heatmap(ax, percent, rows=at % 3 == 0, columns=at + 3 >= len(shown))
        ax.set_title(title)
        ax.set_ylabel("layer" if at % 3 == 0 else "")
    label = "share of the module's eligible weights (%)"
    colour_bar(figure, axes, label, location="bottom", aspect=60)
    figure.suptitle(_title("Locked weights by layer and module", locks))
    return figure


def _share(table: pd.DataFrame, what: str) -> str:
    return f"{100 * table[what].sum() / table['eligible'].sum():.1f} %"


def _title(title: str, locks: Result | pd.DataFrame) -> str:
    if not isinstance(locks, Result):
        return title
    return titled(f"{title}: {described(locks)}", [locks])


def layer_table(locks: Result | pd.DataFrame) -> tuple[pd.DataFrame, dict[int | str, str]]:
    """A layer table, and a name for each of its tasks."""
    is_result = isinstance(locks, Result)
    table = pd.DataFrame(locks.locks) if is_result else locks
    if table.empty:
        origin = f"of strategy {locks.protocol['strategy']!r}" if is_result else "in this table"
        raise ResultError(
            f"there are no locks {origin}: give a result of a strategy that locks (bitstack), or "
            "the layer_table() of a stack after its first update"
        )
    tasks = list(table["task"].unique())
    if is_result:
        return table, dict(zip(tasks, task_names(locks), strict=True))
    return table, {task: task if isinstance(task, str) else f"task {task}" for task in tasks}


def shares(table: pd.DataFrame, what: str) -> pd.DataFrame:
    """The column ``what`` of one task's rows of a layer table in % of eligible: layer by module.

    NaN where a layer has no such module.
    """
    inside, outside = table[table["layer"].notna()], table[table["layer"].isna()]
    layers = [*map(_layer_name, sorted(inside["layer"].unique())), OUTSIDE]
    modules = list(dict.fromkeys([*inside["module"], *outside["module"]]))
    percent = 100 * table[what] / table["eligible"]
    found = percent.groupby([table["layer"].map(_layer_name), table["module"]]).sum().unstack()
    found = found.reindex(index=layers if len(outside) else layers[:-1], columns=modules)
    return found.rename(columns=short_names(modules))


def _layer_name(layer: int | None) -> str:
    return OUTSIDE if pd.isna(layer) else str(int(layer))


def short_names(modules: Sequence[str]) -> dict[str, str]:
    """Each name's shortest end that no other one has, whole parts only."""
    short = {}
    for module in modules:
        parts = module.split(".")
        ends = [".".join(parts[at:]) for at in reversed(range(len(parts)))]
        unique = (e for e in ends if sum(f".{m}".endswith(f".{e}") for m in modules) == 1)
        short[module] = next(unique, module)
    return short


@styled
def own_weights(tasks: ExactRecall, name: str, *, size: int = 96) -> Figure:
    """The own weights of each task in the first rows and columns of a matrix, one square each.

    Args:
        tasks: an ``ExactRecall`` with one task or more.
        name: of a parameter with two dimensions, as in ``tasks.mask(task)``.
        size: rows and columns that are shown at most.
    """
    masks = [tasks.mask(task)[name].cpu().numpy() for task in tasks.names]
    if masks[0].ndim != 2:
        raise ValueError(f"{name} has shape {masks[0].shape}, expected two dimensions")
    shown = np.stack(masks)[:, :size, :size]
    several = len(masks) + 1
    owner = np.where(shown.any(0), shown.argmax(0) + 1, 0)
    owner = np.where(shown.sum(0) > 1, several, owner)
    colours = ListedColormap(["white", *SHARES(np.linspace(0.45, 0.95, len(masks))), "crimson"])
    figure = Figure(1.4 + 4 * min(1.0, owner.shape[0] / owner.shape[1]))
    ax = figure.subplots()
    ax.imshow(owner, cmap=colours, vmin=-0.5, vmax=several + 0.5, interpolation="nearest")
    ax.grid(visible=False)
    ax.set(xlabel="column", ylabel="row")
    legend = [*tasks.names, *(["several tasks"] if several in owner else [])]
    patches = [Patch(color=colours(at), label=task) for at, task in enumerate(legend, start=1)]
    figure.legend(handles=patches, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(f"Own weights of each task in {name}; white: the base")
    return figure


# Capacity, overlap and storage --------------------------------------------------------------------


@styled
def capacity(locks: Iterable[Result] | pd.DataFrame) -> Figure:
    """Locked % of the eligible weights, task by task, and what is left: a bar per configuration.

    Takes results (those without locks are left out) or one ``layer_table()``. Means over seeds;
    the numbers beside a bar come with their 95 % Student interval. Raises ResultError where there
    are no locks.
    """
    if isinstance(locks, pd.DataFrame):
        table, names = layer_table(locks)
        bars, members, tasks = {"this stack": [_locked_after(table)]}, [], list(names.values())
    else:
        groups = [g for g in grouped(frame(locks)) if all(r.locks for r in g.results)]
        if not groups:
            raise ResultError("no result has locks: give runs of a strategy that locks (bitstack)")
        members = [result for group in groups for result in group.results]
        tasks = shared_task_names(members)
        bars = {
            counted(g.label, [len(g.runs)]): [
                _locked_after(pd.DataFrame(r.locks)) for r in g.results
            ]
            for g in groups
        }
    added = pd.DataFrame([np.diff(np.mean(seeds, axis=0), prepend=0) for seeds in bars.values()])
    added = added.set_axis(list(bars)).set_axis([f"locked by {task}" for task in tasks], axis=1)
    added["left"] = 100 - added.sum(axis=1)
    columns = 3
    figure = Figure(1.3 + 0.2 * max(2, math.ceil((len(tasks) + 1) / columns)) + 0.45 * len(bars))
    ax = figure.subplots()
    colours = [*SHARES(np.linspace(0.25, 0.9, len(tasks))), _LEFT]
    look = {"color": colours, "width": 0.6, "edgecolor": "white", "legend": False}
    added.plot.barh(stacked=True, ax=ax, **look)
    ax.set(xlim=(0, 100), ylim=(len(bars) - 0.4, -0.6), xlabel="share of the eligible weights (%)")
    ax.grid(visible=False, axis="y")
    ends = [_in_words([own[-1] for own in seeds]) for seeds in bars.values()]
    ax.secondary_yaxis("right").set_yticks(range(len(bars)), ends)
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(titled("Capacity used by each task, and left", members))
    return figure


def _locked_after(table: pd.DataFrame) -> np.ndarray:
    """Locked % of the eligible weights after each task: float64 [tasks]."""
    sums = table.groupby("task", sort=False)[["locked", "eligible"]].sum()
    return (100 * sums["locked"] / sums["eligible"]).to_numpy()


def _in_words(locked: Sequence[float]) -> str:
    """The share that is locked in the end, of each seed, and left, in words."""
    mean, half = mean_interval(locked)
    spread = "" if half is None else f" ± {half:.1f}"
    return f"{mean:.1f}{spread} % locked\n{100 - mean:.1f} % left"


@styled
def task_overlap(result: Result, sparsities: Sequence[float] = (0.05, 0.12, 0.40)) -> Figure:
    """Shared over united weights of two tasks' choices (Jaccard), in %: a panel per sparsity.

    Of the importance recorded with the run, measured with the masks lifted. Two random choices of
    the share s overlap by s / (2 - s). Raises ResultError where no importance is recorded.
    """
    if not result.importance:
        raise ResultError(
            f"this result of strategy {result.protocol['strategy']!r} has no recorded importance: "
            "give a run of bitstack"
        )
    curves = LockCurves.from_record(result.importance)
    tasks = task_names(result)
    figure, axes = panels(len(sparsities), 3, above=0.8, each=2.9)
    for at, (ax, sparsity) in enumerate(zip(axes, sparsities, strict=True)):
        percent = pd.DataFrame(100 * curves.overlap(sparsity), index=tasks, columns=tasks)
        heatmap(ax, percent, rows=at % 3 == 0)
        chance = sparsity / (2 - sparsity)
        ax.set_title(f"sparsity {100 * sparsity:g} %\n(two random choices: {100 * chance:.0f} %)")
    colour_bar(figure, axes, "% of those that either chose", shrink=0.8, aspect=20)
    title = f"Weights that both of two tasks would choose. Importance: {described(result)}"
    figure.suptitle(titled(title, [result]))
    return figure


@styled
def mask_weight(result: Result) -> Figure:
    """The storage of a run's mask beside the values it locks and copies of the weights.

    One bit per eligible weight; values and weights as float32, 4 bytes. Raises ResultError for a
    strategy without masks.
    """
    if not result.lock_stats or not result.protocol.get("budget"):
        strategy = result.protocol["strategy"]
        raise ResultError(f"strategy {strategy!r} has no masks: give a run of bitstack")
    stats, tasks = result.lock_stats[-1], len(result.lock_stats)
    mask, copy = (stats["eligible"] + 7) // 8, 4 * stats["total"]
    stored = {
        "the mask of all tasks (1 bit per eligible weight)": mask,
        f"a mask for each of {tasks} tasks": tasks * mask,
        "the values it locks": 4 * stats["locked"],
        "a copy of all weights": copy,
        f"a copy for each of {tasks} tasks": tasks * copy,
    }
    figure = Figure(2.6)
    ax = figure.subplots()
    ax.set_xscale("log")  # a mask is too small beside copies for a bar
    for row, (name, count) in enumerate(stored.items()):
        ax.plot(count, row, "o", markersize=9, color=SHARES(0.35 if "copy" in name else 0.75))
        ax.annotate(BYTES(count), (count, row), (8, 0), textcoords="offset points", va="center")
    ax.set_yticks(range(len(stored)), list(stored))
    ax.set_ylim(len(stored) - 0.5, -0.5)
    ax.margins(x=0.2)
    ax.xaxis.set_major_formatter(EngFormatter("B"))
    ax.set_xlabel("bytes, each grid line ten times the one before")
    ax.set_title(f"{described(result)}, {stats['total'] / 1e6:.1f} M parameters")
    figure.suptitle(titled("Storage of a mask", [result]))
    return figure
