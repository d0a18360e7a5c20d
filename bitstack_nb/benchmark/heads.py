"""One classification head per task on a shared backbone; a task's head is swapped in to use it.

A head is the model's direct children outside the backbone that hold parameters: ``score`` of GPT-2,
``pre_classifier`` and ``classifier`` of DistilBERT, ``head`` and ``classifier`` of ModernBERT.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from bitstack_nb.data.errors import BackboneError


class Heads:
    """The heads of a sequence classifier of transformers, by task name, in order of adding.

    Args:
        model: its present head is the pattern for all; it stays in place until :meth:`use`.
        seed: with the task's name decides a head's last layer, whatever the order of adding.

    Raises:
        BackboneError: the model has no head that ends in a linear layer of ``num_labels`` outputs.
    """

    def __init__(self, model: PreTrainedModel, *, seed: int) -> None:
        self.model = model
        self.current: str | None = None
        self._seed = seed
        self._heads: dict[str, nn.ModuleDict] = {}
        self._pattern = copy.deepcopy(
            nn.ModuleDict(
                (name, child)
                for name, child in model.named_children()
                if name != model.base_model_prefix and any(True for _ in child.parameters())
            )
        )
        outputs = [
            name
            for name, module in self._pattern.named_modules()
            if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels
        ]
        if not outputs:
            raise BackboneError(
                f"{type(model).__name__} has no head that ends in a linear layer with"
                f" {model.config.num_labels} outputs (its num_labels); use load_backbone"
            )
        self._output = outputs[-1]

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks that have a head, in order of adding."""
        return tuple(self._heads)

    def add(self, task_name: str, num_labels: int) -> None:
        """Make a head for a task: a copy of the model's own with a new last layer.

        Its weights are normal with the model's ``initializer_range``, its biases 0.

        Raises:
            BackboneError: the task has a head already.
        """
        if task_name in self._heads:
            raise BackboneError(f"task {task_name!r} has a head already; take another name")
        head = copy.deepcopy(self._pattern)
        old = head.get_submodule(self._output)
        # Built without its usual initialisation, which would use the global generator.
        output = nn.utils.skip_init(
            nn.Linear,
            old.in_features,
            num_labels,
            bias=old.bias is not None,
            dtype=old.weight.dtype,
        )
        self._initialise(output, task_name)
        head.set_submodule(self._output, output)
        self._heads[task_name] = head.to(self._device())

    def use(self, task_name: str) -> PreTrainedModel:
        """Swap a task's head into the model, on its device and in its mode, and return the model.

        Raises:
            BackboneError: the task has no head.
        """
        if task_name not in self._heads:
            known = ", ".join(self._heads) or "none yet"
            raise BackboneError(f"task {task_name!r} has no head; those that have: {known}")
        head = self._heads[task_name].to(self._device()).train(self.model.training)
        for name, child in head.items():
            setattr(self.model, name, child)
        num_labels = head.get_submodule(self._output).out_features
        self.model.num_labels = self.model.config.num_labels = num_labels
        self.current = task_name
        return self.model

    def modules(self) -> dict[str, nn.Module]:
        """The heads themselves by task, for training them all at once."""
        return dict(self._heads)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All heads' tensors (not copied) as ``task/parameter``, in order of adding."""
        return {
            f"{task}/{name}": tensor
            for task, head in self._heads.items()
            for name, tensor in head.state_dict().items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy the tensors that :meth:`state_dict` gave into the same heads."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])

    @torch.no_grad()
    def _initialise(self, output: nn.Linear, task_name: str) -> None:
        digest = hashlib.sha256(f"{self._seed}/{task_name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        deviation = getattr(self.model.config, "initializer_range", None) or 0.02
        output.weight.normal_(0.0, deviation, generator=generator)
        if output.bias is not None:
            output.bias.zero_()

    def _device(self) -> torch.device:
        return next(self.model.base_model.parameters()).device
