"""The strategies that lock: BitStack, a stricter one, the controls, and exact recall."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from bitstack_nb import maskfile
from bitstack_nb.benchmark.curves import CurveRecorder
from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.strategies.finetune import FineTune, n_bytes
from bitstack_nb.fitting import HEAD_STEPS
from bitstack_nb.importance import draw
from bitstack_nb.recall import ExactRecall
from bitstack_nb.select import top_masks
from bitstack_nb.stack import BitStack


class _Stacked(FineTune):
    """What all of them share."""

    def __init__(self, model: nn.Module, protocol: Protocol, **settings: str) -> None:
        super().__init__(model, protocol)
        self._settings = {"importance": protocol.importance or "gradient", **settings}
        self._stack = self._new_stack()

    def _new_stack(self) -> BitStack | ExactRecall:
        return BitStack(self.model, self.protocol.sparsity, **self._settings)

    @staticmethod
    def further_batches(protocol: Protocol) -> dict[str, int]:
        """Those that importance is measured on."""
        return {"measure": protocol.n_batches}

    def callbacks(self) -> list[TrainerCallback]:
        """Keeps exact what may not move, and verifies it after the stage."""
        return [self._stack.callback()]

    def stats(self) -> dict[str, float] | None:
        """The stack's statistics."""
        return self._stack.stats()

    def masks(self) -> Mapping[str, torch.Tensor]:
        """The stack's."""
        return self._stack.masks

    def layer_records(self) -> list[dict[str, Any]]:
        """The stack's layer table, a record per row."""
        table = self._stack.layer_table()
        table["layer"] = table["layer"].astype(object).where(table["layer"].notna(), None)
        return table.to_dict("records")

    def storage(self, data: Sequence[Dataset]) -> int:
        """The packed masks; the locked values stand in the model."""
        return n_bytes(self._stack.state_dict()["bits"].values())

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

    def after_stage(self, number: int, loader: Iterable[Mapping[str, Any]]) -> None:
        """Lock the entries that matter for the stage's task."""
        self._stack.update(loader, n_batches=self.protocol.n_batches, observe=self._recorder.add)

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


class Strict(Masked):
    """BitStack, with what the published method leaves free frozen after the first task.

    That is the backbone's embeddings, norms and biases.
    """

    def before_stage(self, number: int, loader: Iterable[Mapping[str, Any]]) -> None:
        """Freeze them from the second stage on."""
        if number:
            for parameter in small_parameters(self.model.base_model):
                parameter.requires_grad_(False)


def small_parameters(backbone: nn.Module) -> list[nn.Parameter]:
    """Embeddings, and what has one dimension: norms and biases."""
    embeddings = {
        parameter
        for module in backbone.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    return [p for p in backbone.parameters() if p.ndim < 2 or p in embeddings]


class _Control(_Stacked):
    """Locks as many entries as BitStack would, but other ones.

    How many, a second stack says that measures importance as the published method does and adds up
    what that would lock; it holds nothing. So tasks that overlap by importance (``union``) cost
    the control no more entries than they cost the method.
    """

    def __init__(self, model: nn.Module, protocol: Protocol) -> None:
        super().__init__(model, protocol, budget=protocol.budget)
        self._count = self._new_stack()

    def after_stage(self, number: int, loader: Iterable[Mapping[str, Any]]) -> None:
        """Lock the entries with the highest scores among those that are free."""
        before = self._count.stats()["locked"]
        after = self._count.update(loader, n_batches=self.protocol.n_batches)["locked"]
        self._count.detach()
        scores = self._scores(number)
        for name, mask in self._stack.masks.items():
            # No free entry has score 0, which is never taken.
            scores[name].clamp_(min=torch.finfo(torch.float32).tiny).masked_fill_(mask, 0)
        self._stack.lock(top_masks(scores, after - before, ties=False))

    def _scores(self, number: int) -> dict[str, torch.Tensor]:
        """New float32 scores by parameter name, of its shape and on its device, at least 0."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Both stacks; the second one without values, which it does not hold."""
        super().save(folder)
        self._count.save(folder / "count.safetensors", values=False)

    def load(self, folder: Path) -> None:
        """The counterpart of :meth:`save`; the hooks are back too."""
        super().load(folder)
        self._count = BitStack.load(folder / "count.safetensors", self.model)
        self._count.detach()


class RandomMask(_Control):
    """The control that says whether it matters which entries are locked, or only how many."""

    def _scores(self, number: int) -> dict[str, torch.Tensor]:
        return draw(self._stack.masks, seed=1000 * self.protocol.seed + number)


class MagnitudeMask(_Control):
    """The control that locks the largest weights, for which no gradient has to be measured."""

    def _scores(self, number: int) -> dict[str, torch.Tensor]:
        weights = dict(self.model.named_parameters())
        return {name: weights[name].detach().abs().float() for name in self._stack.masks}


class Recall(_Stacked):
    """Exact recall: each task trains weights of its own on the base, and forgets none."""

    drifts = False

    def _new_stack(self) -> ExactRecall:
        return ExactRecall(self.model, self.protocol.sparsity, **self._settings)

    @staticmethod
    def further_batches(protocol: Protocol) -> dict[str, int]:
        """Those too that the head is fitted on."""
        return {"measure": protocol.n_batches or 0, "fit": HEAD_STEPS}

    def before_stage(self, number: int, loader: Iterable[Mapping[str, Any]]) -> None:
        """Choose the task's weights."""
        self._stack.begin(str(number), loader=loader, n_batches=self.protocol.n_batches or 1)

    def after_stage(self, number: int, loader: Iterable[Mapping[str, Any]]) -> None:
        """Close the task."""
        self._stack.close()

    def model_of(self, task: int) -> AbstractContextManager[nn.Module]:
        """The task's own model, whatever came after it."""
        return self._stack.using(str(task))

    def storage(self, data: Sequence[Dataset]) -> int:
        """Which entry is whose, as it is stored, and the tasks' values."""
        state = self._stack.state_dict()
        values = [own for task in state["values"] for own in task.values()]
        return n_bytes([maskfile.packed_owners(state), *values])

    def load(self, folder: Path) -> None:
        """The counterpart of :meth:`save`; the hooks are back too."""
        self._stack = ExactRecall.load(folder / "masks.safetensors", self.model)
