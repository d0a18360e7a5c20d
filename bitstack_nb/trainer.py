"""Callbacks for the transformers Trainer: ``Trainer(..., callbacks=[stack.callback()])``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback

from bitstack_nb.guard import Guard

if TYPE_CHECKING:
    from bitstack_nb.recall import ExactRecall


def unwrap_forward(model: nn.Module) -> None:
    """Take off what a Trainer leaves on a model: a forward in autocast, and a mark.

    The wrapper would still be there in later use. With the mark the next Trainer would not wrap.
    """
    if "_original_forward" in vars(model):
        del model.forward, model._original_forward
    vars(model).pop("_is_accelerate_prepared", None)


class GuardCallback(TrainerCallback):
    """Attaches a guard to the Trainer's optimizer and verifies it at the end of training."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def on_train_begin(self, *_: Any, optimizer: torch.optim.Optimizer, **__: Any) -> None:
        """Attach the guard to the Trainer's optimizer.

        Raises:
            ValueError: the Trainer trains another model than the guarded one.
        """
        self._guard.attach(optimizer)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Check that no locked weight moved.

        Raises:
            LockedWeightsMoved: something other than the optimizer changed a locked weight.
        """
        self._guard.verify()


class ExactRecallCallback(TrainerCallback):
    """Lets a Trainer train the open task's own weights and head, and nothing else.

    The Trainer makes its optimizer from trainable parameters, and no others are trainable.
    """

    def __init__(self, tasks: ExactRecall) -> None:
        self._tasks = tasks

    def on_train_begin(self, *_: Any, optimizer: torch.optim.Optimizer, **__: Any) -> None:
        """Let the own weights take gradients from now on.

        Raises:
            RuntimeError: no task is open, or the optimizer was made before the task began.
        """
        own, _ = self._tasks.parameters()
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not held.issuperset(map(id, own["params"])):
            raise RuntimeError(
                "the Trainer's optimizer does not hold the task's own weights: make a Trainer of "
                "tasks' model after begin()"
            )

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Let the model's own weights take no gradient, so that the next Trainer may be made."""
        self._tasks.pause()
