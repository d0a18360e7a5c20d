"""The explorer's heatmap: drawn once, then only what changes, so that it follows a slider."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D
from PIL import Image

from bitstack_nb.figures.locks import short_names
from bitstack_nb.figures.style import DPI, SHARES, style

_WIDTH, _LOWEST, _HIGHEST = 5.6, 2.6, 9.0  # inches
_ROW = 0.24  # inches; lower rows have no room for a number


class LockPicture:
    """A heatmap of shares, layer by module, on a fixed scale of 0 to 100 %.

    Args:
        cells: layer (None outside the blocks) and module of each share, as ``LockCurves.cells``.

    Frame, labels and colour bar are drawn once. The numbers are outlines made once as well, because
    laying out a text per cell would take longer than all the rest.
    """

    def __init__(self, cells: Sequence[tuple[int | None, str, int]]) -> None:
        layers = sorted({layer for layer, *_ in cells if layer is not None})
        layers += [None] if any(layer is None for layer, *_ in cells) else []
        inside = [module for layer, module, _ in cells if layer is not None]
        modules = list(dict.fromkeys([*inside, *(module for _, module, _ in cells)]))
        self._rows = np.array([layers.index(layer) for layer, *_ in cells])
        self._columns = np.array([modules.index(module) for _, module, _ in cells])
        self._grid = np.ma.masked_all((len(layers), len(modules)))
        with style():
            self._build(["other" if layer is None else str(layer) for layer in layers], modules)

    def png(self, shares: np.ndarray, *, title: str) -> bytes:
        """Draw.

        Args:
            shares: float64 [cells], 0 to 1, in the order of the cells.
            title: one line above the heatmap.
        """
        self._grid[self._rows, self._columns] = 100 * shares
        self._mesh.set_array(self._grid)
        self._title.set_text(title)
        percent = np.rint(100 * shares).astype(int)
        dark = SHARES(shares)[:, :3] @ (0.299, 0.587, 0.114) < 0.55
        self._numbers.set_paths([self._outlines[number] for number in percent])
        self._numbers.set_facecolor(np.where(dark[:, None], (1.0, 1.0, 1.0), (0.15, 0.15, 0.15)))
        self._canvas.restore_region(self._background)
        for artist in (self._mesh, self._numbers, self._title):
            self._axes.draw_artist(artist)
        picture = Image.fromarray(np.asarray(self._canvas.buffer_rgba())).convert("RGB")
        buffer = io.BytesIO()
        # A palette is faster to compress, and a third of the bytes on the way to the page.
        picture = picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        picture.save(buffer, "png", compress_level=1)
        return buffer.getvalue()

    def _build(self, layers: list[str], modules: list[str]) -> None:
        names = short_names(modules)
        height = 0.9 + 0.08 * max(map(len, names)) + _ROW * len(layers)
        height = float(np.clip(height, _LOWEST, _HIGHEST))
        figure = Figure(figsize=(_WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
        self._canvas = FigureCanvasAgg(figure)
        self._axes = figure.subplots()
        self._axes.grid(visible=False)
        self._axes.set_facecolor("0.93")  # where a layer has no such module
        look = {"cmap": SHARES, "vmin": 0, "vmax": 100, "edgecolors": "white", "linewidth": 0.5}
        self._mesh = self._axes.pcolormesh(self._grid, animated=True, **look)
        self._axes.invert_yaxis()
        self._axes.set_xticks(np.arange(len(modules)) + 0.5, names, rotation=90)
        self._axes.set_yticks(np.arange(len(layers)) + 0.5, layers)
        self._axes.set_ylabel("layer")
        self._title = self._axes.set_title(" ", animated=True)
        bar = figure.colorbar(self._mesh, ax=self._axes, aspect=30)
        bar.set_label("% of the module's entries")
        self._canvas.draw()
        self._background = self._canvas.copy_from_bbox(figure.bbox)
        self._numbers, self._outlines = self._make_numbers()

    def _make_numbers(self) -> tuple[PathCollection, list[TextPath]]:
        """One artist for the numbers in all cells, and the outlines of 0 to 100, in pixels."""
        room = self._axes.bbox.height / self._grid.shape[0] >= 0.5 * _ROW * DPI
        outlines = []
        for number in range(101):
            outline = TextPath((0, 0), str(number) if room else "", size=8)
            box = outline.get_extents()
            centre = Affine2D().translate(-(box.x0 + box.x1) / 2, -(box.y0 + box.y1) / 2)
            outlines.append(outline.transformed(centre.scale(DPI / 72)) if room else outline)
        numbers = PathCollection(
            [],
            offsets=np.stack([self._columns + 0.5, self._rows + 0.5], axis=1),
            offset_transform=self._axes.transData,
            linewidths=0,
            animated=True,
        )
        numbers.set_transform(Affine2D())
        self._axes.add_collection(numbers, autolim=False)
        return numbers, outlines
