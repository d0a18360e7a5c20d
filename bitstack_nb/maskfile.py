"""The file of ``BitStack``: safetensors with all masks in one packed tensor.

Tensors: ``masks`` (uint8, each parameter's packed bits one after the
other, every parameter from a whole byte on), ``values.<dtype>`` (the locked values of the
parameters of that dtype, in the same order), ``selected`` and ``added`` (int32, tasks x
parameters). Metadata: format, version, bit order, whether values are there, settings, and
the parameters' names, shapes and dtypes as JSON. One tensor for all masks keeps the header small: a
stack costs one bit per eligible weight.

A digest of all that is in the metadata: without it a flipped bit of a locked value would pass for
the value.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bitstack_nb import bits
from bitstack_nb.files import replacing

FORMAT, VERSION, BIT_ORDER = "bitstack-masks", "4", "little"

# What a file that is not as written makes of the reading of it.
DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


class MaskFileError(ValueError):
    """A mask file is damaged, foreign or belongs to another model."""


def write(path: str | os.PathLike[str], state: Mapping[str, Any], *, values: bool = True) -> None:
    """Write a ``state_dict()`` to ``path``, whole or not at all."""
    tensors, own = _content(state, values=values)
    parameters = [[n, p["shape"], p["dtype"]] for n, p in state["parameters"].items()]
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "bit_order": BIT_ORDER,
        "settings": json.dumps(state["settings"]),
        "parameters": json.dumps(parameters, separators=(",", ":")),
        **own,
    }
    metadata["digest"] = _digest(tensors, metadata)
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except (SafetensorError, OSError) as error:
        raise OSError(f"cannot write the masks to {path}: {error}") from error


def _digest(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of everything in a file but the digest itself, in hexadecimal."""
    kept = sorted(item for item in metadata.items() if item[0] != "digest")
    found = hashlib.sha256(json.dumps(kept).encode())
    for key, tensor in sorted(tensors.items()):
        found.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy())
    return found.hexdigest()


Content = tuple[dict[str, torch.Tensor], dict[str, str]]


def _content(state: Mapping[str, Any], *, values: bool) -> Content:
    names = list(state["parameters"])
    tensors = {"masks": torch.cat([state["bits"][n].cpu() for n in names])}
    for field, at in (("selected", 0), ("added", 1)):
        counts = [[task[n][at] for n in names] for task in state["tasks"]]
        tensors[field] = torch.tensor(counts, dtype=torch.int32, device="cpu").view(-1, len(names))
    if values:
        tensors |= _by_dtype(state["parameters"], [state["values"]])
    return tensors, {"values": json.dumps(values)}


def _by_dtype(
    parameters: Mapping[str, Mapping[str, Any]], tasks: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Values of all tasks and parameters of a dtype, one after the other, by key in the file."""
    tensors = {}
    for dtype in {p["dtype"] for p in parameters.values()}:
        names = [name for name, p in parameters.items() if p["dtype"] == dtype]
        own = [task[name].cpu() for task in tasks for name in names]
        empty = torch.empty(0, dtype=getattr(torch, dtype.removeprefix("torch.")), device="cpu")
        tensors[_values_key(dtype)] = torch.cat([empty, *own])
    return tensors


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check a file; the counterpart of :func:`write` (``values`` is None if left out).

    Raises:
        FileNotFoundError: there is no such file.
        MaskFileError: it is not a mask file, is damaged, or is of another version.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no mask file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise MaskFileError(f"{path} is no safetensors file or is cut short: {error}") from error
    if metadata.get("format") != FORMAT:
        raise MaskFileError(f"{path} is a safetensors file, but not one written by BitStack.save")
    found = tuple(metadata.get(key) for key in ("version", "bit_order"))
    if found != (VERSION, BIT_ORDER):
        raise MaskFileError(
            f"{path} has format version {found[0]} with bit order {found[1]}, this package reads "
            f"version {VERSION} with {BIT_ORDER}"
        )
    if metadata.get("digest") != _digest(tensors, metadata):
        raise MaskFileError(f"{path} is damaged: its content is not what its digest says")
    try:
        return _state(metadata, tensors)
    except DAMAGE as error:
        raise MaskFileError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _parameters(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    return {
        name: {"shape": [int(size) for size in shape], "dtype": str(dtype)}
        for name, shape, dtype in json.loads(metadata["parameters"])
    }


def _check_padding(name: str, packed: torch.Tensor, shape: list[int]) -> None:
    # Set padding bits would be counted as entries that are not there.
    if not torch.equal(bits.pack(bits.unpack(packed, shape)), packed):
        raise ValueError(f"the mask of {name} has bits beyond its end")


def _check_tasks(name: str, tasks: list[list[int]], *, locked: int, size: int) -> None:
    """A task adds no more than it selects, and all of them together what is locked."""
    possible = all(0 <= added <= selected <= size for selected, added in tasks)
    if not possible or sum(added for _, added in tasks) != locked:
        raise ValueError(f"the tasks' counts for {name} are not those of its {locked} locked")


def _state(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    parameters = _parameters(metadata)
    sizes = [bits.packed_size(p["shape"]) for p in parameters.values()]
    packed = dict(zip(parameters, tensors["masks"].split(sizes), strict=True))
    for name, own in packed.items():
        _check_padding(name, own, parameters[name]["shape"])
    tasks = [
        {name: [int(s), int(a)] for name, s, a in zip(parameters, selected, added, strict=True)}
        for selected, added in zip(tensors["selected"], tensors["added"], strict=True)
    ]
    counts = {name: bits.count(own) for name, own in packed.items()}
    for name, own in counts.items():
        size = prod(parameters[name]["shape"])
        _check_tasks(name, [task[name] for task in tasks], locked=own, size=size)
    has_values = json.loads(metadata["values"])
    return {
        "settings": dict(json.loads(metadata["settings"])),
        "parameters": parameters,
        "bits": packed,
        "values": _values(parameters, [counts], tensors)[0] if has_values else None,
        "tasks": tasks,
    }


def _values(
    parameters: Mapping[str, Mapping[str, Any]],
    counts: Sequence[Mapping[str, int]],
    tensors: Mapping[str, torch.Tensor],
) -> list[dict[str, torch.Tensor]]:
    """The counterpart of ``_by_dtype``, from the number of values per task and parameter."""
    values: list[dict[str, torch.Tensor]] = [{} for _ in counts]
    for dtype in {p["dtype"] for p in parameters.values()}:
        names = [name for name, p in parameters.items() if p["dtype"] == dtype]
        stored = tensors[_values_key(dtype)]
        if str(stored.dtype) != dtype:
            raise ValueError(f"values of {dtype} are stored as {stored.dtype}")
        own = iter(stored.split([task[name] for task in counts for name in names]))
        for task in values:
            task.update((name, next(own)) for name in names)
    return values


def check_match(
    stored: Mapping[str, Mapping[str, Any]], parameters: Mapping[str, torch.Tensor]
) -> None:
    """Raise a MaskFileError that names every difference between a state and a model."""
    faults = [f"{name} is not an eligible parameter of it" for name in stored.keys() - parameters]
    faults += [
        f"{name} of the model has no mask (if it was frozen then, freeze it first)"
        for name in parameters.keys() - stored.keys()
    ]
    for name in stored.keys() & parameters.keys():
        own, other = parameters[name], stored[name]
        if list(own.shape) != list(other["shape"]):
            faults.append(f"{name} is {list(own.shape)}, its mask {list(other['shape'])}")
        elif str(own.dtype) != other["dtype"]:
            faults.append(f"{name} is {own.dtype}, its locked values {other['dtype']}")
    if faults:
        raise MaskFileError("the masks belong to another model: " + "; ".join(sorted(faults)))


def _values_key(dtype: str) -> str:
    return f"values.{dtype.removeprefix('torch.')}"
