"""The sparsity explorer: a slider, and the weights that its sparsity would lock, drawn as it moves.

It needs only widgets that ipywidgets 7.7 and 8 share, so it runs on Colab and in JupyterLab.
``lock_view`` has the numbers; this file shows them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler
from PIL import Image

from bitstack_nb.benchmark.curves import SPARSITIES
from bitstack_nb.benchmark.protocol import PRESETS
from bitstack_nb.figures.style import Figure, colour_bar, heatmap, lay_out, refill, small_png, style
from bitstack_nb.notebook.lock_view import TOGETHER, LockView
from bitstack_nb.notebook.retrain import Retraining, stop_running
from bitstack_nb.results.result import Result
from bitstack_nb.settings import BUDGETS
from bitstack_nb.stack import BitStack

SMOKE = PRESETS["smoke"]  # the run of the button


def explore(
    source: Result | BitStack | LockView,
    loader: Iterable[Mapping[str, Any]] | None = None,
    *,
    n_batches: int = 32,
    output: str | os.PathLike[str] = "results/runs",
) -> Explorer:
    """The explorer of a recorded run, or of what a live stack's next ``update`` would lock.

    Args:
        source: a result with recorded importance, any other lock curves as a :class:`LockView`,
            or a stack, which is left as it is.
        loader, n_batches: for a stack, the arguments of ``update``.
        output: folder for runs that the button starts (there is none for a stack).

    Raises:
        ValueError: the result has no recorded importance, or a stack comes without a loader.
    """
    if isinstance(source, BitStack):
        if loader is None:
            raise ValueError(
                "a stack needs batches to measure importance on: explore(stack, loader)"
            )
        return Explorer(LockView.of_stack(source, loader, n_batches=n_batches))
    view = LockView.of_result(source) if isinstance(source, Result) else source
    return Explorer(view, output=output)


class Explorer(widgets.VBox):
    """Controls, the heatmap, the numbers and, with an ``output``, the retraining button.

    Attributes:
        sparsity, task, budget: the controls; setting ``value`` redraws.
        image, numbers: the picture (PNG) and the numbers (HTML) of their choice.
        retraining: the panel below, or None.
    """

    def __init__(self, view: LockView, *, output: str | os.PathLike[str] | None = None) -> None:
        # Events come from the page's thread, the end of a run from the one that follows it.
        self._lock = threading.RLock()
        self.sparsity = widgets.FloatSlider(
            min=SPARSITIES[0],
            max=SPARSITIES[-1],
            step=SPARSITIES[1],
            description="sparsity",
            readout_format=".0%",
            layout=widgets.Layout(width="360px"),
        )
        self.task = widgets.Dropdown(description="task", layout=widgets.Layout(width="290px"))
        self.budget = widgets.Dropdown(
            options=BUDGETS, description="budget", layout=widgets.Layout(width="180px")
        )
        self.image = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))
        # Beside the picture where there is room, else below it.
        self.numbers = widgets.HTML(layout=widgets.Layout(flex="1 1 380px", margin="0 0 0 16px"))
        self._show(view)
        self.sparsity.value = min(round(view.sparsity, 2), SPARSITIES[-1])
        self.budget.value = view.budget
        self._redraw()
        for control in (self.sparsity, self.task, self.budget):
            control.observe(self._redraw, "value")
        self.retraining = None if output is None else RetrainingPanel(self, output)
        wrap = widgets.Layout(flex_flow="row wrap", align_items="flex-start")
        parts = [
            widgets.HBox([self.sparsity, self.task, self.budget], layout=wrap),
            widgets.HBox([self.image, self.numbers], layout=wrap),
        ]
        super().__init__([*parts, *([self.retraining] if self.retraining else [])])

    def __repr__(self) -> str:  # shown by a page without widgets
        return "Explorer: open this notebook in Jupyter or Colab and run it to move the slider"

    def show(self, view: LockView) -> None:
        """Show other importance, at the same sparsity and budget."""
        with self._lock:
            self._show(view)
            self._redraw()

    def _show(self, view: LockView) -> None:
        self._view = view
        self._picture = LockPicture(view.shares(0, budget=BUDGETS[0], task=TOGETHER))
        numbers = range(len(view.tasks) + 1)
        self.task.options = [(view.name(number), number) for number in numbers]
        self.task.value = TOGETHER

    def _redraw(self, change: Any = None) -> None:
        with self._lock:
            sparsity = self.sparsity.value
            choice = {"budget": self.budget.value, "task": self.task.value}
            facts = self._view.facts(sparsity, **choice)
            by_task = self._view.by_task(sparsity, **choice)
            self.image.value = self._picture.png(
                self._view.shares(sparsity, **choice), title=facts["shown"]
            )
            self.numbers.value = _html(facts, by_task, self._view.source)


def _html(facts: Mapping[str, str], by_task: pd.DataFrame, source: str) -> str:
    """The numbers as HTML that takes its colours from the page."""
    said = _table(pd.Series(facts).to_frame().style.hide(axis="columns"))
    note = "Overlap: weights shared of those united, of choices with the masks lifted."
    end = f"{escape(source)}. {note if len(by_task) > 1 else ''}"
    return f"{said}<br>{_table(by_task.style)}<small>{end}</small>"


def _table(styler: Styler) -> str:
    look = "text-align: left; padding: 1px 12px 1px 0; line-height: 1.35; vertical-align: top"
    styler.format(escape="html", na_rep="").format_index(escape="html")
    styler.set_table_styles([{"selector": "th, td", "props": look}])
    return styler.set_uuid("bitstack").to_html()


class LockPicture:
    """The explorer's heatmap: drawn once, then only its cells, numbers and title, so it is fast.

    Args:
        percent: layer by module, as ``LockView.shares``.
    """

    def __init__(self, percent: pd.DataFrame) -> None:
        with style():
            below = 0.08 * max(map(len, percent.columns))
            self._figure = Figure(min(0.9 + below + 0.24 * len(percent), 9.0), width=5.6)
            self._axes = self._figure.subplots()
            heatmap(self._axes, percent)
            self._axes.set_ylabel("layer")
            colour_bar(self._figure, np.array([self._axes]), "% of the module's weights", aspect=30)
            self._title = self._axes.set_title(" ")
            lay_out(self._figure)
        self._moving = [self._axes.collections[0], *self._axes.texts, self._title]
        for artist in self._moving:
            artist.set_animated(True)
        canvas = self._figure.canvas
        canvas.draw()
        self._background = canvas.copy_from_bbox(self._figure.bbox)

    def png(self, percent: pd.DataFrame, *, title: str) -> bytes:
        """The picture with these percentages and a line above."""
        refill(self._axes, percent)
        self._title.set_text(title)
        canvas = self._figure.canvas
        canvas.restore_region(self._background)
        for artist in self._moving:
            self._axes.draw_artist(artist)
        return small_png(Image.fromarray(np.asarray(canvas.buffer_rgba())), fast=True)


class RetrainingPanel(widgets.VBox):
    """Buttons that retrain the smoke benchmark at an explorer's settings and stop it; progress.

    A run that an earlier panel started is stopped: when a cell is run again, nothing shows it.
    """

    def __init__(self, explorer: Explorer, output: str | os.PathLike[str]) -> None:
        stop_running()
        self._explorer, self._output = explorer, output
        self.start = widgets.Button(
            description="Retrain the smoke benchmark at this sparsity",
            layout=widgets.Layout(width="360px"),
        )
        self.stop = widgets.Button(description="Stop", disabled=True)
        self.progress = widgets.IntProgress(layout=widgets.Layout(visibility="hidden"))
        self.message = widgets.HTML()
        self.run: Retraining | None = None
        self.start.on_click(self._start)
        self.stop.on_click(lambda _: self.run.stop())
        row = widgets.HBox([self.start, self.stop, self.progress])
        super().__init__([row, self.message])

    def _start(self, _: Any) -> None:
        sparsity, budget = self._explorer.sparsity.value, self._explorer.budget.value
        self._settings = f"smoke benchmark at sparsity {100 * sparsity:.0f} %, budget {budget}"
        self.start.disabled, self.stop.disabled = True, False
        self.progress.value, self.progress.layout.visibility = 0, "visible"
        self._say("starting")
        protocol = SMOKE.with_strategy("bitstack", sparsity=round(sparsity, 2), budget=budget)
        self.run = Retraining(
            protocol, output=self._output, on_progress=self._show_progress, on_end=self._end
        )

    def _say(self, text: str) -> None:
        self.message.value = f"{self._settings}: {escape(text)}"

    def _show_progress(self, done: int, total: int) -> None:
        self.progress.max, self.progress.value = total, done
        self._say(f"{done} of {total} batches")

    def _end(self, result: Result | None, reason: str) -> None:
        self.start.disabled, self.stop.disabled = False, True
        self.progress.layout.visibility = "hidden"
        if result is None:
            self._say(reason)
            return
        average, forgetting = (result.metrics[n] for n in ("average_accuracy", "forgetting"))
        forgot = "" if forgetting is None else f", forgetting {forgetting:.1f} points"
        self._explorer.show(LockView.of_result(result))
        self._say(
            f"synthetic texts, seed {result.protocol['seed']}: average accuracy {average:.1f} %"
            f"{forgot}. Above: the weights that this run's importance would lock."
        )
