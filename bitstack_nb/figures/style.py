"""The look of every figure: sizes, colours, the heatmap, and PNG bytes.

A figure looks the same with any settings of the user. It is no part of pyplot's state: nothing has
to be shown or closed.
"""

from __future__ import annotations

import base64
import functools
import io
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
import matplotlib.style
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import EngFormatter
from PIL import Image

WIDTH = 9.0  # inches
SHOWN_DPI = 110  # pixels of a page per inch, so a figure fills a notebook's column
DPI = 2 * SHOWN_DPI  # pixels of a picture per inch, as many screens have twice a page's pixels
GREY = "0.35"
# Equal steps of lightness, readable in grey and with any colour vision.
SHARES = sns.color_palette("YlGnBu", as_cmap=True)
BYTES = EngFormatter(unit="B", places=1)  # 10.9 MB
COLOURS = sns.color_palette("colorblind")
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


class Figure(mpl.figure.Figure):
    """A figure on white, readable on a dark page too, that a notebook shows as it is returned.

    The colours are chosen for white, so the background is white everywhere.
    """

    def __init__(self, height: float, *, width: float = WIDTH) -> None:
        super().__init__(figsize=(width, height), layout="constrained", facecolor="white")
        FigureCanvasAgg(self)

    def draw(self, renderer: Any) -> None:
        """Draw under ``style``: ticks are made only now, and would follow the user's rcParams."""
        with style():
            super().draw(renderer)

    def _ipython_display_(self) -> None:
        """Show the picture, with its width on the page, and the title as alt text.

        IPython's own printer of matplotlib figures would crop it, in notebooks that use pyplot.
        """
        from IPython.display import display

        picture, title = base64.b64encode(png(self)).decode(), self.get_suptitle()
        shown = {"width": round(self.get_figwidth() * SHOWN_DPI), "alt": title}
        data = {"image/png": picture, "text/plain": title}
        display(data, metadata={"image/png": shown}, raw=True)


def style() -> AbstractContextManager[None]:
    """The figures' rcParams, on top of matplotlib's defaults instead of the user's."""
    return mpl.style.context(["default", _STYLE])


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorator: make the figure under ``style`` and lay it out once."""

    @functools.wraps(draw)
    def inner(*args: Any, **kwargs: Any) -> Figure:
        with style():
            figure = draw(*args, **kwargs)
            lay_out(figure)
            return figure

    return inner


def lay_out(figure: Figure) -> None:
    """Place everything; later drawings, which would move things a little, keep the places."""
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")


def panels(
    count: int, columns: int, *, above: float, each: float, **shared: bool
) -> tuple[Figure, np.ndarray]:
    """A figure and its ``count`` axes, row by row.

    Args:
        count, columns: panels in all, and side by side.
        above, each: height in inches of what is around the panels, and of a row of them.
        shared: ``sharex`` and ``sharey`` of ``Figure.subplots``.
    """
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(above + each * rows)
    axes = figure.subplots(rows, columns, squeeze=False, **shared).ravel()
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def heatmap(
    ax: Axes, percent: pd.DataFrame, *, top: float = 100, rows: bool = True, columns: bool = True
) -> None:
    """A heatmap of percentages, the first row on top; NaN stays blank.

    Numbers stand in the cells if there is room for them.

    Args:
        ax: empty axes.
        percent: its index and columns are the labels.
        top: the end of the colour scale, which begins at 0.
        rows, columns: whether the labels are shown.
    """
    # Not seaborn's heatmap, which draws the whole figure once per panel to look for overlaps.
    ax.pcolormesh(np.zeros(percent.shape), vmin=0, vmax=top, cmap=SHARES, ec="white", lw=1)
    ax.set(xlim=(0, percent.shape[1]), ylim=(percent.shape[0], 0))
    for axis, labels, shown in (
        (ax.xaxis, percent.columns, columns),
        (ax.yaxis, percent.index, rows),
    ):
        axis.set_ticks(np.arange(len(labels)) + 0.5, labels if shown else [""] * len(labels))
    ax.tick_params("x", rotation=90)
    ax.grid(visible=False)
    sns.despine(ax=ax, left=True, bottom=True)
    values, mesh = percent.to_numpy(float), ax.collections[0]
    mesh.set_array(np.ma.masked_invalid(values))
    digits = ".0f" if top >= 20 else ".1f" if top >= 1 else ".2g"
    for row, column in np.argwhere(np.isfinite(values)) if percent.shape[1] <= 12 else ():
        value = values[row, column]
        look = {"size": 9, "color": "white" if value > 0.6 * top else "black", "in_layout": False}
        at = {"ha": "center", "va": "center"}
        ax.text(column + 0.5, row + 0.5, f"{value:{digits}}", **at, **look)


def colour_bar(figure: Figure, axes: np.ndarray, label: str, **place: Any) -> None:
    """The colour scale that the heatmaps of a figure share."""
    figure.colorbar(axes[0].collections[0], ax=axes.tolist(), **place).set_label(label)


def note(figure: Figure, text: str) -> None:
    """A line in grey below a figure."""
    figure.supxlabel(text, fontsize=9, color=GREY)


def png(figure: Figure) -> bytes:
    """The picture as PNG with a palette of 256 colours: the same bytes for the same figure.

    That takes a third of the bytes, and no difference is to be seen.
    """
    drawn, small = io.BytesIO(), io.BytesIO()
    with style():
        figure.savefig(drawn, format="png", dpi=DPI)
    picture = Image.open(drawn).convert("RGB")
    reduced = picture.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    reduced.save(small, "png", compress_level=9)
    return small.getvalue()
