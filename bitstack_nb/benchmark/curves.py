"""Lock fractions per layer and module as curves over sparsity, from one run at one sparsity.

A stack locks at one sparsity, but the importance that it measures also decides what it would lock
at any other. ``CurveRecorder`` receives each task's importance and keeps two bytes per weight and
task. ``LockCurves`` is the summary, counted per layer and module, that is kept with the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bitstack_nb.eligible import places

if TYPE_CHECKING:
    import pandas

SPARSITIES = tuple(percent / 100 for percent in range(51))
_NEVER = 255  # at no level


@dataclass(frozen=True)
class LockCurves:
    """Lock fractions of T tasks in C cells (a module of a layer) at L sparsities.

    Attributes:
        sparsities: [L], ascending shares of the eligible weights.
        cells: [C] of layer (None outside the blocks), module, eligible weights.
        selected: float64 [T, C, L], the share of a cell that the task alone would choose.
        locked: budget -> float64 [T, C, L], the share of a cell locked after the task, had all
            tasks been locked at that sparsity and with that budget.
        shared: float64 [T, T, L], the share of all eligible weights that both tasks would choose.
    """

    sparsities: tuple[float, ...]
    cells: tuple[tuple[int | None, str, int], ...]
    selected: np.ndarray
    locked: dict[str, np.ndarray]
    shared: np.ndarray

    def level(self, sparsity: float) -> int:
        """The index of a sparsity; a ValueError names the nearest one that there is."""
        index = int(np.abs(np.array(self.sparsities) - sparsity).argmin())
        if abs(self.sparsities[index] - sparsity) > 1e-9:
            raise ValueError(
                f"sparsity {sparsity!r} has no curve point; the nearest is "
                f"{self.sparsities[index]:g}, steps are {self.sparsities[1]:g}"
            )
        return index

    def counts(self, sparsity: float, budget: str) -> dict[str, np.ndarray]:
        """Weights ``selected``, ``added`` and ``locked``: int64 [T, C], as in the layer table."""
        level = self.level(sparsity)
        locked = self.locked[budget][:, :, level]
        # The first task added what is locked after it, but for what was locked at sparsity 0.
        added = np.diff(locked, axis=0, prepend=self.locked[budget][:1, :, 0])
        selected = self.selected[:, :, level] if budget == "union" else added
        eligible = np.array([cell[2] for cell in self.cells])
        shares = {"selected": selected, "added": added, "locked": locked}
        return {name: np.rint(share * eligible).astype(int) for name, share in shares.items()}

    def layer_table(self, sparsity: float, budget: str) -> pandas.DataFrame:
        """The table that ``BitStack.layer_table`` would give at that sparsity and budget."""
        import pandas

        counts = self.counts(sparsity, budget)
        tasks, cells = counts["locked"].shape
        layers, modules, eligible = zip(*self.cells, strict=True)
        frame = pandas.DataFrame(
            {
                "layer": pandas.array(layers * tasks, dtype="Int64"),
                "module": modules * tasks,
                "task": np.repeat(np.arange(1, tasks + 1), cells),
                "eligible": np.tile(eligible, tasks),
            }
            | {name: count.ravel() for name, count in counts.items()}
        )
        fraction = self.locked[budget][:, :, self.level(sparsity)]
        return frame.assign(lock_fraction=fraction.ravel())

    def overlap(self, sparsity: float) -> np.ndarray:
        """Float64 [T, T]: shared over united weights of two tasks' choices (Jaccard), 0 to 1."""
        shared = self.shared[:, :, self.level(sparsity)]
        own = np.diagonal(shared)
        united = own[:, None] + own[None, :] - shared
        return np.divide(shared, united, out=np.zeros_like(shared), where=united > 0)

    def to_record(self) -> dict[str, Any]:
        """JSON-able; shares in thousandths, so off by at most 0.05 points (``shared`` exactly).

        A curve is written as text, its steps from level to level.
        """
        rows = [
            {"layer": layer, "module": module, "eligible": eligible, "task": task + 1}
            | {"selected": _steps(self.selected[task, cell])}
            | {budget: _steps(share[task, cell]) for budget, share in self.locked.items()}
            for task in range(len(self.selected))
            for cell, (layer, module, eligible) in enumerate(self.cells)
        ]
        total = sum(cell[2] for cell in self.cells)
        shared = [
            {"tasks": [i + 1, j + 1], "entries": np.rint(total * self.shared[i, j]).tolist()}
            for i in range(len(self.shared))
            for j in range(i, len(self.shared))
        ]
        return {"sparsities": list(self.sparsities), "cells": rows, "shared": shared}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> LockCurves:
        """The counterpart of :meth:`to_record`; a ValueError if the record is empty."""
        if not record:
            raise ValueError("this result has no recorded importance: give a run of bitstack")
        sparsities, rows = tuple(record["sparsities"]), record["cells"]
        tasks = rows[-1]["task"]
        cells = tuple(
            (row["layer"], row["module"], row["eligible"]) for row in rows if row["task"] == 1
        )
        curves = {
            name: np.reshape(
                [_from_steps(row[name]) for row in rows], (tasks, len(cells), len(sparsities))
            )
            for name in ("selected", "union", "fresh")
        }
        shared = np.zeros((tasks, tasks, len(sparsities)))
        total = sum(cell[2] for cell in cells)
        for pair in record["shared"]:
            first, second = (number - 1 for number in pair["tasks"])
            shared[first, second] = shared[second, first] = np.array(pair["entries"]) / total
        return cls(sparsities, cells, curves.pop("selected"), curves, shared)


class CurveRecorder:
    """Collects the curves of updates: ``stack.update(loader, observe=recorder.add)``.

    Kept per eligible weight and task, in main memory: the first level of ``SPARSITIES`` at which
    the task alone chooses the weight, and the first at which it is locked after the task with
    budget ``fresh``, one byte each.

    Args:
        masks: ``stack.masks``; weights that are locked already count as locked at every sparsity.
    """

    def __init__(self, masks: Mapping[str, torch.Tensor]) -> None:
        self._sizes = {name: mask.numel() for name, mask in masks.items()}
        self._place = places(masks)
        locked = torch.cat([mask.flatten().cpu() for mask in masks.values()])
        self._before = torch.where(locked, 0, _NEVER).to(torch.uint8)
        self._chosen: list[torch.Tensor] = []
        self._fresh: list[torch.Tensor] = []

    @torch.no_grad()
    def add(self, scores: Mapping[str, torch.Tensor]) -> None:
        """Take in a task's importance: float32 by parameter name, measured with masks lifted."""
        flat = torch.cat([scores[name].flatten() for name in self._sizes])
        order = flat.argsort(descending=True)
        nothing = torch.full_like(self._before, _NEVER)
        self._chosen.append(_first_levels(flat, order, nothing))
        taken = self._fresh[-1] if self._fresh else self._before
        self._fresh.append(torch.minimum(_first_levels(flat, order, taken), taken))

    def curves(self) -> LockCurves:
        """The curves of the tasks so far."""
        sizes: dict[tuple[int | None, str], int] = {}
        for name, size in self._sizes.items():
            sizes[self._place[name]] = sizes.get(self._place[name], 0) + size
        united, union = self._before, []
        for chosen in self._chosen:
            united = torch.minimum(united, chosen)
            union.append(united)
        return LockCurves(
            SPARSITIES,
            tuple((*cell, size) for cell, size in sizes.items()),
            self._shares(self._chosen, sizes),
            {"union": self._shares(union, sizes), "fresh": self._shares(self._fresh, sizes)},
            self._shared(),
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors that :meth:`load_state_dict` takes, after at least one task."""
        tasks = {"chosen": torch.stack(self._chosen), "fresh": torch.stack(self._fresh)}
        return {"before": self._before, **tasks}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on where the state was taken."""
        self._before = state["before"]
        self._chosen, self._fresh = list(state["chosen"]), list(state["fresh"])

    def _shares(
        self, tasks: list[torch.Tensor], sizes: Mapping[tuple[int | None, str], int]
    ) -> np.ndarray:
        """Shares of each cell's weights at or below each level: float64 [T, C, L]."""
        cells = list(sizes)
        counts = np.zeros((len(tasks), len(cells), len(SPARSITIES)))
        for task, levels in enumerate(tasks):
            parts = levels.split(list(self._sizes.values()))
            for name, part in zip(self._sizes, parts, strict=True):
                counts[task, cells.index(self._place[name])] += _cumulative(part)
        return counts / np.array(list(sizes.values()))[:, None]

    def _shared(self) -> np.ndarray:
        tasks = len(self._chosen)
        shared = np.zeros((tasks, tasks, len(SPARSITIES)))
        for i, first in enumerate(self._chosen):
            for j, second in enumerate(self._chosen[: i + 1]):
                both = torch.maximum(first, second)
                shared[i, j] = shared[j, i] = _cumulative(both) / len(both)
        return shared


def _first_levels(scores: torch.Tensor, order: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """The first level at which each weight is among the top of those that are free at that level.

    Thresholds fall from level to level, because with more sparsity more weights are chosen of
    fewer free ones; so a search finds the first level.

    Args:
        scores: float32 [n], non-negative; zero is never chosen.
        order: int64 [n], the weights by falling score.
        taken: uint8 [n] on the CPU, the first level at which a weight is no longer free.

    Returns:
        uint8 [n] on the CPU, ``_NEVER`` where no level chooses the weight; to be read as its
        minimum with ``taken``.
    """
    falling, taken = scores[order], taken.to(scores.device)[order]
    thresholds = []
    for level, sparsity in enumerate(SPARSITIES):
        k = round(sparsity * len(scores))
        free = falling[taken > level]
        if k == 0:
            thresholds.append(float("inf"))
        else:  # where fewer than k are free, all of them
            thresholds.append(float(free[k - 1]) if k <= len(free) else 0.0)
    ascending = scores.new_tensor(thresholds[::-1])
    above = len(thresholds) - torch.bucketize(scores, ascending, right=True)
    never = (above == len(thresholds)) | (scores == 0)
    return above.masked_fill_(never, _NEVER).to(torch.uint8).cpu()


def _cumulative(levels: torch.Tensor) -> np.ndarray:
    """Weights at or below each level: int64 [L]."""
    counts = torch.bincount(levels, minlength=_NEVER + 1)
    return counts[: len(SPARSITIES)].cumsum(0).numpy()


def _steps(shares: np.ndarray) -> str:
    return " ".join(map(str, np.diff(np.rint(1000 * shares).astype(int), prepend=0)))


def _from_steps(text: str) -> np.ndarray:
    return np.cumsum([int(step) for step in text.split()]) / 1000
