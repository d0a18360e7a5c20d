"""The weights that a sparsity would lock: of a recorded run, or of a live stack's next task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from bitstack_nb.benchmark.curves import CurveRecorder, LockCurves
from bitstack_nb.figures.locks import OUTSIDE, short_names
from bitstack_nb.figures.methods import task_names
from bitstack_nb.results.result import Result
from bitstack_nb.settings import BUDGETS
from bitstack_nb.stack import BitStack


@dataclass(frozen=True)
class LockView:
    """Lock curves and what is needed to show them.

    Attributes:
        curves: of ``len(tasks)`` tasks.
        tasks: their names, in order.
        total: parameters of the model, eligible or not.
        source: the origin of the importance, in a few words.
        sparsity, budget: of the run or the stack.
        live: whether it shows the next task of a stack.
    """

    curves: LockCurves
    tasks: tuple[str, ...]
    total: int
    source: str
    sparsity: float = 0.12
    budget: str = "union"
    live: bool = False

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
        curves = recorder.curves()
        return cls(curves, ("the next task",), stats["total"], source, *settings, live=True)

    def to_record(self) -> dict[str, Any]:
        """All that the explorer's page shows of it, JSON-able.

        ``cells`` are layers and modules, each with its place among the ``rows`` and ``columns`` of
        the heatmap. ``curves`` are those of the record of ``LockCurves``, by task and cell. By
        level of sparsity: ``sums``, the weights of the whole model that each task chose, added
        and had locked, for each budget; ``overlap`` of the tasks' choices in %; and ``file``, the
        bytes of one task's own weights.
        """
        levels = self.curves.sparsities
        modules = [module for layer, module, _ in self.curves.cells if layer is not None]
        modules = list(dict.fromkeys([*modules, *(cell[1] for cell in self.curves.cells)]))
        layers = sorted({layer for layer, *_ in self.curves.cells if layer is not None})
        outside = any(layer is None for layer, *_ in self.curves.cells)
        cells = [
            {"row": len(layers) if layer is None else layers.index(layer)}
            | {"column": modules.index(module), "layer": layer}
            | {"module": module, "eligible": size}
            for layer, module, size in self.curves.cells
        ]
        eligible = sum(cell["eligible"] for cell in cells)
        rows = self.curves.to_record()["cells"]
        by_task = [rows[at : at + len(cells)] for at in range(0, len(rows), len(cells))]
        return {
            "source": self.source,
            "tasks": self.tasks,
            "total": self.total,
            "live": self.live,
            "start": {"level": self.level, "mode": self.budget},
            "rows": [*map(str, layers), *([OUTSIDE] if outside else [])],
            "columns": list(short_names(modules).values()),
            "cells": cells,
            "sparsities": levels,
            "eligible": eligible,
            "curves": {
                name: [[row[name] for row in own] for own in by_task]
                for name in ("selected", *BUDGETS)
            },
            "overlap": [(100 * self.curves.overlap(s)).round(2).tolist() for s in levels],
            "sums": {
                budget: [
                    [count.sum(axis=1).tolist() for count in self.curves.counts(s, budget).values()]
                    for s in levels
                ]
                for budget in BUDGETS
            },
            "file": [own_bytes(round(s * eligible), eligible) for s in levels],
        }

    @property
    def level(self) -> int:
        """The level of the curves nearest ``sparsity``."""
        levels = self.curves.sparsities
        return min(range(len(levels)), key=lambda at: abs(levels[at] - self.sparsity))


def own_bytes(count: int, eligible: int) -> int:
    """Bytes that float32 own weights take in a file of exact recall.

    Their positions are two bytes each, or one bit for each eligible weight where that is less.
    """
    return 4 * count + min(2 * count, -(-eligible // 8))
