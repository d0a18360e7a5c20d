"""The explorer's retraining panel: a run of the smoke benchmark at a sparsity, and its locks.

It needs only widgets that ipywidgets 7.7 and 8 share, so it runs on Colab and in JupyterLab.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from typing import Any

import ipywidgets as widgets

from bitstack_nb.benchmark.curves import SPARSITIES
from bitstack_nb.benchmark.protocol import PRESETS
from bitstack_nb.figures.report import summary
from bitstack_nb.notebook.explorer import Explorer, explore
from bitstack_nb.notebook.retrain import Retraining, stop_running
from bitstack_nb.results import readable
from bitstack_nb.results.result import Result
from bitstack_nb.settings import BUDGETS

SMOKE = PRESETS["smoke"]
_RECORDED = "the recorded run"


class RetrainingPanel(widgets.VBox):
    """Controls, progress, a table of the runs so far, and the explorer of one of them.

    A run that an earlier panel started is stopped: when a cell is run again, nothing shows it.

    Attributes:
        sparsity, budget: of the next run.
        start, stop: the buttons.
        shown: the run that ``page`` shows, once there is one.
        history: the table, with fine-tuning in its first row.
    """

    def __init__(self, explorer: Explorer, output: str | os.PathLike[str]) -> None:
        stop_running()
        self._pages, self._output = {_RECORDED: explorer}, output
        self._results: list[Result] = []
        self.run: Retraining | None = None
        self.sparsity = widgets.FloatSlider(
            value=explorer.view.sparsity,
            min=SPARSITIES[0],
            max=SPARSITIES[-1],
            step=SPARSITIES[1],
            description="sparsity",
            readout_format=".0%",
        )
        self.budget = widgets.Dropdown(
            options=BUDGETS, value=explorer.view.budget, description="budget"
        )
        self.start, self.stop = (
            widgets.Button(description=text) for text in ("Retrain at this sparsity", "Stop")
        )
        self.start.layout.width, self.stop.disabled = "220px", True
        self.progress = widgets.IntProgress(layout=widgets.Layout(visibility="hidden"))
        self.message, self.history, self.page = (widgets.HTML() for _ in range(3))
        self.shown = widgets.Dropdown(
            options=[_RECORDED], description="show", layout=widgets.Layout(display="none")
        )
        self._explain()
        self.start.on_click(self._start)
        self.stop.on_click(lambda _: self.run.stop())
        self.shown.observe(self._show, "value")
        rows = [[self.sparsity, self.budget], [self.start, self.stop, self.progress]]
        boxes = [widgets.HBox(row, layout=widgets.Layout(flex_flow="row wrap")) for row in rows]
        super().__init__([*boxes, self.message, self.history, self.shown, self.page])

    def _explain(self) -> None:
        """Give each control its tooltip, which ipywidgets 7 and 8 name differently."""
        for control, text in (
            (self.sparsity, "the share of the eligible weights that a task may lock"),
            (self.budget, "union: tasks may choose the same weights. fresh: new ones only"),
            (self.start, "train the smoke benchmark, after fine-tuning to compare with"),
            (self.stop, "end the run; the same settings go on after the last finished task"),
            (self.shown, "the run that the page below shows"),
        ):
            own = "tooltip" if control.has_trait("tooltip") else "description_tooltip"
            setattr(control, own, text)

    def _start(self, _: Any) -> None:
        sparsity, budget = round(self.sparsity.value, 2), self.budget.value
        self._name = f"retrained at sparsity {100 * sparsity:.0f} %, {budget}"
        self.start.disabled, self.stop.disabled = True, False
        self.progress.value, self.progress.layout.visibility = 0, "visible"
        self._say("starting")
        protocols = [
            SMOKE.with_strategy("finetune"),
            SMOKE.with_strategy("bitstack", sparsity=sparsity, budget=budget),
        ]
        self.run = Retraining(
            protocols, output=self._output, on_progress=self._show_progress, on_end=self._end
        )

    def _say(self, text: str) -> None:
        self.message.value = f"{self._name}: {escape(text)}"

    def _show_progress(self, strategy: str, done: int, total: int) -> None:
        self.progress.max, self.progress.value = total, done
        self._say(f"{strategy}, {done} of {total} batches")

    def _end(self, results: Sequence[Result], reason: str) -> None:
        self.start.disabled, self.stop.disabled = False, True
        self.progress.layout.visibility = "hidden"
        if not results:
            self._say(reason)
            return
        known = [result.protocol for result in self._results]
        self._results += [result for result in results if result.protocol not in known]
        numbers = readable(summary(self._results)).iloc[:, :5]
        self.history.value = numbers.to_html(index=False, border=0)
        self._pages[self._name] = explore(results[-1], results=self._results)
        self.shown.options, self.shown.layout.display = list(self._pages), None
        self.shown.value = self._name
        self._say(f"done, on synthetic texts, seed {SMOKE.seed}. The page shows its locks.")

    def _show(self, change: Any) -> None:
        self.page.value = self._pages[change["new"]].frame()
