"""Training of the open task of exact recall by the transformers ``Trainer``, for a task bank."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

from bitstack_nb.encoding import Rows
from bitstack_nb.recall import ExactRecall
from bitstack_nb.trainer import ExactRecallCallback

# Chosen on held-out texts of five tasks, with MiniLM-L6 and 1 % random own weights: half and twice
# the rate of own weights gave less (results/tuning/bank).
LEARNING_RATE, HEAD_LEARNING_RATE = 8e-3, 1e-2


def default_arguments(
    folder: str,
    *,
    epochs: float,
    batch_size: int,
    seed: int,
    device: torch.device,
    progress: bool,
) -> TrainingArguments:
    """Arguments for the Trainer where the user gives none."""
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=4 * batch_size,
        warmup_steps=0.1,
        weight_decay=0.01,
        train_sampling_strategy="group_by_length",
        seed=seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        save_strategy="no",
        logging_strategy="epoch" if progress else "no",
        report_to="none",
        disable_tqdm=not progress,
    )
    # One GPU: DataParallel would multiply the batch.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def train_open_task(
    recall: ExactRecall,
    model: transformers.PreTrainedModel,
    rows: Rows,
    *,
    held: Rows | None,
    collate: Callable[[Rows], Mapping[str, torch.Tensor]],
    args: TrainingArguments,
    rates: tuple[float, float],
    callbacks: Sequence[TrainerCallback],
) -> dict[str, float]:
    """Train the task that is open, and keep it as it was in its best epoch.

    Args:
        recall: the tasks of the model.
        model: the one that is trained.
        rows: encoded texts with ``labels``.
        held: the same to choose the epoch; None keeps the last.
        collate: pads rows into a batch.
        args: all but its learning rate is used. It may name any optimizer that Trainer knows.
        rates: learning rates of the own weights and of the head.
        callbacks: further ones.

    Returns:
        ``loss`` in training, and of the kept epoch ``accuracy`` on held-out rows and ``epoch``.
    """
    args, best = copy.copy(args), _Best(recall)
    if held and args.eval_strategy == "no":
        args.eval_strategy = transformers.IntervalStrategy.EPOCH
    optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
    settings = {"weight_decay": args.weight_decay, **settings}
    groups = recall.parameters(lr=rates[0], head_lr=rates[1])
    trainer = Trainer(
        model=model,
        args=args,
        data_collator=collate,
        train_dataset=rows,
        eval_dataset=held,
        compute_metrics=_accuracy,
        optimizers=(optimizer(groups, **settings), None),
        callbacks=[ExactRecallCallback(recall), best, *callbacks],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    loss = trainer.train().training_loss
    return {"loss": loss, **best.put_back()}


class _Best(TrainerCallback):
    """Keeps the open task of the evaluation with the most right answers."""

    def __init__(self, recall: ExactRecall) -> None:
        self._recall, self._found = recall, {}
        self._best: list[torch.Tensor] | None = None

    def on_evaluate(
        self, args: Any, state: Any, control: Any, *, metrics: Mapping[str, float], **_: Any
    ) -> None:
        """Keep the task as it is now if no evaluation before was as good."""
        if metrics["eval_accuracy"] > self._found.get("accuracy", -1):
            self._found = {"accuracy": metrics["eval_accuracy"], "epoch": state.epoch}
            self._best = self._recall.snapshot()

    def put_back(self) -> dict[str, float]:
        """Make the open task that one again; its accuracy and epoch."""
        if self._best is not None:
            self._recall.put_back(self._best)
        return self._found


def _accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}
