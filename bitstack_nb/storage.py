"""The file of a stack: safetensors with all masks in one packed tensor.

Tensors: ``masks`` (uint8, each parameter's packed bits one after the other, every parameter from
a whole byte on), ``values.<dtype>`` (the locked values of the parameters of that dtype, in the
same order), ``selected`` and ``added`` (int32, tasks x parameters). Metadata: format, version, bit
order, whether values are there, settings, and the parameters' names, shapes and dtypes as JSON.
One tensor for all masks keeps the header small: a stack costs one bit per eligible entry.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bitstack_nb import bits
from bitstack_nb.files import replacing

FORMAT, VERSION, BIT_ORDER = "bitstack-masks", 1, "little"


class MaskFileError(ValueError):
    """A mask file is damaged, foreign or belongs to another model."""


def write(path: str | os.PathLike[str], state: Mapping[str, Any], *, values: bool) -> None:
    """Write ``BitStack.state_dict()`` to ``path``, whole or not at all."""
    names = list(state["parameters"])
    tensors = {"masks": torch.cat([state["bits"][n].cpu() for n in names])}
    for field, at in (("selected", 0), ("added", 1)):
        counts = [[task[n][at] for n in names] for task in state["tasks"]]
        tensors[field] = torch.tensor(counts, dtype=torch.int32).view(-1, len(names))
    if values:
        for dtype in {p["dtype"] for p in state["parameters"].values()}:
            own = [state["values"][n].cpu() for n in names if _dtype(state, n) == dtype]
            tensors[_values_key(dtype)] = torch.cat(own)
    parameters = [[n, p["shape"], p["dtype"]] for n, p in state["parameters"].items()]
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "bit_order": BIT_ORDER,
        "values": json.dumps(values),
        "settings": json.dumps(state["settings"]),
        "parameters": json.dumps(parameters, separators=(",", ":")),
    }
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except (SafetensorError, OSError) as error:
        raise OSError(f"cannot write the masks to {path}: {error}") from error


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check a file; the counterpart of :func:`write` (``values`` is None if left out).

    Raises:
        FileNotFoundError: there is no such file.
        MaskFileError: it is not a mask file, is damaged, or is of a newer format version.
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
    if (metadata.get("version"), metadata.get("bit_order")) != (str(VERSION), BIT_ORDER):
        raise MaskFileError(
            f"{path} has format version {metadata.get('version')} with bit order "
            f"{metadata.get('bit_order')}, this package reads {VERSION} with {BIT_ORDER}: update it"
        )
    try:
        return _state(metadata, tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise MaskFileError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _state(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    parameters = {
        name: {"shape": [int(size) for size in shape], "dtype": str(dtype)}
        for name, shape, dtype in json.loads(metadata["parameters"])
    }
    sizes = [bits.packed_size(p["shape"]) for p in parameters.values()]
    packed = dict(zip(parameters, tensors["masks"].split(sizes), strict=True))
    for name, own in packed.items():
        # Set padding bits would be counted as locked entries that are not there.
        if not torch.equal(bits.pack(bits.unpack(own, parameters[name]["shape"])), own):
            raise ValueError(f"the mask of {name} has bits beyond its end")
    tasks = [
        {name: [int(s), int(a)] for name, s, a in zip(parameters, selected, added, strict=True)}
        for selected, added in zip(tensors["selected"], tensors["added"], strict=True)
    ]
    return {
        "settings": dict(json.loads(metadata["settings"])),
        "parameters": parameters,
        "bits": packed,
        "values": _values(parameters, packed, tensors) if json.loads(metadata["values"]) else None,
        "tasks": tasks,
    }


def _values(
    parameters: Mapping[str, Mapping[str, Any]],
    packed: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    values = {}
    for dtype in {p["dtype"] for p in parameters.values()}:
        names = [name for name, p in parameters.items() if p["dtype"] == dtype]
        stored = tensors[_values_key(dtype)]
        if str(stored.dtype) != dtype:
            raise ValueError(f"values of {dtype} are stored as {stored.dtype}")
        own = stored.split([bits.count(packed[name]) for name in names])
        values.update(zip(names, own, strict=True))
    return values


def check_match(
    stored: Mapping[str, Mapping[str, Any]], parameters: Mapping[str, torch.Tensor]
) -> None:
    """Raise a MaskFileError that names every difference between a state and a model."""
    faults = [f"{name} is not an eligible parameter of it" for name in stored.keys() - parameters]
    faults += [f"{name} of the model has no mask" for name in parameters.keys() - stored.keys()]
    for name in stored.keys() & parameters.keys():
        own, other = parameters[name], stored[name]
        if list(own.shape) != list(other["shape"]):
            faults.append(f"{name} is {list(own.shape)}, its mask {list(other['shape'])}")
        elif str(own.dtype) != other["dtype"]:
            faults.append(f"{name} is {own.dtype}, its locked values {other['dtype']}")
    if faults:
        raise MaskFileError("the masks belong to another model: " + "; ".join(sorted(faults)))


def _dtype(state: Mapping[str, Any], name: str) -> str:
    return state["parameters"][name]["dtype"]


def _values_key(dtype: str) -> str:
    return f"values.{dtype.removeprefix('torch.')}"
