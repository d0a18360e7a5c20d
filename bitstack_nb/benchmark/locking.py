"""Base classes of the strategies that lock weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.strategy import Batches, Data, Strategy, n_bytes
from bitstack_nb.importance import choose
from bitstack_nb.results.result import load_results
from bitstack_nb.settings import check_settings
from bitstack_nb.stack import BitStack

if TYPE_CHECKING:
    from transformers import TrainerCallback


class Locking(Strategy):
    """Locks weights with a :class:`BitStack`; subclasses say which after a stage."""

    settings = ("sparsity", "budget", "n_batches", "importance", "importance_mode", "head_steps")
    tiny: ClassVar = {"learning_rate": 2e-3}

    def __init__(self, model: nn.Module, protocol: Protocol) -> None:
        super().__init__(model, protocol)
        self._stack = self._new_stack()

    @classmethod
    def check(cls, protocol: Protocol) -> None:
        importance = protocol.importance or "gradient"
        check_settings(protocol.sparsity, budget=protocol.budget, importance=importance)

    def _new_stack(self) -> BitStack:
        return BitStack(
            self.model,
            self.protocol.sparsity,
            budget=self.protocol.budget,
            importance=self.protocol.importance or "gradient",
        )

    def _update(self, stack: BitStack, loader: Batches, **how: Any) -> dict[str, float]:
        """Let a stack lock what matters on the batches, measured as the protocol says."""
        how["training"] = self.protocol.importance_mode == "train"
        return stack.update(loader, n_batches=self.protocol.n_batches, **how)

    def callbacks(self) -> list[TrainerCallback]:
        return [self._stack.callback()]

    def stats(self) -> dict[str, float] | None:
        return self._stack.stats()

    def masks(self) -> Mapping[str, torch.Tensor]:
        return self._stack.masks

    def layer_records(self) -> list[dict[str, Any]]:
        return records(self._stack.layer_table())

    def storage(self, data: Data) -> int:
        """The packed masks; the model itself holds the locked values."""
        return n_bytes(self._stack.state_dict()["bits"].values())

    def save(self, folder: Path) -> None:
        self._stack.save(folder / "masks.safetensors")

    def load(self, folder: Path) -> None:
        self._stack = BitStack.load(folder / "masks.safetensors", self.model)


class Control(Locking):
    """Locks as many weights as BitStack would, but other ones.

    A second stack, which guards nothing, says how many: it measures importance as the published
    method does, and its masks are the union of what that would lock. So tasks that overlap by
    importance cost the control no more weights than they cost the method. They overlap less in a
    control's own model than in BitStack's, so it ends with about 3 % more locked weights. With
    ``locks_of`` it locks exactly as many as BitStack's recorded run.
    """

    settings = (*Locking.settings, "locks_of")

    def __init__(self, model: nn.Module, protocol: Protocol) -> None:
        super().__init__(model, protocol)
        self._count = self._new_stack()
        self._recorded = recorded_locks(protocol) if protocol.locks_of else None

    def after_stage(self, number: int, loader: Batches) -> None:
        """Lock the free weights with the highest scores."""
        if self._recorded:
            before, after = self._stack.stats()["locked"], self._recorded[number]
        else:
            before = self._count.stats()["locked"]
            after = self._update(self._count, loader)["locked"]
            self._count.detach()
        scores = self._scores(number)
        for score in scores.values():
            score.clamp_(min=torch.finfo(torch.float32).tiny)  # 0 is never chosen
        masks = self._stack.masks
        self._stack.lock(choose(scores, after - before, without=masks, ties=False))

    def _scores(self, number: int) -> dict[str, torch.Tensor]:
        """New float32 scores of at least 0 by parameter name, of its shape and on its device."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        super().save(folder)
        self._count.save(folder / "count.safetensors", values=False)  # it guards none

    def load(self, folder: Path) -> None:
        self._count = BitStack.load(folder / "count.safetensors", self.model)
        self._count.detach()
        super().load(folder)


def recorded_locks(protocol: Protocol) -> list[int]:
    """The weights that BitStack had locked after each task, in its run that a control goes with.

    Raises:
        ValueError: ``locks_of`` holds no run of the same seed, tasks, model, sizes and lock
            settings, or several that differ.
    """
    names = ("seed", "tasks", "model", "data", "train_size", "evaluate_on", "max_length", "epochs")
    names += ("pooling", "sparsity", "budget", "n_batches", "importance", "importance_mode")
    wanted = [getattr(protocol, name) for name in names]
    found = set()
    for result in load_results(Path(protocol.locks_of).expanduser()):
        if result.protocol["strategy"] == "bitstack":
            own = Protocol.from_dict(result.protocol)
            if [getattr(own, name) for name in names] == wanted:
                found.add(tuple(stats["locked"] for stats in result.lock_stats))
    if len(found) != 1:
        raise ValueError(
            f"{protocol.locks_of} has {len(found) or 'no'} runs of bitstack to lock as many "
            f"weights as for seed {protocol.seed}, expected one with the same tasks and settings: "
            "run bitstack first, into a folder of its own"
        )
    return list(found.pop())


def records(table: Any) -> list[dict[str, Any]]:
    """A layer table (a pandas frame) as JSON-able rows."""
    table["layer"] = table["layer"].astype(object).where(table["layer"].notna(), None)
    return table.to_dict("records")
