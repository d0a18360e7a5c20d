"""The base class of strategies: plain fine-tuning, with hooks to do otherwise.

A new one is a new file in ``strategies/`` with a class that sets ``name``, ``label``, ``order`` and
``colour`` and overrides the hooks that it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from bitstack_nb.benchmark.protocol import Protocol

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerCallback

Batches = Iterable[Mapping[str, Any]]
Data = Sequence["Dataset"]  # every task's training rows


class Strategy:
    """A way to train one backbone on a sequence of tasks. Without overrides it is fine-tuning.

    Attributes:
        name: in protocols, results and file names.
        label: in tables and figures.
        order: place in tables and figures, ascending.
        colour: in figures, as matplotlib takes it.
        settings: the protocol's fields that this strategy uses, but not all strategies do.
        tiny: settings for the tiny GPT-2, where they are not the protocol's defaults; chosen on
            held-out texts (docs/benchmark.md).
        drifts: whether later stages change the backbone that earlier tasks are predicted with. If
            not, a task is tested only after its own stage.
        trains: whether the Trainer trains anything.
        pooling: of its classifier, whatever the protocol says.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    order: ClassVar[int]
    colour: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ("head_steps",)
    tiny: ClassVar[Mapping[str, Any]] = {}
    drifts: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    pooling: ClassVar[str | None] = None

    def __init__(self, model: nn.Module, protocol: Protocol) -> None:
        self.model, self.protocol = model, protocol

    @classmethod
    def check(cls, protocol: Protocol) -> None:
        """Raise a ValueError for settings of its own that cannot be meant."""

    @classmethod
    def chosen(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings for a pretrained backbone, if full fine-tuning's rate does not suit.

        ``given`` are settings that have been decided.
        """
        return {}

    @staticmethod
    def stages(n_tasks: int) -> list[list[int]]:
        """Task indices that are trained on together, stage by stage."""
        return [[task] for task in range(n_tasks)]

    @staticmethod
    def rows(stage: list[int], data: Data, protocol: Protocol) -> dict[int, Dataset]:
        """The rows that a stage trains on, by task, out of every task's training rows."""
        return {task: data[task] for task in stage}

    def callbacks(self) -> list[TrainerCallback]:
        """Callbacks for the Trainer of a stage."""
        return []

    def before_stage(self, number: int, loader: Batches) -> None:
        """Called before each stage (from 0) with batches of what it trains on.

        If these are one task's, the task's head is in the model.
        """

    def after_stage(self, number: int, loader: Batches) -> None:
        """Called after each stage (from 0) with batches of what it trained on."""

    def model_of(self, task: int) -> AbstractContextManager[nn.Module]:
        """The model to evaluate a task under; the present one comes back after the block."""
        return nullcontext(self.model)

    def stats(self) -> dict[str, float] | None:
        """Lock statistics, for strategies that lock."""
        return None

    def masks(self) -> Mapping[str, torch.Tensor]:
        """Locked weights by parameter name, for strategies that lock."""
        return {}

    def layer_records(self) -> list[dict[str, Any]]:
        """Rows of the layer table, for strategies that lock."""
        return []

    def importance_record(self) -> dict[str, Any]:
        """Record of ``LockCurves``, for strategies that lock by importance."""
        return {}

    def storage(self, data: Data) -> int:
        """Bytes to keep beside one backbone and the heads: to predict every task and to go on."""
        return 0

    def best_storage(self, data: Data) -> int:
        """Bytes of the same in its smallest usual form: positions packed, and values in bf16.

        Accuracies are measured with float32 values all the same.
        """
        return self.storage(data)

    def save(self, folder: Path) -> None:
        """Write what the strategy knows besides the model into an existing folder."""

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote; the model's own weights are put back after it."""


def n_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
