"""Mean-pooled features: one vector per text, from a backbone that is only read."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from bitstack_nb.importance import check_seen, undisturbed


def mean_pooled(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> torch.Tensor:
    """The mean of each text's last hidden states: float32 ``[texts, hidden]``, on the device.

    Runs in evaluation mode, without gradients and autocast. The model's training flags and the
    global random generators are left as found.

    Args:
        model: a transformers classifier or base model, padded on either side.
        batches: mappings with the inputs of the backbone and ``attention_mask``, which is 0 at
            padding. Other entries, such as ``labels``, are left out.

    Raises:
        ValueError: there is no batch.
    """
    backbone = getattr(model, "base_model", model)
    device = next(backbone.parameters()).device
    found = []
    with undisturbed(model, device), torch.no_grad():
        for batch in batches:
            inputs = backbone_inputs(backbone, batch, device)
            hidden = backbone(**inputs).last_hidden_state
            found.append(mean_of_tokens(hidden, inputs["attention_mask"]))
    check_seen(len(found))
    return torch.cat(found)


def mean_of_tokens(hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The mean of ``hidden`` over the tokens that are no padding: float32 ``[texts, hidden]``.

    Args:
        hidden: ``[texts, tokens, hidden]``.
        attention_mask: ``[texts, tokens]``, 0 at padding. A text without tokens gets zeros.
    """
    present = attention_mask.bool()[..., None]
    # A product would be wrong: states at padding may be NaN.
    total = hidden.float().where(present, 0).sum(1)
    return total / present.sum(1).clamp(min=1)


def backbone_inputs(
    backbone: nn.Module, batch: Mapping[str, Any], device: torch.device
) -> dict[str, torch.Tensor]:
    """The entries of a batch that are inputs of a backbone, on its device."""
    known = inspect.signature(backbone.forward).parameters
    return {name: value.to(device) for name, value in batch.items() if name in known}
