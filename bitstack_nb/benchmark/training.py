"""Training and evaluation of one model on encoded tasks, by the transformers ``Trainer``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
import torch
from datasets import Dataset, concatenate_datasets
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.head import Head, place
from bitstack_nb.trainer import unwrap_forward

Collate = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


class MultiHead(nn.Module):
    """One backbone under several heads at once; each row of a batch is scored by its task's.

    Its forward takes a batch with ``task`` (int64 ``[batch]``, the number of a row's head) and
    returns the mean loss over the rows.
    """

    accepts_loss_kwargs = False  # else the Trainer would pass more than the batch

    def __init__(self, model: nn.Module, heads: Sequence[Head]) -> None:
        super().__init__()
        self.backbone, self._heads = model, heads
        self.parts = nn.ModuleList(nn.ModuleDict(head.parts) for head in heads)

    def forward(self, task: torch.Tensor, **columns: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss over a batch that mixes tasks: ``{"loss": float scalar}``."""
        loss = torch.zeros((), device=task.device)
        for number in task.unique().tolist():
            place(self.backbone, self._heads[number])
            rows = task == number
            own = {name: column[rows] for name, column in columns.items()}
            loss = loss + self.backbone(**own).loss.float() * rows.sum() / len(task)
        return {"loss": loss}


def mixed(rows: Mapping[int, Dataset]) -> Dataset:
    """Rows of one task as they are; of several together, each marked with its task's index."""
    if len(rows) == 1:
        return next(iter(rows.values()))
    marked = [part.add_column("task", [task] * len(part)) for task, part in rows.items()]
    return concatenate_datasets(marked)


def train(
    model: nn.Module,
    data: Dataset,
    collate: Collate,
    *,
    protocol: Protocol,
    seed: int,
    device: torch.device,
    callbacks: Sequence[TrainerCallback] = (),
) -> int:
    """Train in place and return the number of steps. Batches are of texts of similar length."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _Trainer(
            model=model,
            args=_arguments(protocol, folder, seed=seed, device=device),
            data_collator=collate,
            train_dataset=data,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        if protocol.head_learning_rate is not None:
            _set_head_rate(trainer, protocol.head_learning_rate)
        try:
            return trainer.train().global_step
        finally:
            unwrap_forward(model)


class _Trainer(Trainer):
    def _get_train_sampler(self, *arguments: Any) -> LengthGroupedSampler:
        """The Trainer's own sampler, which would look up each length in the dataset, slowly."""
        sampler = super()._get_train_sampler(*arguments)
        sampler.lengths = list(sampler.lengths)
        return sampler


def _arguments(
    protocol: Protocol, folder: str, *, seed: int, device: torch.device
) -> TrainingArguments:
    half = half_precision(device, protocol.precision)
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=protocol.batch_size,
        num_train_epochs=protocol.epochs,
        learning_rate=protocol.learning_rate,
        weight_decay=protocol.weight_decay,
        warmup_steps=protocol.warmup_steps,
        train_sampling_strategy="group_by_length",
        length_column_name="length",
        remove_unused_columns=False,
        label_names=["labels"],
        seed=seed,
        use_cpu=device.type == "cpu",
        bf16=half is torch.bfloat16,
        fp16=half is torch.float16,
        dataloader_pin_memory=device.type == "cuda",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    # One GPU: DataParallel would multiply the batch, and its replicas cannot swap heads.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _set_head_rate(trainer: Trainer, rate: float) -> None:
    """Split the Trainer's parameter groups into backbone and heads; both follow its schedule."""
    model = trainer.model.backbone if isinstance(trainer.model, MultiHead) else trainer.model
    backbone = {id(p) for p in model.base_model.parameters()}
    optimizer = trainer.create_optimizer()
    for group in list(optimizer.param_groups):
        heads = [p for p in group["params"] if id(p) not in backbone]
        group["params"] = [p for p in group["params"] if id(p) in backbone]
        if heads:
            optimizer.add_param_group({**group, "params": heads, "lr": rate})


@torch.no_grad()
def predict(
    model: nn.Module,
    data: Dataset,
    collate: Collate,
    *,
    protocol: Protocol,
    device: torch.device,
    bar: tqdm,
) -> numpy.ndarray:
    """The label that the model gives to each example: int64 ``[examples]``, in the data's order.

    Batches are four times those of training, in training's precision. The model is left in
    evaluation mode.
    """
    order = numpy.argsort(data["length"])  # then a batch needs little padding
    ordered = data.select(order.tolist())
    half, labels = half_precision(device, protocol.precision), []
    model.eval()
    with torch.autocast(device.type, dtype=half, enabled=half is not None):
        for batch in DataLoader(ordered, batch_size=4 * protocol.batch_size, collate_fn=collate):
            own = {name: column.to(device) for name, column in batch.items()}
            logits = model(**own).logits
            if not logits.isfinite().all():
                raise ValueError(
                    f"training diverged: the model gives {logits[~logits.isfinite()][0]} for test "
                    "texts; try a lower learning rate"
                )
            labels += logits.argmax(-1).tolist()
            bar.update(1)
    found = numpy.empty(len(data), dtype=numpy.int64)
    found[order] = labels
    return found


def half_precision(device: torch.device, precision: str | None = None) -> torch.dtype | None:
    """The type of autocast that training uses: as set, else by the device; None is no autocast."""
    if precision is not None or device.type != "cuda":
        return torch.bfloat16 if precision == "bf16" else None
    # A T4 emulates bf16, slowly, and has tensor cores for fp16.
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float16


def find_device(name: str) -> torch.device:
    """The device for ``auto`` (a GPU if there is one), ``cpu`` or ``cuda``."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {name!r}, expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch sees no GPU here: use auto or cpu")
    found = "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"
    return torch.device(found)


class ProgressBar(TrainerCallback):
    """Counts training steps on a run's bar, which evaluation counts on too."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Count a training step."""
        self._bar.update(1)
