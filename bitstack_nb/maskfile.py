"""The file of ``BitStack``: safetensors with all masks in one packed tensor.

- ``masks`` (uint8): the parameters' packed masks, one after the other, each from a whole byte on.
- ``values.<dtype>``: the locked values of the parameters of that dtype, in the same order.
- ``selected`` and ``added`` (int32, tasks x parameters): how many weights a task chose and added.
- Metadata: format, version, bit order, whether there are values, settings, a digest, and the
  parameters' names, shapes and dtypes as JSON.

One tensor for all masks keeps the header small: beside the values a file takes one bit per eligible
weight. The digest is of all content. Without it a flipped bit in a locked value would not be found.
``taskfile`` writes and reads the file of ``ExactRecall`` with the same functions.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bitstack_nb import bits
from bitstack_nb.files import replacing

FORMAT, VERSION, BIT_ORDER = "bitstack-masks", "4", "little"

# Errors that a damaged file can raise when its content is used.
DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)

Tensors = dict[str, torch.Tensor]


class MaskFileError(ValueError):
    """A file of masks or tasks is damaged, foreign or belongs to another model."""


def write(path: str | os.PathLike[str], state: Mapping[str, Any], *, values: bool = True) -> None:
    """Write ``BitStack.state_dict()`` to ``path``, whole or not at all."""
    parameters = state["parameters"]
    names = list(parameters)
    tensors = {"masks": torch.cat([state["bits"][n].cpu() for n in names])}
    for field, at in (("selected", 0), ("added", 1)):
        counts = [[task[n][at] for n in names] for task in state["tasks"]]
        tensors[field] = torch.tensor(counts, dtype=torch.int32, device="cpu").view(-1, len(names))
    if values:
        for dtype, own in _by_dtype(parameters).items():
            tensors[f"values.{dtype}"] = torch.cat([state["values"][n].cpu() for n in own])
    described = [[n, p["shape"], p["dtype"]] for n, p in parameters.items()]
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "bit_order": BIT_ORDER,
        "values": json.dumps(values),
        "settings": json.dumps(state["settings"]),
        "parameters": json.dumps(described, separators=(",", ":")),
    }
    metadata["digest"] = digest(tensors, metadata)
    write_tensors(path, tensors, metadata)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check a file that :func:`write` wrote; ``values`` is None if it has none.

    Raises:
        FileNotFoundError: there is no such file.
        MaskFileError: it is not a mask file, is damaged, or is of another version.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise MaskFileError(f"{path} is a safetensors file, but not one written by BitStack.save")
    found = metadata.get("version"), metadata.get("bit_order")
    if found != (VERSION, BIT_ORDER):
        raise MaskFileError(
            f"{path} has format version {found[0]} with bit order {found[1]}, this package reads "
            f"version {VERSION} with {BIT_ORDER}"
        )
    if metadata.pop("digest", None) != digest(tensors, metadata):
        raise MaskFileError(f"{path} is damaged: its content is not what its digest says")
    try:
        return _state(metadata, tensors)
    except DAMAGE as error:
        raise MaskFileError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _state(metadata: Mapping[str, str], tensors: Tensors) -> dict[str, Any]:
    parameters = {
        name: {"shape": [int(size) for size in shape], "dtype": str(dtype)}
        for name, shape, dtype in json.loads(metadata["parameters"])
    }
    sizes = [bits.packed_size(p["shape"]) for p in parameters.values()]
    packed = dict(zip(parameters, tensors["masks"].split(sizes), strict=True))
    tasks = [
        {name: [int(s), int(a)] for name, s, a in zip(parameters, selected, added, strict=True)}
        for selected, added in zip(tensors["selected"], tensors["added"], strict=True)
    ]
    for name, own in packed.items():
        _check_mask(name, own, parameters[name]["shape"], [task[name] for task in tasks])
    return {
        "settings": dict(json.loads(metadata["settings"])),
        "parameters": parameters,
        "bits": packed,
        "values": _values(packed, parameters, tensors) if json.loads(metadata["values"]) else None,
        "tasks": tasks,
    }


def _check_mask(name: str, packed: torch.Tensor, shape: list[int], tasks: list[list[int]]) -> None:
    """Raise a ValueError unless a mask fits its shape and the counts of the tasks."""
    if not torch.equal(bits.pack(bits.unpack(packed, shape)), packed):
        raise ValueError(f"the mask of {name} has bits beyond its end")
    possible = all(0 <= added <= selected <= prod(shape) for selected, added in tasks)
    if not possible or sum(added for _, added in tasks) != bits.count(packed):
        raise ValueError(f"the tasks' counts for {name} are not those of its mask")


def _values(packed: Tensors, parameters: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """The locked values of each parameter, split from the tensor of its dtype."""
    values = {}
    for dtype, names in _by_dtype(parameters).items():
        stored = tensors[f"values.{dtype}"]
        if str(stored.dtype) != f"torch.{dtype}":
            raise ValueError(f"values of {dtype} are stored as {stored.dtype}")
        own = stored.split([bits.count(packed[name]) for name in names])
        values |= zip(names, own, strict=True)
    return values


def _by_dtype(parameters: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """The parameters' names by dtype, such as ``float32``."""
    names: dict[str, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(parameter["dtype"].removeprefix("torch."), []).append(name)
    return names


def check_match(
    stored: Mapping[str, Mapping[str, Any]], parameters: Mapping[str, torch.Tensor]
) -> None:
    """Raise a MaskFileError that names every difference between a state and a model."""
    faults = [f"{name} is not an eligible parameter of it" for name in stored.keys() - parameters]
    faults += [
        f"{name} of the model has no mask (if it was frozen when they were saved, freeze it first)"
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


# Any safetensors file -----------------------------------------------------------------------------


def digest(tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> str:
    """SHA-256 of tensors and of ``about`` (written as JSON), in hexadecimal."""
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for key, tensor in sorted(tensors.items()):
        found.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def write_tensors(path: str | os.PathLike[str], tensors: Tensors, metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except (SafetensorError, OSError) as error:
        raise OSError(f"cannot write {path}: {error}") from error


def read_tensors(path: str | os.PathLike[str]) -> tuple[Tensors, dict[str, str]]:
    """The tensors and the metadata of a safetensors file; errors as in :func:`read`."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise MaskFileError(f"{path} is no safetensors file or is cut short: {error}") from error
