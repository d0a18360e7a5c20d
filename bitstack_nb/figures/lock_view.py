"""What a sparsity would lock, in numbers: from a recorded run, or a live stack's next task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import PurePath
from typing import Any

import numpy as np

from bitstack_nb.benchmark.curves import CurveRecorder, LockCurves
from bitstack_nb.figures.style import task_names
from bitstack_nb.results.result import Result
from bitstack_nb.stack import BitStack

TOGETHER = 0  # the choice of all tasks together; a task is chosen by its number, counting from 1
_VALUE_BYTES = 4  # float32


@dataclass(frozen=True)
class Numbers:
    """What one sparsity and budget lock; entries unless said otherwise, lists by task.

    Attributes:
        selected, added, locked: what each task chooses, what of it is new, all after the task.
        before: what was locked before the first of these tasks.
        eligible, total: entries that may be locked, and all parameters.
        overlap: shared over united entries of each task's choice with each other's, masks lifted:
            float64 [tasks, tasks], 0 to 1.
    """

    selected: tuple[int, ...]
    added: tuple[int, ...]
    locked: tuple[int, ...]
    before: int
    eligible: int
    total: int
    overlap: np.ndarray

    @property
    def mask_bytes(self) -> int:
        """Of one mask, whatever it locks: a bit per eligible entry."""
        return (self.eligible + 7) // 8

    @property
    def value_bytes(self) -> int:
        """Of the locked values after the last task, which go with the mask: float32."""
        return _VALUE_BYTES * self.locked[-1]

    @property
    def copy_bytes(self) -> int:
        """Of a copy of all parameters, the plain way to keep a task: float32."""
        return _VALUE_BYTES * self.total


@dataclass(frozen=True)
class LockView:
    """Lock curves and what is needed to show them.

    Attributes:
        curves: of ``len(tasks)`` tasks.
        tasks: their names, in order.
        total: parameters of the model, eligible or not.
        source: what the importance was measured in, in a few words.
        sparsity, budget: what was, or will be, locked with.
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
        return cls(
            curves,
            tuple(task_names(result)),
            result.lock_stats[-1]["total"],
            source,
            settings["sparsity"],
            settings["budget"],
        )

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
        return cls(
            recorder.curves(),
            ("the next task",),
            stats["total"],
            f"a live stack, {stats['frozen_pct']:.1f}% of the eligible entries locked so far",
            stack.settings["sparsity"],
            stack.settings["budget"],
        )

    def shares(self, sparsity: float, *, budget: str, task: int) -> np.ndarray:
        """Share of each cell's eligible entries: float64 [cells], 0 to 1.

        Of those that the task chooses, for ``TOGETHER`` of those locked after the last task.
        """
        counts = self.curves.counts(sparsity, budget)
        shown = counts["locked"][-1] if task == TOGETHER else counts["selected"][task - 1]
        return shown / np.array([max(cell[2], 1) for cell in self.curves.cells])

    def numbers(self, sparsity: float, *, budget: str) -> Numbers:
        """The sums over the model."""
        counts = self.curves.counts(sparsity, budget)
        sums = {name: tuple(count.sum(1).tolist()) for name, count in counts.items()}
        return Numbers(
            **sums,
            before=sums["locked"][0] - sums["added"][0],
            eligible=sum(cell[2] for cell in self.curves.cells),
            total=self.total,
            overlap=self.curves.overlap(sparsity),
        )

    def name(self, task: int) -> str:
        """The choice in words."""
        if task != TOGETHER:
            return self.tasks[task - 1]
        if len(self.tasks) > 1:
            return f"all {len(self.tasks)} tasks together"
        return "all that is locked then"

    def html(self, sparsity: float, *, budget: str, task: int) -> str:
        """The numbers as HTML that takes its colours from the page."""
        numbers = self.numbers(sparsity, budget=budget)
        shown = numbers.locked[-1] if task == TOGETHER else numbers.selected[task - 1]
        verb = "locked" if task == TOGETHER else "chosen"
        left = numbers.eligible - numbers.locked[-1]
        lines = [
            ("shown", f"{escape(self.name(task))} at sparsity {sparsity:.0%}, budget {budget}"),
            (
                verb,
                f"<b>{_percent(shown, numbers.eligible)} of the eligible entries</b>, "
                f"{_percent(shown, numbers.total)} of all parameters",
            ),
            (
                "capacity",
                f"{_percent(numbers.locked[-1], numbers.eligible)} used, "
                f"{_percent(left, numbers.eligible)} left ({left:,} of {numbers.eligible:,} "
                "eligible entries)",
            ),
            (
                "weight",
                f"a mask {size(numbers.mask_bytes)} (1 bit per eligible entry), the locked values "
                f"{size(numbers.value_bytes)}; a copy of all weights {size(numbers.copy_bytes)}",
            ),
        ]
        rows = "".join(_row([f"<i>{name}</i>", text], left=2) for name, text in lines)
        note = escape(self.source) + "."
        if len(self.tasks) > 1:
            note += " Overlap: entries shared of those united, of choices with the masks lifted."
        return (
            f'<div style="line-height:1.35">{_table(rows)}{self._task_table(numbers, task)}'
            f'<div style="opacity:.75;font-size:90%">{note}</div></div>'
        )

    def _task_table(self, numbers: Numbers, task: int) -> str:
        """A row per task: what it chooses, what is new of it, what is locked after it, overlap."""
        several = len(self.tasks) > 1
        head = ["% of eligible", "chosen", "new", "locked", "left"]
        if several:
            others = "the others" if task == TOGETHER else escape(self.tasks[task - 1])
            head.append(f"overlap with {others}")
        rows = [_row(head, cell="th")]
        if numbers.before:
            before = numbers.before, numbers.eligible - numbers.before
            rows.append(_row(["before", "", "", *(_percent(n, numbers.eligible) for n in before)]))
        for at, name in enumerate(self.tasks):
            locked = numbers.locked[at]
            counts = numbers.selected[at], numbers.added[at], locked, numbers.eligible - locked
            cells = [escape(name), *(_percent(n, numbers.eligible) for n in counts)]
            if several:
                cells.append(_overlap(numbers.overlap, at, task))
            rows.append(_row(cells, bold=at == task - 1))
        return _table("".join(rows))


def size(count: float) -> str:
    """Bytes in the unit that reads well."""
    for unit, factor in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} bytes"


def _overlap(overlap: np.ndarray, at: int, task: int) -> str:
    """Jaccard index of a task's choice with the chosen task's, or its mean over the others'."""
    if task == TOGETHER:
        return f"{np.delete(overlap[at], at).mean():.0%} (mean)"
    return "–" if at == task - 1 else f"{overlap[at, task - 1]:.0%}"


def _percent(count: int, of: int) -> str:
    return f"{count / of:.1%}"


def _row(cells: list[str], *, cell: str = "td", left: int = 1, bold: bool = False) -> str:
    """A table row; all but the first ``left`` cells are numbers."""
    weight = "bold" if bold else "normal"
    made = []
    for at, text in enumerate(cells):
        align = "left" if at < left else "right"
        style = f"text-align:{align};padding:1px 10px 1px 0;font-weight:{weight};vertical-align:top"
        made.append(f'<{cell} style="{style}">{text}</{cell}>')
    return f"<tr>{''.join(made)}</tr>"


def _table(rows: str) -> str:
    return f'<table style="border-collapse:collapse;margin:0 0 8px">{rows}</table>'
