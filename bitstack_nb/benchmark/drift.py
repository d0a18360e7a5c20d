"""Where forgetting lives: one group of weights at a time is put back to where task 1 left it.

What returns of the first task's accuracy says how much of what was forgotten that group's drift
explains by itself. Groups interact, so their shares need not add up to the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bitstack_nb.eligible import head_parameters

# Kinds of parameters, each of which is of one; then what they are to a stack that has locked.
KINDS = ("embeddings", "norms", "biases", "attention", "MLP", "other")
STATES = ("locked", "free", "not eligible")


def backbone(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters without those of its head."""
    heads = head_parameters(model)
    return {name: p for name, p in model.named_parameters() if name not in heads}


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    """The backbone as it is now, on the CPU."""
    return {
        name: p.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, p in backbone(model).items()
    }


def kinds(model: nn.Module) -> dict[str, str]:
    """One of ``KINDS`` for each parameter of the backbone, by name.

    Norms with their biases; then embeddings; then what has one dimension (biases). Matrices of
    the blocks are attention if an attention module holds them, else MLP; others (such as BERT's
    pooler) are ``other``.
    """
    held = {
        f"{path}.{own}": module
        for path, module in model.named_modules()
        for own, _ in module.named_parameters(recurse=False)
    }
    return {name: _kind(name, held[name], p) for name, p in backbone(model).items()}


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


def groups(
    model: nn.Module, masks: Mapping[str, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor | None]]:
    """Which entries of which parameters make up each group that has any.

    Args:
        model: its backbone is divided.
        masks: a stack's, by parameter name; none where nothing can be locked.

    Returns:
        Group -> parameter name -> bool mask of its entries, or None for all of them.
    """
    by_kind = kinds(model)
    found: dict[str, dict[str, torch.Tensor | None]] = {
        kind: {name: None for name, own in by_kind.items() if own == kind} for kind in KINDS
    }
    if masks:
        found["locked"] = {name: masks[name] for name in masks}
        found["free"] = {name: ~masks[name] for name in masks}
        found["not eligible"] = {name: None for name in by_kind if name not in masks}
    return {group: entries for group, entries in found.items() if entries}


@contextmanager
def put_back(
    model: nn.Module,
    former: Mapping[str, torch.Tensor],
    entries: Mapping[str, torch.Tensor | None],
) -> Iterator[int]:
    """Give these entries their former values; the present ones come back after the block.

    Args:
        model: changed in place.
        former: values by parameter name, of the parameters' shapes.
        entries: parameter name -> bool mask, or None for the whole parameter.

    Yields:
        How many entries that are.
    """
    parameters = dict(model.named_parameters())
    present = {name: parameters[name].detach().clone() for name in entries}
    with torch.no_grad():
        for name, mask in entries.items():
            old = former[name].to(parameters[name].device)
            parameters[name].copy_(old if mask is None else old.where(mask, parameters[name]))
    try:
        yield sum(
            present[name].numel() if mask is None else int(mask.sum())
            for name, mask in entries.items()
        )
    finally:
        with torch.no_grad():
            for name, values in present.items():
                parameters[name].copy_(values)


def attribute(
    model: nn.Module,
    former: Mapping[str, torch.Tensor],
    masks: Mapping[str, torch.Tensor],
    evaluate: Callable[[], float],
) -> dict[str, dict[str, Any]]:
    """The first task's accuracy with each group put back: group -> ``accuracy`` (%), ``entries``.

    ``evaluate`` measures it on the model as it is; the other arguments as in :func:`groups` and
    :func:`put_back`.
    """
    found = {}
    for group, entries in groups(model, masks).items():
        with put_back(model, former, entries) as count:
            found[group] = {"accuracy": evaluate(), "entries": count}
    return found
