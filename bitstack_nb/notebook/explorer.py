"""The sparsity explorer: a slider, and what that sparsity would lock, redrawn as it moves.

Only widgets that ipywidgets 7.7 and 8 share, so that it runs on Colab and in JupyterLab. What is
shown comes from ``lock_view`` (numbers) and ``lock_picture`` (heatmap); this is the layer above.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

import ipywidgets as widgets

from bitstack_nb.benchmark.curves import SPARSITIES
from bitstack_nb.figures.lock_picture import LockPicture
from bitstack_nb.figures.lock_view import TOGETHER, LockView
from bitstack_nb.notebook.retrain import Retraining, stop_running
from bitstack_nb.results.result import Result
from bitstack_nb.settings import BUDGETS
from bitstack_nb.stack import BitStack


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
        loader, n_batches: for a stack, what ``update`` would be given.
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
        image, numbers: the picture (PNG) and the numbers (HTML) of what they say.
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

    def __repr__(self) -> str:  # what a page without widgets shows
        return "Explorer: open this notebook in Jupyter or Colab and run it to move the slider"

    def show(self, view: LockView) -> None:
        """Show other importance, at the same sparsity and budget."""
        with self._lock:
            self._show(view)
            self._redraw()

    def _show(self, view: LockView) -> None:
        self._view, self._picture = view, LockPicture(view.curves.cells)
        numbers = range(len(view.tasks) + 1)
        self.task.options = [(view.name(number), number) for number in numbers]
        self.task.value = TOGETHER

    def _redraw(self, change: Any = None) -> None:
        with self._lock:
            sparsity, budget, task = self.sparsity.value, self.budget.value, self.task.value
            shares = self._view.shares(sparsity, budget=budget, task=task)
            title = f"{self._view.name(task)}, sparsity {sparsity:.0%}, budget {budget}"
            self.image.value = self._picture.png(shares, title=title)
            self.numbers.value = self._view.html(sparsity, budget=budget, task=task)


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
        self._settings = f"smoke benchmark at sparsity {sparsity:.0%}, budget {budget}"
        self.start.disabled, self.stop.disabled = True, False
        self.progress.value, self.progress.layout.visibility = 0, "visible"
        self.message.value = f"{self._settings}: starting"
        self.run = Retraining(
            sparsity,
            budget,
            output=self._output,
            on_progress=self._show_progress,
            on_end=self._end,
        )

    def _show_progress(self, done: int, total: int, what: str) -> None:
        self.progress.max, self.progress.value = total, done
        self.message.value = f"{self._settings}: {done} of {total} batches, {escape(what)}"

    def _end(self, result: Result | None, reason: str) -> None:
        self.start.disabled, self.stop.disabled = False, True
        self.progress.layout.visibility = "hidden"
        if result is None:
            self.message.value = f"{self._settings}: {escape(reason)}"
            return
        average, forgetting = (result.metrics[n] for n in ("average_accuracy", "forgetting"))
        forgot = "" if forgetting is None else f", forgetting {forgetting:.1f} points"
        self._explorer.show(LockView.of_result(result))
        self.message.value = (
            f"{self._settings}, seed {result.protocol['seed']}, synthetic texts: average accuracy "
            f"{average:.1f}%{forgot}. Shown above: what this run's importance would lock."
        )
