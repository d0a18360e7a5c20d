"""Figures of masks: what tasks share, what masks weigh, who owns what. Each returns a Figure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from bitstack_nb.figures.lock_view import LockView, size
from bitstack_nb.figures.locks import OUTSIDE, layer_table, short_names
from bitstack_nb.figures.style import SHARES, Figure, described, styled, titled
from bitstack_nb.recall import ExactRecall
from bitstack_nb.results.result import Result, ResultError


@styled
def task_overlap(result: Result, sparsities: Sequence[float] = (0.05, 0.12, 0.40)) -> Figure:
    """Shared over united entries of two tasks' choices (Jaccard), in %: a panel per sparsity.

    Of the importance recorded with the run, measured with the masks lifted. Two random choices of
    the share s overlap by s / (2 - s). Raises ResultError where no importance is recorded.
    """
    view = _view(result)
    figure = Figure(3.6)
    axes = figure.subplots(1, len(sparsities), squeeze=False).ravel()
    for at, (ax, sparsity) in enumerate(zip(axes, sparsities, strict=True)):
        sns.heatmap(
            100 * view.curves.overlap(sparsity),
            ax=ax,
            vmin=0,
            vmax=100,
            cmap=SHARES,
            annot=True,
            fmt=".0f",
            annot_kws={"size": 9},
            linewidths=1,
            square=True,
            cbar=False,
            xticklabels=view.tasks,
            yticklabels=view.tasks if at == 0 else False,
        )
        ax.tick_params("x", rotation=90)
        ax.tick_params("y", rotation=0)
        chance = sparsity / (2 - sparsity)
        ax.set_title(f"sparsity {sparsity:.0%}\n(two random choices: {chance:.0%})")
    bar = figure.colorbar(axes[0].collections[0], ax=axes.tolist(), shrink=0.8, aspect=20)
    bar.set_label("shared of united entries (%)")
    title = f"Overlap of what the tasks choose, masks lifted: {described(result)}"
    figure.suptitle(titled(title, [result]))
    return figure


@styled
def mask_weight(result: Result) -> Figure:
    """What a mask of the run weighs beside the values it locks and copies of the weights.

    A bit per eligible entry; values and weights as float32, 4 bytes. Raises ResultError where no
    importance is recorded.
    """
    view = _view(result)
    sparsity, budget = result.protocol["sparsity"], result.protocol["budget"]
    numbers = view.numbers(sparsity, budget=budget)
    tasks = len(view.tasks)
    weights = {
        "the mask of all tasks (1 bit per eligible entry)": numbers.mask_bytes,
        f"a mask for each of {tasks} tasks": tasks * numbers.mask_bytes,
        "the values it locks": numbers.value_bytes,
        "a copy of all weights": numbers.copy_bytes,
        f"a copy for each of {tasks} tasks": tasks * numbers.copy_bytes,
    }
    figure = Figure(2.6)
    ax = figure.subplots()
    bars = ax.barh(list(weights), [weight / 2**20 for weight in weights.values()], height=0.6)
    for bar, colour in zip(bars, [*SHARES([0.75] * 3), *SHARES([0.35] * 2)], strict=True):
        bar.set_color(colour)
    ax.bar_label(bars, [size(weight) for weight in weights.values()], padding=4)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.margins(x=0.15)
    ax.set_xlabel("MiB")
    ax.set_title(f"{described(result)}, {numbers.total / 1e6:.1f} M parameters")
    figure.suptitle(titled("What a mask weighs", [result]))
    return figure


@styled
def ownership(locks: Result | pd.DataFrame) -> Figure:
    """Whose the eligible entries are, in %: a bar per layer, and one per module of the layers.

    Args:
        locks: a result of strategy ``recall``, or ``ExactRecall.layer_table()``.

    The row "other" is what lies outside the layers. Raises ResultError where there are no locks.
    """
    table, tasks = layer_table(locks)
    outside = table["layer"].isna()
    places = {
        "layer": table["layer"].map(lambda n: OUTSIDE if pd.isna(n) else str(int(n))),
        "module": table["module"].where(~outside, OUTSIDE),
    }
    shares = {
        title: 100 * _per_task(table.assign(place=place), "added")
        for title, place in places.items()
    }
    modules = shares["module"]
    modules.index = [OUTSIDE if m == OUTSIDE else m for m in short_names(list(modules.index))]
    figure = Figure(1.8 + 0.25 * max(map(len, shares.values())))
    colours = SHARES(np.linspace(0.2, 0.95, len(tasks)))
    for ax, (title, share) in zip(figure.subplots(1, 2), shares.items(), strict=True):
        left = np.zeros(len(share))
        for task, name, colour in zip(share.columns, tasks, colours, strict=True):
            own = share[task].to_numpy()
            ax.barh(range(len(share)), own, left=left, color=[colour], label=name, height=0.7)
            left += own
        ax.set_yticks(range(len(share)), list(share.index))
        ax.set(xlim=(0, 100), ylim=(len(share) - 0.4, -0.6), ylabel=title)
        ax.set_xlabel("share of the eligible entries (%)")
        ax.grid(visible=False, axis="y")
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(tasks), frameon=False)
    members = [locks] if isinstance(locks, Result) else []
    figure.suptitle(titled("Who owns what: entries of each task, white of nobody", members))
    return figure


def _per_task(table: pd.DataFrame, what: str) -> pd.DataFrame:
    """``what`` over eligible, place by task; places in the order of the table."""
    sums = table.groupby(["place", "task"], sort=False)[[what, "eligible"]].sum()
    return (sums[what] / sums["eligible"]).unstack("task").loc[table["place"].unique()]


@styled
def owned_entries(recall: ExactRecall, name: str, *, size: int = 96) -> Figure:
    """The owners of a matrix's first weights, one square each; white is nobody's.

    Args:
        recall: with closed tasks.
        name: of a parameter with two dimensions, as in ``recall.mask(task)``.
        size: rows and columns that are shown at most.
    """
    masks = [recall.mask(task)[name].cpu().numpy() for task in recall.names]
    if any(mask.ndim != 2 for mask in masks):
        raise ValueError(f"{name} has shape {masks[0].shape}, expected two dimensions")
    shown = sum(number * mask[:size, :size] for number, mask in enumerate(masks, start=1))
    tasks = len(masks)
    colours = ListedColormap(["white", *SHARES(np.linspace(0.2, 0.95, max(tasks, 1)))])
    figure = Figure(1.4 + 4 * min(1.0, shown.shape[0] / shown.shape[1]))
    ax = figure.subplots()
    ax.imshow(shown, cmap=colours, vmin=-0.5, vmax=max(tasks, 1) + 0.5, interpolation="nearest")
    ax.grid(visible=False)
    ax.set(xlabel="column", ylabel="row")
    patches = [Patch(color=colours(task), label=f"task {task}") for task in range(1, tasks + 1)]
    figure.legend(handles=patches, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(f"Whose each entry of {name} is")
    return figure


def _view(result: Result) -> LockView:
    if not result.importance:
        raise ResultError(
            f"this result of strategy {result.protocol['strategy']!r} has no recorded importance: "
            "give a run of bitstack, made by this version"
        )
    return LockView.of_result(result)
