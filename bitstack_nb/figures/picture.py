"""The picture of both methods: base, locked or own weights, heads.

``docs/mechanism.png`` in the README holds ``png(mechanism())``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from bitstack_nb.figures.style import COLOURS, Figure, styled

ROWS, COLUMNS, PER_TASK = 6, 11, 7
_FREE, _MOVED = "0.93", "0.78"
_TASKS = {"reviews": COLOURS[0], "news": COLOURS[1]}


@styled
def mechanism() -> Figure:
    """Draw one small grid of weights at three moments, for BitStack and for exact recall."""
    figure = Figure(3.9)
    axes = figure.subplots(2, 3)
    figure.suptitle(
        "A square is a weight: in colour if locked or own, dark grey if moved. A box is a head"
    )
    order = np.random.default_rng(4).permutation(ROWS * COLUMNS)
    own = {
        name: order[PER_TASK * number : PER_TASK * (number + 1)]
        for number, name in enumerate(_TASKS)
    }
    reviews = {"reviews": own["reviews"]}
    _grid(axes[0, 0], "BitStack: before task 1\nevery weight may move", {})
    _grid(
        axes[0, 1], "after task 1, reviews\nall have moved, its weights are locked", reviews, _MOVED
    )
    _grid(axes[0, 2], "after task 2, news\nlocks add up, the rest has moved", own, _MOVED)
    _grid(axes[1, 0], "Exact recall: the base\nit never changes", {})
    _grid(axes[1, 1], "reviews = the base\n+ own weights + head", reviews)
    _grid(axes[1, 2], "news = the base\n+ own weights + head", {"news": own["news"]})
    return figure


def _grid(ax: Axes, title: str, own: Mapping[str, np.ndarray], rest: str = _FREE) -> None:
    """Draw the weights, those of each task in its colour, and the tasks' heads on the right."""
    colours = {place: _TASKS[name] for name, places in own.items() for place in places}
    for place in range(ROWS * COLUMNS):
        row, column = divmod(place, COLUMNS)
        look = {"facecolor": colours.get(place, rest), "edgecolor": "0.7"}
        ax.add_patch(Rectangle((column, row), 0.88, 0.88, **look))
    for number, name in enumerate(own):
        middle = ROWS * (number + 1) / (len(own) + 1)
        look = {"boxstyle": "round,pad=0.1", "facecolor": _TASKS[name], "edgecolor": "none"}
        ax.add_patch(FancyBboxPatch((COLUMNS + 0.7, middle - 0.6), 3.4, 1.2, **look))
        ax.text(COLUMNS + 2.4, middle, name, ha="center", va="center", color="white", size=9)
    ax.set(xlim=(-0.2, COLUMNS + 4.6), ylim=(ROWS, -0.2), aspect="equal")
    ax.set_title(title, loc="left")
    ax.axis("off")
