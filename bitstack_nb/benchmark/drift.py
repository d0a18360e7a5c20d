"""Where forgetting lives: one group of weights at a time is put back to where task 1 left it.

The accuracy of task 1 that returns is what this group's drift explains by itself. Groups interact,
so their shares need not add up to the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bitstack_nb.eligible import head_parameters

# Every parameter is of one kind. A stack that has locked divides the same weights by state.
KINDS = ("embeddings", "norms", "biases", "attention", "MLP", "other")
STATES = ("locked", "free", "not eligible")

Weights = Mapping[str, torch.Tensor | None]  # parameter name -> bool mask, or None for all of it


def backbone(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters without those of its head."""
    heads = head_parameters(model)
    return {name: p for name, p in model.named_parameters() if name not in heads}


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the backbone on the CPU."""
    return {
        name: p.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, p in backbone(model).items()
    }


def kinds(model: nn.Module) -> dict[str, str]:
    """One of ``KINDS`` for each parameter of the backbone, by name.

    Norms with their biases; embeddings; of the rest, all of one dimension are biases. Matrices of
    the blocks are attention if an attention module holds them, else MLP; others, such as BERT's
    pooler, are ``other``.
    """
    holders = dict(model.named_modules())
    return {
        name: _kind(name, holders[name.rpartition(".")[0]], p)
        for name, p in backbone(model).items()
    }


def _kind(name: str, module: nn.Module, parameter: nn.Parameter) -> str:
    parts = name.lower().split(".")
    if "norm" in type(module).__name__.lower():
        return "norms"
    if isinstance(module, nn.Embedding) or any("embed" in part for part in parts):
        return "embeddings"
    if parameter.ndim < 2:
        return "biases"
    if not any(part.isdigit() for part in parts):
        return "other"
    return "attention" if any("attn" in part or "attention" in part for part in parts) else "MLP"


def groups(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> dict[str, Weights]:
    """The backbone's weights of each kind, and of each state if there are masks of a stack."""
    by_kind = kinds(model)
    found: dict[str, Weights] = {
        kind: {name: None for name, own in by_kind.items() if own == kind} for kind in KINDS
    }
    if masks:
        found["locked"] = dict(masks)
        found["free"] = {name: ~mask for name, mask in masks.items()}
        found["not eligible"] = {name: None for name in by_kind if name not in masks}
    return {group: weights for group, weights in found.items() if weights}


@contextmanager
@torch.no_grad()
def put_back(
    model: nn.Module, former: Mapping[str, torch.Tensor], weights: Weights
) -> Iterator[int]:
    """Give these weights their former values; the present ones come back after the block.

    Yields how many weights that are.
    """
    parameters = dict(model.named_parameters())
    present = {name: parameters[name].clone() for name in weights}
    count = 0
    for name, mask in weights.items():
        old = former[name].to(parameters[name].device)
        parameters[name].copy_(old if mask is None else old.where(mask, parameters[name]))
        count += old.numel() if mask is None else int(mask.sum())
    try:
        yield count
    finally:
        for name, values in present.items():
            parameters[name].copy_(values)


def attribute(
    model: nn.Module,
    former: Mapping[str, torch.Tensor],
    masks: Mapping[str, torch.Tensor],
    evaluate: Callable[[], float],
) -> dict[str, dict[str, Any]]:
    """The first task's accuracy with each group put back: group -> ``accuracy`` (%), ``entries``.

    ``evaluate`` measures it on the model as it is.
    """
    found = {}
    for group, weights in groups(model, masks).items():
        with put_back(model, former, weights) as count:
            found[group] = {"accuracy": evaluate(), "entries": count}
    return found
