"""How every figure looks, and a Figure that draws the same whatever the user's settings are.

Figures are no part of pyplot's state: nothing is shown, and nothing has to be closed.
"""

from __future__ import annotations

import functools
import io
import textwrap
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.style
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

from bitstack_nb.results.result import Result, ResultError
from bitstack_nb.results.tables import configurations

WIDTH = 9.0  # inches: a notebook's column at DPI
DPI = 110
GREY = "0.35"
# Equal steps of lightness, so that it reads in grey and with any colour vision.
SHARES = sns.color_palette("YlGnBu", as_cmap=True)
COLOURS = sns.color_palette("colorblind")
MARKERS = "os^"  # the next one where the colours begin again
_STYLE = {
    **sns.axes_style("whitegrid"),
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so it is everywhere
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "figure.titlesize": 12,
    "figure.dpi": DPI,
    "axes.edgecolor": "0.7",
    "grid.color": "0.9",
}
_METHOD = ("strategy", "budget", "importance")
_STRATEGIES = {
    "finetune": "fine-tuning",
    "bitstack": "BitStack",
    "bitstack-strict": "BitStack strict",
    "random-mask": "random mask",
    "magnitude-mask": "magnitude mask",
    "recall": "exact recall",
    "frozen": "frozen backbone",
    "ewc": "EWC",
    "lora": "LoRA",
    "single": "separate models",
    "joint": "joint training",
}


class Figure(mpl.figure.Figure):
    """A figure on white, readable on a dark page too, that a notebook shows as it is returned."""

    def __init__(self, height: float) -> None:
        super().__init__(figsize=(WIDTH, height), layout="constrained", facecolor="white")
        FigureCanvasAgg(self)

    def draw(self, renderer: Any) -> None:
        """Draw; ticks are made only now, and must not follow the user's rcParams either."""
        with style():
            super().draw(renderer)

    def _repr_png_(self) -> bytes:
        """What IPython shows where pyplot's inline backend is not loaded."""
        return png(self)


def style() -> AbstractContextManager[None]:
    """The figures' rcParams, on top of matplotlib's defaults instead of the user's."""
    return mpl.style.context(["default", _STYLE])


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorator: make the figure under ``style`` and lay it out."""

    @functools.wraps(draw)
    def inner(*args: Any, **kwargs: Any) -> Figure:
        with style():
            figure = draw(*args, **kwargs)
            # Here and not at each drawing, where the second one would move things a little.
            figure.get_layout_engine().execute(figure)
            figure.set_layout_engine("none")
            return figure

    return inner


def png(figure: Figure, *, dpi: int = DPI) -> bytes:
    """The picture as PNG: the same bytes for the same figure."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def draw_shares(
    ax: Axes,
    percent: np.ndarray,
    *,
    rows: Sequence[Any] | None,
    columns: Sequence[Any] | None,
) -> None:
    """A heatmap of percentages [rows, columns], row 0 on top; NaN stays blank.

    With its numbers, unless there are more columns than numbers have room beside each other.
    """
    ax.pcolormesh(np.ma.masked_invalid(percent), vmin=0, vmax=100, cmap=SHARES, ec="white", lw=1)
    numbered = percent.shape[1] <= 12
    for (row, column), value in np.ndenumerate(percent):
        if numbered and np.isfinite(value):
            colour = "white" if value > 60 else "black"
            at = {"ha": "center", "va": "center", "color": colour, "size": 9, "in_layout": False}
            ax.text(column + 0.5, row + 0.5, f"{value:.0f}", **at)
    ax.set(xlim=(0, percent.shape[1]), ylim=(percent.shape[0], 0))
    ax.set_xticks(np.arange(percent.shape[1]) + 0.5, columns or [""] * percent.shape[1])
    ax.set_yticks(np.arange(percent.shape[0]) + 0.5, rows or [""] * percent.shape[0])
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set_visible(False)


# Names and colours of configurations -------------------------------------------------------------


class Group(NamedTuple):
    """The runs of one configuration, and how figures name, colour and mark them."""

    label: str
    colour: Any
    marker: str
    settings: dict[str, Any]
    results: list[Result]


def grouped(results: Iterable[Result]) -> list[Group]:
    """Configurations in the order of ``tables.table``: measured ones, then published ones.

    A colour and marker stand for a method (strategy, budget, importance), grey and a diamond for
    what was published elsewhere.
    Raises ResultError as ``tables.configurations`` does.
    """
    results = list(results)
    if not results:
        raise ResultError("there are no results to draw: give at least one")
    groups: list[Group] = []
    marks: dict[tuple[Any, ...], tuple[Any, str]] = {}
    # Apart, because a published protocol differs in everything and would lengthen every label.
    for published in (False, True):
        own = [result for result in results if is_published(result) == published]
        items = configurations(own) if own else []
        for label, item in zip(names([i.shown for i in items]), items, strict=True):
            further, at = divmod(len(marks), len(COLOURS))
            own_mark = COLOURS[at], MARKERS[further % len(MARKERS)]
            mark = marks.setdefault(_method(item.shown), own_mark)
            mark = (GREY, "D") if published else mark
            model = f" ({item.results[0].protocol.get('model')})" if published else ""
            groups.append(Group(label + model, *mark, item.shown, item.results))
    return groups


def _method(settings: dict[str, Any]) -> tuple[Any, ...]:
    """What a colour stands for; importance by gradient, the published one, goes without saying."""
    return tuple(None if (v := settings.get(name)) == "gradient" else v for name in _METHOD)


def names(settings: list[dict[str, Any]]) -> list[str]:
    """What tells configurations apart: the method on a line, further settings below it.

    Sparsities and data are named where they differ at all; other settings, such as the learning
    rate that was tuned for a strategy, where nothing else tells two configurations apart.
    """
    return [_name(entries, _told_apart(entries, settings)) for entries in settings]


def _told_apart(entries: dict[str, Any], settings: list[dict[str, Any]]) -> set[str]:
    """The settings that a configuration's label has to name."""
    named = (*_METHOD, "sparsity", "data")
    alike = [o for o in settings if all(o.get(n) == entries.get(n) for n in named)]
    widely = {n for n in ("sparsity", "data") if len({o.get(n) for o in settings} - {None}) > 1}
    return widely | {n for n in entries if len({o.get(n) for o in alike}) > 1}


def _name(settings: dict[str, Any], told_apart: set[str]) -> str:
    strategy, *kind = _method(settings)
    head = " ".join(filter(None, [_STRATEGIES.get(strategy, strategy), *kind]))
    further = []
    for name, value in settings.items():
        if name in _METHOD or value is None:
            continue
        if name == "published":
            further.append(name)
        elif name in told_apart:
            number = f"{value:.10g}" if isinstance(value, float) else value
            further.append(f"{name.replace('_', ' ')} {number}")
    return "\n".join([head, *textwrap.wrap(", ".join(further), 32)])


def counted(label: str, numbers: Iterable[int]) -> str:
    """A label that ends with how many seeds there are."""
    numbers = list(numbers)
    n = " to ".join(map(str, dict.fromkeys([min(numbers), max(numbers)])))
    *lines, last = label.splitlines()
    return "\n".join([*lines, f"{last}{', ' if len(last) < 24 else chr(10)}n = {n}"])


def titled(title: str, results: Iterable[Result]) -> str:
    """The title of a figure, saying so where what it shows is no real text."""
    synthetic = any(result.protocol.get("data") == "embedded" for result in results)
    return f"{title} (synthetic tasks)" if synthetic else title


def described(result: Result) -> str:
    """One run in words: strategy, budget, sparsity, seed."""
    (group,) = grouped([result])
    sparsity, seed = result.protocol.get("sparsity"), result.protocol.get("seed")
    return f"{' '.join(group.label.splitlines())}, sparsity {sparsity}, seed {seed}"


def task_names(result: Result) -> list[str]:
    """The names of a run's tasks in training order, or their numbers where it names none."""
    tasks = result.protocol.get("tasks")
    if tasks:
        return [task["name"] for task in tasks]
    return [f"task {number}" for number in range(1, len(result.matrix or []) + 1)]


def shared_task_names(results: list[Result]) -> list[str]:
    """The tasks' names, or their numbers where the runs have them in different orders."""
    orders = [task_names(result) for result in results]
    if all(order == orders[0] for order in orders):
        return orders[0]
    return [f"task {number}" for number in range(1, max(map(len, orders)) + 1)]


def is_published(result: Result) -> bool:
    """Whether the numbers come from elsewhere."""
    return bool(result.provenance.get("published"))
