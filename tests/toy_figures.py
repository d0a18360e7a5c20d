"""Made-up runs that figures are tested on, and the numbers that a figure shows."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from toy_results import TASKS, published, run

from bitstack_nb.figures import accuracy, locks
from bitstack_nb.results.result import Result


def runs(strategy: str = "bitstack", **settings: Any) -> list[Result]:
    """A run per seed."""
    return [run(strategy, seed, **settings) for seed in range(3)]


PAPER = [published("bitstack", 3.8), published("finetune", 14.5)]
BITSTACK, FINETUNE, JOINT, SINGLE = runs(), runs("finetune"), runs("joint"), runs("single")
FRESH = {sparsity: runs(budget="fresh", sparsity=sparsity) for sparsity in (0.05, 0.4)}
UNION = {0.12: BITSTACK, 0.4: runs(sparsity=0.4)}
SWEEP = [*(r for own in (UNION, FRESH) for found in own.values() for r in found), *FINETUNE]
ALL = [*SWEEP, *JOINT, *SINGLE, *PAPER]
OF_RESULTS = (
    accuracy.accuracy_matrices,
    accuracy.forgetting_per_task,
    accuracy.comparison,
    accuracy.paired_differences,
    accuracy.task_differences,
    accuracy.accuracy_for_storage,
    accuracy.drift_attribution,
    locks.ablation,
    locks.capacity,
)
OF_A_RUN = (locks.lock_heatmaps, locks.task_overlap, locks.mask_weight)
TWENTY = [f"dbpedia_{number}-{number + 1}" for number in range(20)]
MANY_TASKS = [r for name in ("bitstack", "finetune", "single") for r in runs(name, tasks=TWENTY)]
__all__ = ["TASKS", "run"]


def row(ax: Axes, label: str) -> tuple[float, float | None, list[float]]:
    """The mean, half width and single seeds in the row whose label begins so."""
    names = [text.get_text() for text in ax.figure.axes[0].get_yticklabels()]
    (at,) = [at for at, name in enumerate(names) if name.replace("\n", " ").startswith(label)]
    (drawn,) = [c for c in ax.containers if c.lines[0].get_ydata()[0] == at]
    dots = [line for line in ax.lines if np.array_equal(set(line.get_ydata()), {at + 0.25})]
    seeds = [float(value) for line in dots for value in line.get_xdata()]
    half = None
    if drawn.has_xerr:
        ((low, _), (high, _)) = drawn.lines[2][0].get_segments()[0]
        half = (high - low) / 2
    return drawn.lines[0].get_xdata()[0], half, seeds


def shares(ax: Axes) -> np.ndarray:
    """The numbers of a heatmap's cells, NaN where it is blank."""
    return np.ma.filled(ax.collections[0].get_array(), np.nan)


def titles(figure: Figure) -> list[str]:
    """The titles of the panels."""
    return [ax.get_title() for ax in figure.axes if ax.get_title()]


def row_names(figure: Figure) -> list[str]:
    """The labels of the first panel's rows, each in one line."""
    return [" ".join(text.get_text().split()) for text in figure.axes[0].get_yticklabels()]
