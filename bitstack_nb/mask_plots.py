"""Figures of masks: what the tasks' masks share, and what a mask weighs. Each returns a Figure."""

from __future__ import annotations

from collections.abc import Sequence

import seaborn as sns

from bitstack_nb.lock_view import LockView, size
from bitstack_nb.plot_style import SHARES, Figure, styled, titled
from bitstack_nb.results import Result, ResultError


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
    figure.suptitle(titled("Overlap of what the tasks choose, masks lifted", [result]))
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
    ax.set_title(
        f"BitStack {budget}, sparsity {sparsity:g}, {numbers.total / 1e6:.1f} M parameters"
    )
    figure.suptitle(titled("What a mask weighs", [result]))
    return figure


def _view(result: Result) -> LockView:
    if not result.importance:
        raise ResultError(
            f"this result of strategy {result.protocol['strategy']!r} has no recorded importance: "
            "give a run of bitstack, made by this version"
        )
    return LockView.of_result(result)
