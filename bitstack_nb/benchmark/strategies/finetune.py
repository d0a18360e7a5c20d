"""Plain fine-tuning, and the hooks by which every other strategy departs from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback

from bitstack_nb.benchmark.protocol import Protocol


class FineTune:
    """Plain fine-tuning, task after task: what forgets. Base of the other strategies.

    Attributes:
        drifts: whether later stages move the backbone that earlier tasks are predicted with.
    """

    drifts = True

    def __init__(self, model: nn.Module, protocol: Protocol) -> None:
        self.model, self.protocol = model, protocol

    @staticmethod
    def stages(n_tasks: int) -> list[list[int]]:
        """Task indices that are trained on together, stage by stage."""
        return [[task] for task in range(n_tasks)]

    @staticmethod
    def rows(stage: list[int], data: Sequence[Dataset], protocol: Protocol) -> dict[int, Dataset]:
        """What a stage trains on, by task, out of every task's training rows."""
        return {task: data[task] for task in stage}

    @staticmethod
    def further_batches(protocol: Protocol) -> dict[str, int]:
        """Batches a stage takes besides training and evaluation, for an estimate of its time.

        ``measure``: gradients of the backbone; ``single``: those of one example; ``fit``: forward.
        """
        return {}

    def callbacks(self) -> list[TrainerCallback]:
        """What the Trainer of a stage has to call."""
        return []

    def before_stage(self, number: int, loader: Iterable[Mapping[str, Any]]) -> None:
        """Called before each stage (from 0) with batches of what it trains on.

        If that is one task's, the task's head is in place.
        """

    def after_stage(self, number: int, loader: Iterable[Mapping[str, Any]]) -> None:
        """Called after each stage (from 0) with batches of what it trained on."""

    def model_of(self, task: int) -> AbstractContextManager[nn.Module]:
        """The model to evaluate a task under, for the length of a ``with`` block."""
        return nullcontext(self.model)

    def stats(self) -> dict[str, float] | None:
        """Lock statistics, for strategies that lock."""
        return None

    def masks(self) -> Mapping[str, torch.Tensor]:
        """What is locked, by parameter name, for strategies that lock."""
        return {}

    def layer_records(self) -> list[dict[str, Any]]:
        """Rows of the stack's layer table, for strategies that lock."""
        return []

    def importance_record(self) -> dict[str, Any]:
        """What other sparsities would have locked, for strategies that lock by importance."""
        return {}

    def storage(self, data: Sequence[Dataset]) -> int:
        """Bytes to keep beside one backbone and the heads.

        What it takes to predict every task and to go on to another one.

        Args:
            data: every task's training rows, for strategies that keep some.
        """
        return 0

    def save(self, folder: Path) -> None:
        """Write what the strategy knows besides the model into an existing folder."""

    def load(self, folder: Path) -> None:
        """The counterpart of :meth:`save`; the model's own weights are put back after it."""


class Joint(FineTune):
    """All tasks at once: the upper bound, which no method for sequences is given."""

    drifts = False

    @staticmethod
    def stages(n_tasks: int) -> list[list[int]]:
        """One stage of all tasks."""
        return [list(range(n_tasks))]


def n_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """What tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
