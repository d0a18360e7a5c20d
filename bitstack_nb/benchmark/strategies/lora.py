"""LoRA: a low-rank adapter per task beside every linear layer of the frozen backbone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from bitstack_nb.benchmark.adapters import Adapters, linear_layers
from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.strategy import Data, n_bytes
from bitstack_nb.rng import undisturbed_rng


class LoRA(Adapters):
    """An adapter per task, by the package peft: ``lora_alpha`` twice the rank, no dropout.

    Hu et al. (2021), "LoRA: Low-Rank Adaptation of Large Language Models".
    """

    name, label, order, colour = "lora", "LoRA", 70, "#029E73"
    settings = ("rank", "head_steps")
    tiny: ClassVar = {"learning_rate": 3e-3}

    def __init__(self, model: nn.Module, protocol: Protocol) -> None:
        super().__init__(model, protocol)
        try:
            from peft.functional import inject_adapter_in_model, set_adapter
        except ImportError as error:
            raise ValueError(
                "strategy 'lora' needs peft 0.18 or newer: pip install -U peft"
            ) from error
        self._set_adapter = set_adapter
        config = _lora_config(model.base_model, protocol.rank)
        # All at once, so that the model has the same tensors at every saved stage.
        with undisturbed_rng(model.device), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            torch.manual_seed(protocol.seed)
            for task in range(len(protocol.tasks)):
                inject_adapter_in_model(config, model.base_model, _adapter(task))

    @classmethod
    def chosen(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"learning_rate": 2e-3, "head_learning_rate": 1e-2}

    def storage(self, data: Data) -> int:
        parameters = self.model.base_model.named_parameters()
        return n_bytes(parameter for name, parameter in parameters if ".lora_" in name)

    def best_storage(self, data: Data) -> int:
        return self.storage(data) // 2  # float32

    def activate(self, task: int) -> None:
        self._set_adapter(self.model.base_model, _adapter(task))


def _adapter(task: int) -> str:
    return f"task{task}"


def _lora_config(backbone: nn.Module, rank: int) -> Any:
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    layers = linear_layers(backbone)
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        # By their full names: "all-linear" would count in the layers of adapters added before.
        target_modules=list(layers),
        # How Conv1D, the linear layer of GPT-2, stores its weight.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in layers.values()),
    )
