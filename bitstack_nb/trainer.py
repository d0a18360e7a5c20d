"""The guarantee for the transformers Trainer: ``Trainer(..., callbacks=[stack.callback()])``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from bitstack_nb.stack import BitStack


class BitStackCallback(TrainerCallback):
    """Attaches a stack to the Trainer's optimizer and verifies it at the end of training."""

    def __init__(self, stack: BitStack) -> None:
        self._stack = stack

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Attach to the optimizer that this training steps.

        Raises:
            ValueError: the Trainer trains another model than the stack's.
        """
        self._stack.attach(kwargs["optimizer"])

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Prove that no locked entry moved.

        Raises:
            LockedWeightsMoved: something changed the weights past the optimizer.
        """
        self._stack.verify()
