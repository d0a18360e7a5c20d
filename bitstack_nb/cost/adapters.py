"""Many tasks on one backbone, kept in several ways: a task bank, and peft's LoRA and SHiRA.

All have the same methods, so that ``bank`` measures them side by side. A model of peft has heads of
one size. So this file keeps a head per task beside peft's adapters, as a user's own code would.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from bitstack_nb.bank import TaskBank
from bitstack_nb.data.backbones import collate, encode, load_backbone
from bitstack_nb.head import Head, describe, labelled, part_names, place, present, restored
from bitstack_nb.pretrained import quiet
from bitstack_nb.rng import undisturbed_rng

OWN, RANK, LENGTH = 0.01, 8, 32  # own weights of a task, rank of an adapter, tokens of a text
BATCH_SIZE, LEARNING_RATE = 16, 2e-3  # of the adapters; a bank has rates of its own

Batch = Mapping[str, torch.Tensor]


class Kept:
    """Tasks on one model.

    Attributes:
        label: of the way to keep them, in tables.
        model: the classifier, with the head of the task that it is now.
    """

    label: str
    files: tuple[str, ...]  # that hold tasks in a saved folder
    model: nn.Module

    def mixed(self, batch: Batch, tasks: Sequence[str]) -> dict[str, torch.Tensor]:
        """Logits by task of a batch, whose rows are of these tasks: a pass for each task."""
        found = {}
        for name, rows in rows_of(tasks).items():
            self.switch(name)
            found[name] = self.model(**{key: own[rows] for key, own in batch.items()}).logits
        return found


def rows_of(tasks: Sequence[str]) -> dict[str, list[int]]:
    """By task the numbers of its rows."""
    return {own: [n for n, name in enumerate(tasks) if name == own] for own in dict.fromkeys(tasks)}


class Bank(Kept):
    """A ``TaskBank`` on the backbone in a folder, or a saved one."""

    label, files = "exact recall", ("bank.*",)

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.bank = TaskBank.from_pretrained(folder, sparsity=OWN, device=device)
        self.model = self.bank.model

    @classmethod
    def load(cls, base: Path, folder: Path, device: str = "cpu") -> Bank:
        """The tasks of a saved folder, which names its base."""
        return cls(folder, device)

    def learn(self, name: str, texts: datasets.Dataset, labels: Sequence[str]) -> None:
        """Learn a task in one epoch."""
        how = {"epochs": 1, "batch_size": BATCH_SIZE, "max_length": LENGTH, "progress": False}
        self.bank.learn(name, texts, labels=labels, **how)

    def begin(self, name: str, labels: Sequence[str]) -> list[dict[str, Any]]:
        """Open a new task; groups of the parameters to train."""
        self.bank.recall.begin(name, labels)
        return self.bank.recall.parameters()

    def close(self) -> None:
        """Keep the open task as it is now."""
        self.bank.recall.close()

    def switch(self, name: str) -> None:
        """Make the model that of a task."""
        self.bank.recall.switch(name)

    def base(self) -> None:
        """Make the model the base."""
        self.bank.recall.switch(None)

    def remove(self, name: str) -> None:
        """Forget a task."""
        self.bank.recall.remove(name)

    def weights(self, name: str) -> int:
        """The number of weights that are a task's own, beside its head."""
        return sum(int(own.sum()) for own in self.bank.recall.mask(name).values())

    def save(self, folder: Path) -> None:
        """Write all tasks to a folder."""
        self.bank.save_pretrained(folder)


class Adapters(Kept):
    """Adapters of peft on every linear layer of the backbone, and a head per task.

    Args:
        base: the backbone's folder.
    """

    files = ("*/adapter_*", "heads.safetensors")

    def __init__(self, base: Path, device: str = "cpu") -> None:
        self._backbone = load_backbone(str(base), max_length=LENGTH, seed=0)
        self.model = self._backbone.model.eval().to(device)
        self._first_head = present(self.model, part_names(self.model))
        self._layers = linear_layers(self.model)
        self._heads: dict[str, Head] = {}
        self._peft: Any = None

    @classmethod
    def load(cls, base: Path, folder: Path, device: str = "cpu") -> Adapters:
        """The tasks of a saved folder, on their base."""
        from peft import PeftModel

        kept = cls(base, device)
        with safe_open(folder / "heads.safetensors", "pt") as file:
            labels = json.loads(file.metadata()["labels"])
            states = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, own in labels.items():
            if kept._peft is None:
                kept._peft = PeftModel.from_pretrained(kept.model, folder / name, name).eval()
            else:
                kept._peft.load_adapter(folder / name, name)
            start = f"{name}/"
            state = {n.removeprefix(start): t for n, t in states.items() if n.startswith(start)}
            config = dict(kept._first_head.config)
            head = restored(kept.model, kept._first_head, state, config=config)
            kept._heads[name] = describe(head, own)
        return kept

    @staticmethod
    def config(layers: list[str], *, seed: int) -> Any:
        """The configuration of one task's adapter."""
        raise NotImplementedError

    def learn(self, name: str, texts: datasets.Dataset, labels: Sequence[str]) -> None:
        """Learn a task in one epoch."""
        optimizer = torch.optim.AdamW(self.begin(name, labels), lr=LEARNING_RATE)
        rows = encode(texts, self._backbone).remove_columns("length").to_list()
        pad = collate(self._backbone)
        for start in range(0, len(rows), BATCH_SIZE):
            batch = pad(rows[start : start + BATCH_SIZE])
            self.model(**{n: t.to(self.model.device) for n, t in batch.items()}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        self.close()

    def begin(self, name: str, labels: Sequence[str]) -> list[dict[str, Any]]:
        """Open a new task; groups of the parameters to train."""
        from peft import get_peft_model

        # A seed of its own: without one, SHiRA takes the same positions for all tasks.
        config = self.config(self._layers, seed=len(self._heads))
        with undisturbed_rng(self.model.device):
            torch.manual_seed(len(self._heads))
            if self._peft is None:
                self._peft = get_peft_model(self.model, config, adapter_name=name)
            else:
                self._peft.add_adapter(name, config)
        self._peft.eval().set_adapter(name)
        head = self._heads[name] = labelled(self.model, self._first_head, labels, seed=name)
        head.set_trainable(True)
        place(self.model, head)
        return [{"params": [p for p in self.model.parameters() if p.requires_grad]}]

    def close(self) -> None:
        """Keep the open task as it is now."""
        *_, head = self._heads.values()
        head.set_trainable(False)

    def switch(self, name: str) -> None:
        """Make the model that of a task."""
        self._peft.set_adapter(name, inference_mode=True)
        place(self.model, self._heads[name])

    def base(self) -> None:
        """Subtract a merged adapter from the weights, if there is one."""
        if any(getattr(module, "merged", False) for module in self.model.modules()):
            self._peft.unmerge_adapter()

    def remove(self, name: str) -> None:
        """Forget a task."""
        self._peft.delete_adapter(name)
        del self._heads[name]

    def weights(self, name: str) -> int:
        """The number of weights of a task's adapter."""
        return sum(p.numel() for n, p in self.model.named_parameters() if name in n.split("."))

    def save(self, folder: Path) -> None:
        """Write all tasks to a folder: adapters in folders of their own, and all heads together."""
        self._peft.save_pretrained(folder)
        states, labels = {}, {}
        for name, head in self._heads.items():
            states |= {f"{name}/{own}": t for own, t in head.state_dict().items()}
            labels[name] = list(head.config["label2id"])
        save_file(states, folder / "heads.safetensors", {"labels": json.dumps(labels)})


class LoRA(Adapters):
    """LoRA of peft: a product of two thin matrices beside each matrix."""

    label = "LoRA"

    @staticmethod
    def config(layers: list[str], *, seed: int) -> Any:
        from peft import LoraConfig

        return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=layers)

    def mixed(self, batch: Batch, tasks: Sequence[str]) -> dict[str, torch.Tensor]:
        """Logits by task of a batch, whose rows are of these tasks: one pass."""
        ((name, _),) = self._first_head.parts.items()
        self.model.set_submodule(name, nn.Identity())
        features = self._peft(**batch, adapter_names=list(tasks)).logits
        parts = {own: self._heads[own].parts[name] for own in dict.fromkeys(tasks)}
        return {own: parts[own](features[rows]) for own, rows in rows_of(tasks).items()}


class SHiRA(Adapters):
    """SHiRA of peft: values that are added to some random weights of each matrix.

    It takes ``adapter_names`` too, but answers all rows with the adapter of one task.
    """

    label = "SHiRA"

    @staticmethod
    def config(layers: list[str], *, seed: int) -> Any:
        from peft import ShiraConfig

        return ShiraConfig(r=RANK, target_modules=layers, random_seed=seed)


class _Merged(Adapters):
    """Saved adapters, of which the shown one is added to the weights."""

    def switch(self, name: str) -> None:
        """Make the model that of a task: subtract the shown adapter, add this one."""
        self.base()
        super().switch(name)
        self._peft.merge_adapter()


class MergedLoRA(_Merged):
    """LoRA, merged."""

    label = "LoRA, merged"


class MergedSHiRA(_Merged):
    """SHiRA, merged."""

    label = "SHiRA, merged"


def linear_layers(model: nn.Module) -> list[str]:
    """The names of the linear layers of a classifier's backbone."""
    start = f"{model.base_model_prefix}."
    modules = model.named_modules()
    return [n for n, m in modules if isinstance(m, nn.Linear) and n.startswith(start)]


def error_of_own_heads(
    kind: type[Adapters], base: Path, folder: Path, sizes: Mapping[str, int]
) -> str:
    """The error that peft gives when it loads adapters with heads of these sizes; "" for none.

    Here peft keeps the heads too (``task_type="SEQ_CLS"``). Each adapter comes from a model of its
    own, because a model of peft has heads of one size.
    """
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForSequenceClassification

    new = partial(
        AutoModelForSequenceClassification.from_pretrained, base, ignore_mismatched_sizes=True
    )
    with quiet():
        for name, size in sizes.items():
            model = new(num_labels=size)
            config = kind.config(linear_layers(model), seed=0)
            config.task_type = "SEQ_CLS"
            get_peft_model(model, config, adapter_name=name).save_pretrained(folder)
        (first, size), *others = sizes.items()
        model = PeftModel.from_pretrained(new(num_labels=size), folder / first, first)
    try:
        for name, _ in others:
            model.load_adapter(folder / name, name)
    except RuntimeError as error:
        return " ".join(str(error).split())
    return ""
