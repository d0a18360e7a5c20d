"""EWC: a penalty for moving weights that mattered for earlier tasks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.strategy import Batches, Data, Strategy, n_bytes
from bitstack_nb.importance import measure


class EWC(Strategy):
    """Online elastic weight consolidation with a diagonal Fisher.

    From the second task on the loss is that of the task plus ``strength / 2 * sum(F * (w - w*)^2)``
    over the backbone: w* are its weights after the task before, F is the sum of the tasks' Fisher
    informations. That is Kirkpatrick et al. (2017), "Overcoming catastrophic forgetting in neural
    networks", in the online form of Schwarz et al. (2018), "Progress & Compress", with its decay at
    1. A task's Fisher is the empirical one: the mean of the squared gradients of single examples,
    with their true labels.
    """

    name, label, order, colour = "ewc", "EWC", 30, "#CC78BC"
    settings = ("strength", "n_batches", "head_steps")

    def __init__(self, model: nn.Module, protocol: Protocol) -> None:
        super().__init__(model, protocol)
        self._fisher: dict[str, torch.Tensor] = {}
        self._anchor: dict[str, torch.Tensor] = {}

    def before_stage(self, number: int, loader: Batches) -> None:
        """Keep the weights that the task before ended with, and add the penalty to the loss."""
        parameters = dict(self.model.base_model.named_parameters())
        self._anchor = {name: parameters[name].detach().clone() for name in self._fisher}
        self._hook = self.model.register_forward_hook(self._add_penalty)

    def after_stage(self, number: int, loader: Batches) -> None:
        """Take the penalty away, and add the Fisher of as many examples as ``n_batches`` hold."""
        self._hook.remove()
        parameters = dict(self.model.base_model.named_parameters())
        limit = self.protocol.n_batches * self.protocol.batch_size
        examples = list(islice(single_examples(loader), limit))
        found = measure(
            self.model, parameters, examples, n_batches=len(examples), importance="fisher"
        )
        for name, squares in found.items():
            if squares.any():  # without a gradient the optimizer leaves it alone: so does this
                own = squares / len(examples)
                self._fisher[name] = own + self._fisher.get(name, 0)

    def penalty(self) -> torch.Tensor | float:
        """The present addition to the loss: a float scalar."""
        parameters = dict(self.model.base_model.named_parameters())
        distances = (
            (self._fisher[name] * (parameters[name] - anchor).square()).sum()
            for name, anchor in self._anchor.items()
        )
        return self.protocol.strength / 2 * sum(distances)

    def _add_penalty(self, model: nn.Module, inputs: tuple, output: Any) -> None:
        output["loss"] = output["loss"] + self.penalty()

    def storage(self, data: Data) -> int:
        return n_bytes(self._fisher.values())  # the weights to stay near are the model's own

    def best_storage(self, data: Data) -> int:
        return self.storage(data) // 2  # float32

    def save(self, folder: Path) -> None:
        save_file(self._fisher, folder / "fisher.safetensors")

    def load(self, folder: Path) -> None:
        self._fisher = load_file(folder / "fisher.safetensors", device=str(self.model.device))


def single_examples(loader: Batches) -> Iterator[dict[str, torch.Tensor]]:
    """The rows of batches, each a batch of one."""
    for batch in loader:
        for row in range(len(batch["labels"])):
            yield {name: column[row : row + 1] for name, column in batch.items()}
