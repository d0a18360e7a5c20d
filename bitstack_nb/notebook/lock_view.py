"""The weights that a sparsity would lock: of a recorded run, or of a live stack's next task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import pandas as pd

from bitstack_nb.benchmark.curves import CurveRecorder, LockCurves
from bitstack_nb.figures.locks import shares
from bitstack_nb.figures.methods import task_names
from bitstack_nb.figures.style import BYTES
from bitstack_nb.results.result import Result
from bitstack_nb.stack import BitStack

TOGETHER = 0  # all tasks together; a task is chosen by its number, counting from 1


@dataclass(frozen=True)
class LockView:
    """Lock curves and what is needed to show them.

    Attributes:
        curves: of ``len(tasks)`` tasks.
        tasks: their names, in order.
        total: parameters of the model, eligible or not.
        source: the origin of the importance, in a few words.
        sparsity, budget: of the run or the stack.
    """

    curves: LockCurves
    tasks: tuple[str, ...]
    total: int
    source: str
    sparsity: float = 0.12
    budget: str = "union"

    @classmethod
    def of_result(cls, result: Result) -> LockView:
        """Of the importance recorded with a run; a ValueError if it recorded none."""
        settings = result.protocol
        curves = LockCurves.from_record(result.importance)
        model = PurePath(settings["model"]).name
        source = (
            f"{model}, seed {settings['seed']}; importance as measured in the run at sparsity "
            f"{settings['sparsity']:g}, budget {settings['budget']}"
        )
        if settings["data"] == "embedded":
            source += ", on synthetic texts"
        total = result.lock_stats[-1]["total"]
        tasks = tuple(task_names(result))
        return cls(curves, tasks, total, source, settings["sparsity"], settings["budget"])

    @classmethod
    def of_stack(
        cls, stack: BitStack, loader: Iterable[Mapping[str, Any]], *, n_batches: int = 32
    ) -> LockView:
        """Of what ``stack.update(loader, n_batches)`` would lock next, on top of what is locked.

        Nothing is locked or changed. Errors as of ``BitStack.measure``.
        """
        recorder = CurveRecorder(stack.masks)
        recorder.add(stack.measure(loader, n_batches))
        stats = stack.stats()
        source = f"a live stack, {stats['frozen_pct']:.1f} % of the eligible weights locked so far"
        settings = stack.settings["sparsity"], stack.settings["budget"]
        return cls(recorder.curves(), ("the next task",), stats["total"], source, *settings)

    @property
    def eligible(self) -> int:
        """The weights that may be locked."""
        return sum(cell[2] for cell in self.curves.cells)

    def name(self, task: int) -> str:
        """The choice in words."""
        if task != TOGETHER:
            return self.tasks[task - 1]
        if len(self.tasks) > 1:
            return f"all {len(self.tasks)} tasks together"
        return "all that is locked then"

    def shares(self, sparsity: float, *, budget: str, task: int) -> pd.DataFrame:
        """Layer by module, the share of the eligible weights that the task chooses, in %.

        For ``TOGETHER`` the share that is locked after the last task.
        """
        table = self.curves.layer_table(sparsity, budget)
        own = table[table["task"] == (task or len(self.tasks))]
        return shares(own, "locked" if task == TOGETHER else "selected")

    def numbers(self, sparsity: float, *, budget: str) -> pd.DataFrame:
        """Weights over the whole model, a row per task: ``selected``, ``added``, ``locked``."""
        counts = self.curves.counts(sparsity, budget)
        frame = pd.DataFrame({name: count.sum(axis=1) for name, count in counts.items()})
        return frame.set_axis(pd.RangeIndex(1, len(frame) + 1, name="task"))

    def facts(self, sparsity: float, *, budget: str, task: int) -> dict[str, str]:
        """The numbers of a choice in sentences, by what they are about."""
        numbers, eligible = self.numbers(sparsity, budget=budget), self.eligible
        locked = numbers["locked"].iloc[-1]
        shown = locked if task == TOGETHER else numbers["selected"][task]
        return {
            "shown": f"{self.name(task)} at sparsity {100 * sparsity:.0f} %, budget {budget}",
            "locked" if task == TOGETHER else "chosen": (
                f"{_percent(shown, eligible)} of the eligible weights, "
                f"{_percent(shown, self.total)} of all parameters"
            ),
            "capacity": (
                f"{_percent(locked, eligible)} used, {_percent(eligible - locked, eligible)} left "
                f"({eligible - locked:,} of {eligible:,} eligible weights)"
            ),
            "storage": (
                f"a mask {BYTES(eligible / 8)} (1 bit per eligible weight), the locked values "
                f"{BYTES(4 * locked)}; a copy of all weights {BYTES(4 * self.total)}"
            ),
        }

    def by_task(self, sparsity: float, *, budget: str, task: int) -> pd.DataFrame:
        """A row of text per task: % of the eligible weights chosen, new, locked and left; overlap.

        The shown task is marked. A row "before" is what was locked before the first task.
        """
        numbers = self.numbers(sparsity, budget=budget)
        before = numbers["locked"].iloc[0] - numbers["added"].iloc[0]
        counts = numbers.assign(left=self.eligible - numbers["locked"])
        text = counts.map(lambda count: _percent(count, self.eligible))
        text.columns = ["chosen", "new", "locked", "left"]
        text.index = [f"{'▸ ' * (at == task)}{self.tasks[at - 1]}" for at in numbers.index]
        if len(self.tasks) > 1:
            others = "the others (mean)" if task == TOGETHER else self.tasks[task - 1]
            text[f"overlap with {others}"] = self._overlaps(sparsity, task)
        if before:
            left = _percent(self.eligible - before, self.eligible)
            first = {"locked": _percent(before, self.eligible), "left": left}
            text = pd.concat([pd.DataFrame([first], index=["before"]), text])[text.columns]
        return text.rename_axis("% of eligible", axis=1)

    def _overlaps(self, sparsity: float, task: int) -> list[str]:
        """Jaccard index of each task's choice with the shown task's, or its mean over others."""
        overlap = self.curves.overlap(sparsity)
        if task == TOGETHER:
            means = (overlap.sum(axis=1) - np.diagonal(overlap)) / (len(overlap) - 1)
            return [f"{100 * mean:.0f} %" for mean in means]
        own = [f"{100 * share:.0f} %" for share in overlap[task - 1]]
        own[task - 1] = "–"
        return own


def _percent(count: float, of: int) -> str:
    return f"{100 * count / of:.1f} %"
