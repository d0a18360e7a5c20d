"""Exact recall: each task trains weights of its own on the base, and none is forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from bitstack_nb.benchmark.locking import records
from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.strategy import Batches, Data, Strategy
from bitstack_nb.recall import ExactRecall
from bitstack_nb.settings import IMPORTANCES, RANDOM, check_settings

if TYPE_CHECKING:
    from transformers import TrainerCallback


class Recall(Strategy):
    """Our extension of BitStack: the model of a task is the base with the task's own weights.

    Random own weights follow the run's seed. In the runs recorded until 2026-11-28 they did not:
    each of their seeds has the own weights of seed 0.
    """

    name, label, order, colour = "recall", "exact recall", 90, "#56B4E9"
    settings = ("sparsity", "n_batches", "importance")
    tiny: ClassVar = {
        **{"sparsity": 0.05, "importance": "random"},
        **{"learning_rate": 6e-2, "head_learning_rate": 1e-2},
    }
    drifts = False

    def __init__(self, model: nn.Module, protocol: Protocol) -> None:
        super().__init__(model, protocol)
        importance = protocol.importance or "gradient"
        self._tasks = ExactRecall(model, protocol.sparsity, importance=importance)

    @classmethod
    def check(cls, protocol: Protocol) -> None:
        importance, known = protocol.importance or "gradient", (*IMPORTANCES, RANDOM)
        check_settings(protocol.sparsity, importance=importance, importances=known)

    @classmethod
    def chosen(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        share = given.get("sparsity", 0.01)
        rate = float(f"{8e-5 / share:.0e}")  # fewer weights need larger steps
        own = {"sparsity": share, "importance": RANDOM}
        return own | {"learning_rate": rate, "head_learning_rate": 1e-2}

    def callbacks(self) -> list[TrainerCallback]:
        return [self._tasks.callback()]

    def before_stage(self, number: int, loader: Batches) -> None:
        name, n_batches = self._name(number), self.protocol.n_batches or 1
        seed = self.protocol.stage_seed(number)
        self._tasks.begin(name, loader=loader, n_batches=n_batches, seed=seed)

    def after_stage(self, number: int, loader: Batches) -> None:
        try:
            self._tasks.close()
        except RuntimeError as error:  # diverged; its way out, abandon(), is for loops of one's own
            raise ValueError(str(error).partition(". abandon")[0]) from error

    def model_of(self, task: int) -> AbstractContextManager[nn.Module]:
        return self._tasks.using(self._name(task))

    def stats(self) -> dict[str, float] | None:
        return self._tasks.stats()

    def layer_records(self) -> list[dict[str, Any]]:
        return records(self._tasks.layer_table())

    def storage(self, data: Data) -> int:
        return self._tasks.own_bytes()

    def best_storage(self, data: Data) -> int:
        # The file packs positions already; its float32 values take four bytes each.
        values = 4 * sum(record["selected"] for record in self.layer_records())
        return self.storage(data) - values // 2

    def save(self, folder: Path) -> None:
        self._tasks.save(folder / "tasks.safetensors")

    def load(self, folder: Path) -> None:
        self._tasks = ExactRecall.load(folder / "tasks.safetensors", self.model)
        self._tasks.switch(self._tasks.names[-1])  # as it was

    def _name(self, task: int) -> str:
        return self.protocol.tasks[task].name
