"""Ways to train one backbone on a sequence of tasks: one small class each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from bitstack_nb.curves import CurveRecorder
from bitstack_nb.protocol import Protocol
from bitstack_nb.stack import BitStack


class FineTune:
    """Plain fine-tuning, task after task: what forgets. Base of the other strategies."""

    def __init__(self, model: nn.Module, protocol: Protocol) -> None:
        self.model = model

    @staticmethod
    def stages(n_tasks: int) -> list[list[int]]:
        """Task indices that are trained on together, stage by stage."""
        return [[task] for task in range(n_tasks)]

    def callbacks(self) -> list[TrainerCallback]:
        """What the Trainer of a stage has to call."""
        return []

    def before_stage(self, loader: Iterable[Mapping[str, Any]]) -> None:
        """Called before each stage with batches of its training data, its task's head in place."""

    def after_stage(self, loader: Iterable[Mapping[str, Any]]) -> None:
        """Called after each stage with batches of its training data."""

    def model_of(self, task: int) -> AbstractContextManager[nn.Module]:
        """The model to evaluate a task under, for the length of a ``with`` block."""
        return nullcontext(self.model)

    def stats(self) -> dict[str, float] | None:
        """Lock statistics, for strategies that lock."""
        return None

    def layer_records(self) -> list[dict[str, Any]]:
        """Rows of the stack's layer table, for strategies that lock."""
        return []

    def importance_record(self) -> dict[str, Any]:
        """What other sparsities would have locked, for strategies that lock by importance."""
        return {}

    def save(self, folder: Path) -> None:
        """Write what the strategy knows besides the model into an existing folder."""

    def load(self, folder: Path) -> None:
        """The counterpart of :meth:`save`."""


class _Stacked(FineTune):
    """What the two modes of BitStack share."""

    def __init__(self, model: nn.Module, protocol: Protocol, **settings: str) -> None:
        super().__init__(model, protocol)
        self._n_batches = protocol.n_batches
        importance = protocol.importance or "gradient"
        self._stack = BitStack(model, protocol.sparsity, importance=importance, **settings)

    def callbacks(self) -> list[TrainerCallback]:
        """Keeps exact what may not move, and verifies it after the stage."""
        return [self._stack.callback()]

    def stats(self) -> dict[str, float] | None:
        """The stack's statistics."""
        return self._stack.stats()

    def layer_records(self) -> list[dict[str, Any]]:
        """The stack's layer table, a record per row."""
        table = self._stack.layer_table()
        table["layer"] = table["layer"].astype(object).where(table["layer"].notna(), None)
        return table.to_dict("records")

    def save(self, folder: Path) -> None:
        """Masks and values."""
        self._stack.save(folder / "masks.safetensors")

    def load(self, folder: Path) -> None:
        """The counterpart of :meth:`save`; the hooks are back too."""
        self._stack = BitStack.load(folder / "masks.safetensors", self.model)


class Masked(_Stacked):
    """BitStack: lock what mattered after each task."""

    def __init__(self, model: nn.Module, protocol: Protocol) -> None:
        super().__init__(model, protocol, budget=protocol.budget)
        self._recorder = CurveRecorder(self._stack.masks)

    def after_stage(self, loader: Iterable[Mapping[str, Any]]) -> None:
        """Lock the entries that matter for the stage's task."""
        self._stack.update(loader, n_batches=self._n_batches, observe=self._recorder.add)

    def importance_record(self) -> dict[str, Any]:
        """The lock curves of the importance measured so far."""
        return self._recorder.curves().to_record()

    def save(self, folder: Path) -> None:
        """Masks, locked values, and at which sparsity each entry would be locked."""
        super().save(folder)
        save_file(self._recorder.state_dict(), folder / "curves.safetensors")

    def load(self, folder: Path) -> None:
        """The counterpart of :meth:`save`; the hooks are back too."""
        super().load(folder)
        self._recorder.load_state_dict(load_file(folder / "curves.safetensors"))


class ExactRecall(_Stacked):
    """BitStack's mode recall: each task trains entries of its own on the base, and forgets none."""

    def __init__(self, model: nn.Module, protocol: Protocol) -> None:
        super().__init__(model, protocol, mode="recall")

    def before_stage(self, loader: Iterable[Mapping[str, Any]]) -> None:
        """Choose the task's entries."""
        self._stack.begin(loader, n_batches=self._n_batches)

    def after_stage(self, loader: Iterable[Mapping[str, Any]]) -> None:
        """Close the task."""
        self._stack.update()

    def model_of(self, task: int) -> AbstractContextManager[nn.Module]:
        """The task's own model, whatever came after it."""
        return self._stack.recall(task)


class Joint(FineTune):
    """All tasks at once: the upper bound, which no method for sequences is given."""

    @staticmethod
    def stages(n_tasks: int) -> list[list[int]]:
        """One stage of all tasks."""
        return [list(range(n_tasks))]


STRATEGIES: dict[str, type[FineTune]] = {
    "finetune": FineTune,
    "bitstack": Masked,
    "recall": ExactRecall,
    "joint": Joint,
}
