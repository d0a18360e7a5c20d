"""The file of exact recall: safetensors with each task's own weights and head.

Tensors of task ``i``, in the order of closing: ``i.positions`` (uint8; the positions of its own
weights in all eligible parameters, one after the other: gaps as little-endian uint16 or one bit a
weight, whichever is smaller), ``i.values.<n>`` (the values, a tensor for each dtype of the
parameters), ``i.head.<name>`` and ``i.kept.<name>`` (what ``close`` was given). Tensor ``base``:
parameters and digests as JSON, compressed by zlib. Metadata: format, version, settings, and a
record per task with its name, label names, seed, notes and the digest of all that is the task's.
The digest of the whole file covers all of that.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import numpy
import torch

from bitstack_nb.maskfile import DAMAGE, MaskFileError, digest, read_tensors, write_tensors
from bitstack_nb.own import Own

if TYPE_CHECKING:
    from bitstack_nb.recall import Task

FORMAT, VERSION = "bitstack-tasks", "2"
_MORE = 0xFFFF  # a gap this long or longer goes on in the next number
_MOST = 1 << 26  # bytes of names and digests; more are no file of ours


def write(
    path: str | os.PathLike[str],
    tasks: Iterable[Task],
    *,
    parameters: Mapping[str, torch.Tensor],
    base: Mapping[str, str],
    settings: Mapping[str, Any],
    begun: int,
) -> None:
    """Write closed tasks to ``path``, whole or not at all.

    Args:
        parameters: the eligible ones, in the order of the tasks' own weights.
        base: digests of the base.
        settings, begun: what else ``ExactRecall`` needs to go on.
    """
    about = {"parameters": described(parameters), "base": dict(base)}
    about = json.dumps(about, separators=(",", ":"))
    tensors, records = {"base": _bytes(zlib.compress(about.encode(), 9))}, []
    for number, task in enumerate(tasks):
        own, record = _content(task, [p.numel() for p in parameters.values()])
        tensors |= {f"{number}.{key}": tensor for key, tensor in own.items()}
        records.append(record)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "settings": json.dumps(dict(settings)),
        "begun": json.dumps(begun),
        "tasks": json.dumps(records, separators=(",", ":")),
    }
    metadata["digest"] = digest({"base": tensors["base"]}, metadata)
    write_tensors(path, tensors, metadata)


def described(parameters: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """Shapes and dtypes by name, for JSON."""
    return {n: {"shape": list(p.shape), "dtype": str(p.dtype)} for n, p in parameters.items()}


def task_digest(task: Task, sizes: list[int]) -> str:
    """The digest of a task as it is now; ``sizes`` are those of the eligible parameters."""
    return _content(task, sizes)[1]["digest"]


def own_bytes(own: Own, sizes: list[int]) -> int:
    """Bytes that own weights take in a file; ``sizes`` are those of the eligible parameters."""
    values = sum(values.numel() * values.element_size() for values in own.values)
    return len(_packed(_flat(own, sizes), sum(sizes))) + values


def _content(task: Task, sizes: list[int]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A task's tensors and its record."""
    own = {f"values.{i}": values for i, values in enumerate(task.own.values)}
    own |= {f"head.{name}": tensor for name, tensor in task.head.state_dict().items()}
    own |= {f"kept.{name}": tensor for name, tensor in task.kept.items()}
    # Clones, because safetensors refuses tensors that share memory.
    own = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in own.items()}
    own["positions"] = _bytes(_packed(_flat(task.own, sizes), sum(sizes)))
    record = {"name": task.name, "labels": task.labels, "seed": task.seed, "notes": task.notes}
    record["config"] = json.loads(json.dumps(task.head.config))  # as it is read again
    return own, {**record, "digest": digest(own, record)}


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check a file; the counterpart of :func:`write`.

    Raises:
        FileNotFoundError: there is no such file.
        MaskFileError: it is not a file of tasks, is damaged, or is of a newer format version.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise MaskFileError(f"{path} is not a file written by ExactRecall.save")
    if metadata.get("version") != VERSION:
        raise MaskFileError(
            f"{path} has format version {metadata.get('version')}, this package reads {VERSION}: "
            "update it"
        )
    try:
        return _state(metadata, tensors)
    except (*DAMAGE, zlib.error) as error:
        raise MaskFileError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _state(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    if metadata.pop("digest") != digest({"base": tensors["base"]}, metadata):
        raise ValueError("its content is not what its digest says")
    unpack = zlib.decompressobj()
    about = json.loads(unpack.decompress(tensors.pop("base").numpy().tobytes(), _MOST))
    if not unpack.eof:
        raise ValueError("the description of its base is cut short")
    by_task: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        by_task.setdefault(number, {})[name] = tensor
    records = json.loads(metadata["tasks"])
    if set(by_task) != {str(number) for number in range(len(records))}:
        raise ValueError("there are tensors of other tasks than its records")
    tasks = [_task(r, by_task[str(n)], about["parameters"]) for n, r in enumerate(records)]
    if len({task["name"] for task in tasks}) < len(tasks):
        raise ValueError("two tasks have one name")
    return {
        "settings": dict(json.loads(metadata["settings"])),
        "begun": int(metadata["begun"]),
        "tasks": tasks,
        **about,
    }


def _task(
    record: dict[str, Any], tensors: dict[str, torch.Tensor], parameters: Mapping[str, Any]
) -> dict[str, Any]:
    told = record.pop("digest")
    if told != digest(tensors, record):
        raise ValueError(f"task {record['name']!r} is not what its digest says")
    sizes = [prod(p["shape"]) for p in parameters.values()]
    counts, positions = _split(_unpacked(tensors["positions"], sum(sizes)), sizes)
    values = [tensors[key] for key in sorted(tensors) if key.startswith("values.")]
    by_dtype = dict.fromkeys((p["dtype"] for p in parameters.values()), 0)
    for parameter, count in zip(parameters.values(), counts, strict=True):
        by_dtype[parameter["dtype"]] += count
    if [len(own) for own in values] != list(by_dtype.values()):
        raise ValueError(f"task {record['name']!r} has not one value per own weight")
    config = record["config"]
    if config.get("id2label") is not None:  # JSON has made its numbers strings
        config["id2label"] = {int(number): label for number, label in config["id2label"].items()}
    own = Own(counts, torch.from_numpy(positions), values)
    parts = {part: _below(tensors, part) for part in ("head", "kept")}
    return {**record, **parts, "own": own, "digest": told}


def _below(tensors: Mapping[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with ``part.``, by the rest of their names."""
    return {k.partition(".")[2]: t for k, t in tensors.items() if k.startswith(f"{part}.")}


# Positions ----------------------------------------------------------------------------------------


def _flat(own: Own, sizes: list[int]) -> numpy.ndarray:
    """Positions in all parameters laid end to end: int64, ascending."""
    starts = numpy.cumsum([0, *sizes[:-1]])
    return own.positions.cpu().numpy().astype(numpy.int64) + numpy.repeat(starts, own.counts)


def _split(flat: numpy.ndarray, sizes: list[int]) -> tuple[list[int], numpy.ndarray]:
    """The counterpart of :func:`_flat`: how many are in each parameter, and where in it."""
    ends = numpy.cumsum(sizes)
    counts = numpy.diff(numpy.searchsorted(flat, ends), prepend=0)
    inside = flat - numpy.repeat(ends - sizes, counts)
    return counts.tolist(), inside.astype(numpy.int32)


def _packed(flat: numpy.ndarray, total: int) -> bytes:
    gaps = numpy.diff(flat, prepend=-1) - 1
    numbers = numpy.full(len(gaps) + (gaps // _MORE).sum(), _MORE, dtype="<u2")
    numbers[numpy.cumsum(gaps // _MORE + 1) - 1] = gaps % _MORE
    if numbers.nbytes < (total + 7) // 8:
        return b"g" + numbers.tobytes()
    mask = numpy.zeros(total, dtype=bool)
    mask[flat] = True
    return b"b" + numpy.packbits(mask, bitorder="little").tobytes()


def _unpacked(packed: torch.Tensor, total: int) -> numpy.ndarray:
    data = packed.numpy().tobytes()
    if data[:1] == b"b":
        mask = numpy.unpackbits(numpy.frombuffer(data, numpy.uint8, offset=1), bitorder="little")
        flat = numpy.flatnonzero(mask)
    else:
        numbers = numpy.frombuffer(data, "<u2", offset=1).astype(numpy.int64)
        last = numbers != _MORE
        flat = (numpy.cumsum(numbers + last) - 1)[last]
    if len(flat) and flat[-1] >= total:
        raise ValueError("a task has own weights beyond the last parameter")
    return flat


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
