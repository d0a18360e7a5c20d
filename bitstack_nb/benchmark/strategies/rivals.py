"""What BitStack is compared with: the usual answers to forgetting, each in its plain form."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D

from bitstack_nb import ranks
from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.strategies.finetune import FineTune, n_bytes
from bitstack_nb.importance import measure
from bitstack_nb.rng import undisturbed_rng


class Frozen(FineTune):
    """The backbone stays as the first task left it; later tasks train a head alone."""

    drifts = False

    def before_stage(self, number: int, loader: Iterable[Mapping[str, Any]]) -> None:
        """Freeze the backbone from the second stage on."""
        if number:
            self.model.base_model.requires_grad_(False)


class Single(FineTune):
    """One fine-tuned model per task, each from the base: the upper bound, T times the weights."""

    drifts = False

    def __init__(self, model: nn.Module, protocol: Protocol) -> None:
        super().__init__(model, protocol)
        self._base = self._weights()
        self._tasks: list[dict[str, torch.Tensor]] = []

    def before_stage(self, number: int, loader: Iterable[Mapping[str, Any]]) -> None:
        """Put the backbone back to the base."""
        self.model.base_model.load_state_dict(self._base)

    def after_stage(self, number: int, loader: Iterable[Mapping[str, Any]]) -> None:
        """Keep the task's backbone."""
        self._tasks.append(self._weights())

    @contextmanager
    def model_of(self, task: int) -> Iterator[nn.Module]:
        """The task's own model; the present weights come back after it."""
        present = self._weights()
        self.model.base_model.load_state_dict(self._tasks[task])
        try:
            yield self.model
        finally:
            self.model.base_model.load_state_dict(present)

    def storage(self, data: Sequence[Dataset]) -> int:
        """A backbone per task."""
        return n_bytes(tensor for task in self._tasks for tensor in task.values())

    def save(self, folder: Path) -> None:
        """Every task's backbone, as ``task/name``."""
        tensors = {f"{t}/{n}": w for t, own in enumerate(self._tasks) for n, w in own.items()}
        save_file(tensors, folder / "tasks.safetensors")

    def load(self, folder: Path) -> None:
        """The counterpart of :meth:`save`."""
        device = next(self.model.parameters()).device
        tasks: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in load_file(folder / "tasks.safetensors").items():
            task, _, name = key.partition("/")
            tasks.setdefault(task, {})[name] = tensor.to(device)
        self._tasks = [tasks[task] for task in sorted(tasks, key=int)]

    def _weights(self) -> dict[str, torch.Tensor]:
        return {n: tensor.clone() for n, tensor in self.model.base_model.state_dict().items()}


class Replay(FineTune):
    """Some examples of each earlier task are trained on again: it may keep data, others may not."""

    @staticmethod
    def rows(stage: list[int], data: Sequence[Dataset], protocol: Protocol) -> dict[int, Dataset]:
        """The stage's own rows, and the same few of each earlier task at every stage."""
        kept = {task: kept_rows(data[task], task, protocol) for task in range(stage[0])}
        return FineTune.rows(stage, data, protocol) | kept

    def storage(self, data: Sequence[Dataset]) -> int:
        """Four bytes for each token and each label that is kept."""
        kept = [kept_rows(rows, task, self.protocol) for task, rows in enumerate(data)]
        return 4 * sum(sum(rows["length"]) + len(rows) for rows in kept)


def kept_rows(rows: Dataset, task: int, protocol: Protocol) -> Dataset:
    """The ``replay_size`` rows that replay keeps of a task, drawn by the seed, or all if fewer."""
    generator = torch.Generator().manual_seed(1000 * protocol.seed + task)
    drawn = torch.randperm(len(rows), generator=generator)[: protocol.replay_size]
    return rows.select(sorted(drawn.tolist()))


class Elastic(FineTune):
    """Online elastic weight consolidation (EWC) with a diagonal Fisher.

    From the second task on the loss is that of the task plus ``strength / 2 * sum(F * (w - w*)^2)``
    over the backbone: w* are its weights after the task before, F is the sum of the tasks' Fisher
    informations. That is Kirkpatrick et al. (2017), "Overcoming catastrophic forgetting in neural
    networks", in the online form of Schwarz et al. (2018), "Progress & Compress", with its decay at
    1. A task's Fisher is the empirical one: the mean of the squared gradients of single examples,
    with their true labels.
    """

    def __init__(self, model: nn.Module, protocol: Protocol) -> None:
        super().__init__(model, protocol)
        self._fisher: dict[str, torch.Tensor] = {}
        self._anchor: dict[str, torch.Tensor] = {}

    @staticmethod
    def further_batches(protocol: Protocol) -> dict[str, int]:
        """Those of one example that the Fisher is measured on."""
        return {"single": protocol.n_batches * protocol.batch_size}

    def callbacks(self) -> list[TrainerCallback]:
        """Adds the penalty to the loss."""
        return [_AddToLoss(self.penalty)]

    def before_stage(self, number: int, loader: Iterable[Mapping[str, Any]]) -> None:
        """Take the weights that the task before ended with as those to stay near."""
        parameters = dict(self.model.base_model.named_parameters())
        self._anchor = {name: parameters[name].detach().clone() for name in self._fisher}

    def after_stage(self, number: int, loader: Iterable[Mapping[str, Any]]) -> None:
        """Add the task's Fisher, from as many examples as ``n_batches`` hold."""
        parameters = dict(self.model.base_model.named_parameters())
        limit = self.protocol.n_batches * self.protocol.batch_size
        examples = list(islice(single_examples(loader), limit))
        found = measure(
            self.model, parameters, examples, n_batches=len(examples), importance="fisher"
        )
        count = len(examples) * ranks.count()  # measured on every rank, and summed over them
        for name, squares in found.items():
            if squares.any():  # what gets no gradient, the optimizer leaves alone: so does this
                own = squares / count
                self._fisher[name] = own + self._fisher.get(name, 0)

    def penalty(self) -> torch.Tensor | float:
        """What is added to the loss now: a float scalar."""
        parameters = dict(self.model.base_model.named_parameters())
        distances = (
            (self._fisher[name] * (parameters[name] - anchor).square()).sum()
            for name, anchor in self._anchor.items()
        )
        return self.protocol.strength / 2 * sum(distances)

    def storage(self, data: Sequence[Dataset]) -> int:
        """The Fisher; the weights to stay near are the model's own."""
        return n_bytes(self._fisher.values())

    def save(self, folder: Path) -> None:
        """The Fisher."""
        save_file(self._fisher, folder / "fisher.safetensors")

    def load(self, folder: Path) -> None:
        """The counterpart of :meth:`save`."""
        device = next(self.model.parameters()).device
        loaded = load_file(folder / "fisher.safetensors")
        self._fisher = {name: fisher.to(device) for name, fisher in loaded.items()}


def single_examples(loader: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, torch.Tensor]]:
    """The rows of batches, each a batch of one."""
    for batch in loader:
        for row in range(len(batch["labels"])):
            yield {name: column[row : row + 1] for name, column in batch.items()}


class _AddToLoss(TrainerCallback):
    """Adds a term to the loss that the model gives while it is trained."""

    def __init__(self, term: Callable[[], torch.Tensor | float]) -> None:
        self._term = term

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hook the model that is trained."""
        self._handle = kwargs["model"].register_forward_hook(self._add)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was."""
        self._handle.remove()

    def _add(self, model: nn.Module, inputs: tuple, output: Any) -> None:
        output["loss"] = output["loss"] + self._term()


class Adapters(FineTune):
    """LoRA: a low-rank adapter per task beside every linear layer of the backbone, which is frozen.

    Hu et al. (2021), "LoRA: Low-Rank Adaptation of Large Language Models", by the package peft,
    with ``lora_alpha`` twice the rank and no dropout.
    """

    drifts = False

    def __init__(self, model: nn.Module, protocol: Protocol) -> None:
        super().__init__(model, protocol)
        try:
            from peft.functional import inject_adapter_in_model, set_adapter
        except ImportError as error:
            raise ValueError(
                "strategy 'lora' needs peft 0.18 or newer: pip install -U peft"
            ) from error
        self._set_adapter = set_adapter
        self._shown = 0
        config = _lora_config(model.base_model, protocol.rank)
        # All at once, so that the model has the same tensors at every checkpoint.
        with undisturbed_rng(model.device), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            torch.manual_seed(protocol.seed)
            for task in range(len(protocol.tasks)):
                inject_adapter_in_model(config, model.base_model, _adapter(task))

    def before_stage(self, number: int, loader: Iterable[Mapping[str, Any]]) -> None:
        """Let the task's adapter in, and let it alone be trained."""
        self._show(number)

    @contextmanager
    def model_of(self, task: int) -> Iterator[nn.Module]:
        """The backbone with the task's adapter; the present one comes back after it."""
        present = self._shown
        self._show(task)
        try:
            yield self.model
        finally:
            self._show(present)

    def storage(self, data: Sequence[Dataset]) -> int:
        """The adapters, all of one size."""
        parameters = self.model.base_model.named_parameters()
        return n_bytes(parameter for name, parameter in parameters if ".lora_" in name)

    def _show(self, task: int) -> None:
        self._set_adapter(self.model.base_model, _adapter(task))
        self._shown = task


def _adapter(task: int) -> str:
    return f"task{task}"


def _lora_config(backbone: nn.Module, rank: int) -> Any:
    from peft import LoraConfig

    layers = {n: m for n, m in backbone.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        # By their full names: "all-linear" would count in the layers of adapters added before.
        target_modules=list(layers),
        # How Conv1D, the linear layer of GPT-2, stores its weight.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in layers.values()),
    )
