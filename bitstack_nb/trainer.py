"""The guarantee for the transformers Trainer: ``Trainer(..., callbacks=[stack.callback()])``."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bitstack_nb.guard import Guard


class GuardCallback(TrainerCallback):
    """Attaches a guard to the Trainer's optimizer and verifies it at the end of training."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Attach to the optimizer that this training steps.

        Raises:
            ValueError: the Trainer trains another model than the guarded one.
        """
        self._guard.attach(kwargs["optimizer"])

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Check that no locked weight moved.

        Raises:
            LockedWeightsMoved: something changed the weights past the optimizer.
        """
        self._guard.verify()
