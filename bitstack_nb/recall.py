"""Mode ``recall``: each task trains entries of its own on the base, and can be shown again.

Scope: the order of things (open, close, show, leave) and its errors; ``owners`` keeps the books.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from bitstack_nb import eligible, ranks, select
from bitstack_nb.fitting import check_fitting, drawn, fit_heads, put_back_on_error
from bitstack_nb.guard import Guard
from bitstack_nb.importance import check_batches, measure
from bitstack_nb.owners import Owners

logger = logging.getLogger(__name__)


def make_owners(model: nn.Module, exclude: Iterable[str] | None) -> Owners:
    """Owners of the model's eligible entries; errors as in ``BitStack``."""
    eligible.trainable_heads(model)  # or an error now
    own, fixed = eligible.recall_parameters(model, exclude)
    return Owners(own, fixed, partial(eligible.backbone_buffers, model))


class Recall:
    """What ``BitStack`` does in this mode; its methods of the same names say what and when.

    Args:
        model: already unwrapped.
        owners: of the model's entries.
        guard: keeps those that may not move.
        settings: of the stack.
    """

    def __init__(
        self, model: nn.Module, owners: Owners, *, guard: Guard, settings: Mapping[str, Any]
    ) -> None:
        self._model, self._owners, self._guard = model, owners, guard
        self._settings = settings
        self._running = 0

    def begin(
        self,
        loader: Iterable[Mapping[str, Any]],
        n_batches: int,
        *,
        head_steps: int,
        head_learning_rate: float,
    ) -> None:
        """As ``BitStack.begin``."""
        owners = self._owners
        with ranks.agreed():
            self.check_not_running("begin")
            check_batches(loader, n_batches)
            check_fitting(head_steps, head_learning_rate)
            self._guard.check_still_the_models()
            budget = self._next_budget()
            heads = eligible.trainable_heads(self._model)
            batches = drawn(loader, max(n_batches, head_steps), heads[0].device)
        owners.keep_base()
        with put_back_on_error(heads), owners.shown_as_before_on_error():
            owners.show(None)
            owners.restore()
            ranks.check_same(owners.held, "weights of the base")
            model, rate, how = self._model, head_learning_rate, self._settings["importance"]
            fit_heads(model, heads, batches, steps=head_steps, learning_rate=rate)
            with self._guard.lifted():
                scores = measure(
                    model, owners.parameters, batches, n_batches=n_batches, importance=how
                )
            for name, score in scores.items():
                score.masked_fill_(owners.mask(name), 0)
            chosen = select.top_masks(scores, budget, ties=False)
            ranks.check_same(chosen, "entries to train")
            owners.open(chosen)
        self._guard.add_gradient_hooks()
        logger.info("task %d may train %d entries", owners.closed, budget)

    def close(self, loader: object) -> None:
        """As ``BitStack.update``."""
        self.check_not_running("update")
        if loader is not None:
            raise ValueError(
                'in mode "recall" update() takes no loader: begin(loader) has chosen the entries'
            )
        if not self._owners.is_open:
            raise RuntimeError("no task is open: begin(loader), train, then update()")
        self._owners.show(self._owners.closed)  # two interrupts may have left another shown
        self._guard.verify()
        self._owners.close()
        logger.info("task %d is closed", self._owners.closed - 1)

    @contextmanager
    def recall(self, task: int | None) -> Iterator[nn.Module]:
        """As ``BitStack.recall``."""
        owners = self._owners
        if task is not None and task not in range(owners.closed):
            raise ValueError(
                f"task is {task!r}, expected None or one of the {owners.closed} that update() has "
                "closed, counted from 0"
            )
        self._guard.check_still_the_models()
        before = owners.shown
        self._running += 1
        try:
            owners.show(task)
            yield self._model
        finally:
            self._running -= 1
            try:
                owners.show(before)
            except KeyboardInterrupt:  # or an open task would be left for good, and train no more
                owners.show(before)
                raise

    def export(self, task: int | None) -> nn.Module:
        """As ``BitStack.export``."""
        with self.recall(task) as model:
            exported = copy.deepcopy(model)
        if "_original_forward" in vars(exported) and "_hf_hook" not in vars(exported):
            # The autocast wrapper that a Trainer leaves behind would run the model copied from.
            del exported.forward, exported._original_forward
        return exported

    def check_not_running(self, method: str) -> None:
        """Raise a RuntimeError in a ``recall`` block: leaving it has to find what it left."""
        if self._running:
            raise RuntimeError(f"{method}() within a recall(...) block: leave the block first")

    def _next_budget(self) -> int:
        """Entries for the next task."""
        owners, done, sparsity = self._owners, self._owners.closed, self._settings["sparsity"]
        if owners.is_open:
            raise RuntimeError(f"task {done} is still open: update() closes it")
        budget, left = round(sparsity * owners.eligible), owners.eligible - owners.count
        # Rounding may leave the last of the tasks that fit a few entries short.
        if budget > left and (done + 1) * sparsity > 1 + 1e-9:
            raise ValueError(
                f"{done} task{'s' if done != 1 else ''} fitted, and no further one: at sparsity "
                f"{sparsity:g} it takes {budget:,} of {owners.eligible:,} eligible entries, "
                f"and {left:,} are left. A smaller sparsity makes room for more tasks"
            )
        return min(budget, left)
