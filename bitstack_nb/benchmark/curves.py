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

from bitstack_nb.eligible import place

if TYPE_CHECKING:
    import pandas

SPARSITIES = tuple(percent / 100 for percent in range(51))
_NEVER = 255  # at no level
_BLOCK = 4096


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
        """The counterpart of :meth:`to_record`; a ValueError if the record is empty or damaged."""
        if not record:
            raise ValueError("this result has no recorded importance: give a run of bitstack")
        try:
            rows = record["cells"]
            tasks = max(row["task"] for row in rows)
            cells = [(row["layer"], row["module"], row["eligible"]) for row in rows]
            shape = (tasks, len(rows) // tasks, len(record["sparsities"]))
            curves = {
                name: np.reshape([_from_steps(row[name]) for row in rows], shape)
                for name in ("selected", "union", "fresh")
            }
            shared = np.zeros((tasks, tasks, shape[-1]))
            total = sum(cell[2] for cell in cells[: shape[1]])
            for pair in record["shared"]:
                first, second = (number - 1 for number in pair["tasks"])
                shared[first, second] = shared[second, first] = np.array(pair["entries"]) / total
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ValueError(f"recorded importance is damaged ({error!r}): run it again") from error
        own = tuple(cells[: shape[1]])
        return cls(tuple(record["sparsities"]), own, curves.pop("selected"), curves, shared)


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
        locked = torch.cat([mask.flatten().cpu() for mask in masks.values()])
        self._before = torch.where(locked, 0, _NEVER).to(torch.uint8)
        self._chosen: list[torch.Tensor] = []
        self._fresh: list[torch.Tensor] = []

    @torch.no_grad()
    def add(self, scores: Mapping[str, torch.Tensor]) -> None:
        """Take in a task's importance: float32 by parameter name, measured with masks lifted."""
        flat = torch.cat([scores[name].flatten() for name in self._sizes])
        order = flat.argsort(descending=True)
        taken = (self._fresh or [self._before])[-1]
        self._chosen.append(_first_levels(flat, order, None).cpu())
        fresh = _first_levels(flat, order, taken.to(flat.device)).cpu()
        self._fresh.append(torch.minimum(fresh, taken))

    def curves(self) -> LockCurves:
        """The curves of the tasks so far."""
        cells: dict[tuple[int | None, str], int] = {}
        for name, size in self._sizes.items():
            cells[place(name)] = cells.get(place(name), 0) + size
        sizes = np.array(list(cells.values()))[:, None]

        def fractions(levels: list[torch.Tensor]) -> np.ndarray:
            counts = [self._count(own, list(cells)) / sizes for own in levels]
            return np.array(counts).reshape(len(levels), len(cells), len(SPARSITIES))

        united, union = self._before, []
        for chosen in self._chosen:
            united = torch.minimum(united, chosen)
            union.append(united)
        return LockCurves(
            SPARSITIES,
            tuple((*cell, size) for cell, size in cells.items()),
            fractions(self._chosen),
            {"union": fractions(union), "fresh": fractions(self._fresh)},
            self._shared(),
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors that :meth:`load_state_dict` takes, not copied."""
        levels = {"chosen": self._chosen, "fresh": self._fresh}
        return {"before": self._before} | {
            f"{name}.{task}": tensor
            for name, tensors in levels.items()
            for task, tensor in enumerate(tensors)
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on where the state was taken."""
        tasks = range((len(state) - 1) // 2)
        self._before = state["before"]
        self._chosen = [state[f"chosen.{task}"] for task in tasks]
        self._fresh = [state[f"fresh.{task}"] for task in tasks]

    def _count(self, levels: torch.Tensor, cells: list[tuple[int | None, str]]) -> np.ndarray:
        """Weights at or below each level by cell: int64 [C, L]."""
        counts = np.zeros((len(cells), len(SPARSITIES)), dtype=np.int64)
        parts = levels.split(list(self._sizes.values()))
        for name, part in zip(self._sizes, parts, strict=True):
            counts[cells.index(place(name))] += _cumulative(part)
        return counts

    def _shared(self) -> np.ndarray:
        tasks = len(self._chosen)
        shared = np.zeros((tasks, tasks, len(SPARSITIES)))
        for i, first in enumerate(self._chosen):
            for j, second in enumerate(self._chosen[: i + 1]):
                both = torch.maximum(first, second)
                shared[i, j] = shared[j, i] = _cumulative(both) / len(both)
        return shared


def _first_levels(
    scores: torch.Tensor, order: torch.Tensor, taken: torch.Tensor | None
) -> torch.Tensor:
    """The first level at which each weight is among the top of those that are free at that level.

    Thresholds fall from level to level, because with more sparsity more weights are chosen of
    fewer free ones; so a search finds the first level.

    Args:
        scores: float32 [n], non-negative; zero is never chosen.
        order: int64 [n], the weights by falling score.
        taken: uint8 [n], the first level at which a weight is no longer free; None if all are.

    Returns:
        uint8 [n], ``_NEVER`` where no level chooses the weight; to be read as its minimum with
        ``taken``.
    """
    ordered = None if taken is None else taken[order]
    thresholds = []
    for level, sparsity in enumerate(SPARSITIES):
        k = round(sparsity * len(scores))
        position = k - 1 if ordered is None else _position(ordered > level, k)
        if k == 0:
            thresholds.append(float("inf"))
        else:  # where fewer than k are free, all of them
            thresholds.append(0.0 if position is None else float(scores[order[position]]))
    ascending = scores.new_tensor(thresholds[::-1])
    above = len(thresholds) - torch.bucketize(scores, ascending, right=True)
    never = (above == len(thresholds)) | (scores == 0)
    return above.masked_fill_(never, _NEVER).to(torch.uint8)


def _position(flags: torch.Tensor, k: int) -> int | None:
    """The index of the k-th True of a bool [n], counting k from 1; None if there are fewer."""
    blocks = flags.split(_BLOCK)
    whole = flags[: len(flags) // _BLOCK * _BLOCK].view(torch.uint8).view(-1, _BLOCK)
    whole = whole.sum(1, dtype=torch.int32)  # four times as fast as summing bool
    before = torch.cat([whole.new_zeros(1), whole.cumsum(0)])
    block = int((before < k).sum()) - 1
    if not 0 <= block < len(blocks):
        return None
    inside = blocks[block].cumsum(0) == k - before[block]
    return block * _BLOCK + int(inside.int().argmax()) if inside.any() else None


def _cumulative(levels: torch.Tensor) -> np.ndarray:
    """Weights at or below each level: int64 [L]."""
    counts = torch.bincount(levels, minlength=_NEVER + 1)
    return counts[: len(SPARSITIES)].cumsum(0).numpy()


def _steps(shares: np.ndarray) -> str:
    return " ".join(map(str, np.diff(np.rint(1000 * shares).astype(int), prepend=0)))


def _from_steps(text: str) -> np.ndarray:
    return np.cumsum([int(step) for step in text.split()]) / 1000
