"""Many results in two files: ``runs.jsonl``, one run per line, and ``arrays.npz``, their tables.

``locks`` and ``importance`` are tables of many rows, equal in most runs. In a line each column of
them is the name of an array, and an array that several runs share is stored once. So are the labels
of test texts, true and predicted. A large value that an earlier line has too (``_SHARED``) is
``{"as in line": N}``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bitstack_nb.results.plain_json import as_text, from_text

RUNS, ARRAYS = "runs.jsonl", "arrays.npz"
_SHARED = (
    ("protocol", "tasks"),
    ("provenance", "packages"),
    ("provenance", "model"),
    ("provenance", "data"),
)
# Columns of importance, and of predictions, that hold numbers as text.
_CURVES = ("selected", "union", "fresh")
_LABELS = ("labels", "learnt", "final")
_NO_LAYER = -1  # for None in a column of numbers


def pack(records: Mapping[str, dict[str, Any]], folder: Path) -> None:
    """Write runs, the JSON values of each by its name, into the two files of a folder.

    Raises ValueError where they would not come back equal.
    """
    arrays: dict[str, np.ndarray] = {}
    first: dict[str, int] = {}
    lines = []
    for number, (name, record) in enumerate(records.items(), 1):
        line = {"name": name} | record | {"locks": _pack_table(record["locks"], arrays)}
        if record.get("importance"):
            line["importance"] = _pack_importance(record["importance"], arrays)
        if record.get("predictions"):
            line["predictions"] = [_pack_labels(own, arrays) for own in record["predictions"]]
        for field, key in _SHARED:
            if key in line[field]:
                before = first.setdefault(json.dumps([field, key, line[field][key]]), number)
                if before < number:
                    line[field] = line[field] | {key: {"as in line": before}}
        lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / ARRAYS, **arrays)
    (folder / RUNS).write_text("".join(lines), encoding="utf-8")
    if unpack(folder / RUNS) != [*records.values()]:
        raise ValueError(f"the runs in {folder} would not come back equal: keep their own files")


def unpack(file: Path) -> list[dict[str, Any]]:
    """The JSON values of the runs in a ``runs.jsonl``, whose arrays lie beside it.

    Raises OSError, and ValueError or KeyError for files that do not belong together.
    """
    records: list[dict[str, Any]] = []
    with np.load(file.with_name(ARRAYS)) as arrays:
        for line in file.read_text(encoding="utf-8-sig").splitlines():
            record = json.loads(line)
            record.pop("name")
            for field, key in _SHARED:
                match record[field].get(key):
                    case {"as in line": before}:
                        record[field][key] = records[before - 1][field][key]
            record["locks"] = _unpack_table(record["locks"], arrays)
            if record.get("importance"):
                record["importance"] = _unpack_importance(record["importance"], arrays)
            if found := record.get("predictions"):
                record["predictions"] = [_unpack_labels(own, arrays) for own in found]
            records.append(record)
    return records


def _pack_importance(importance: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    cells = [
        row | {name: from_text(row[name]).tolist() for name in _CURVES}
        for row in importance["cells"]
    ]
    return {
        "sparsities": _store(importance["sparsities"], arrays),
        "cells": _pack_table(cells, arrays),
        "shared": _pack_table(importance["shared"], arrays),
    }


def _unpack_importance(packed: dict[str, Any], arrays: np.lib.npyio.NpzFile) -> dict[str, Any]:
    cells = _unpack_table(packed["cells"], arrays)
    return {
        "sparsities": arrays[packed["sparsities"]].tolist(),
        "cells": [row | {name: as_text(row[name]) for name in _CURVES} for row in cells],
        "shared": _unpack_table(packed["shared"], arrays),
    }


def _pack_labels(own: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """A task's predictions, with the names of arrays in place of labels."""
    texts = {name: own[name] for name in _LABELS if own[name] is not None}
    return own | {name: _store(from_text(text).tolist(), arrays) for name, text in texts.items()}


def _unpack_labels(packed: dict[str, Any], arrays: np.lib.npyio.NpzFile) -> dict[str, Any]:
    stored = {name: packed[name] for name in _LABELS if packed[name] is not None}
    return packed | {name: as_text(arrays[array]) for name, array in stored.items()}


def _pack_table(rows: list[dict[str, Any]], arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """Names of the arrays of the columns. A lock fraction is computed from two others."""
    names = [name for name in (rows[0] if rows else ()) if name != "lock_fraction"]
    return {
        name: _store([_NO_LAYER if row[name] is None else row[name] for row in rows], arrays)
        for name in names
    }


def _unpack_table(columns: dict[str, str], arrays: np.lib.npyio.NpzFile) -> list[dict[str, Any]]:
    values = {name: arrays[stored].tolist() for name, stored in columns.items()}
    if "layer" in values:
        values["layer"] = [None if layer == _NO_LAYER else layer for layer in values["layer"]]
    if "locked" in values:
        both = zip(values["locked"], values["eligible"], strict=True)
        values["lock_fraction"] = [locked / eligible for locked, eligible in both]
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


def _store(values: list[Any], arrays: dict[str, np.ndarray]) -> str:
    """Keep an array under a name made of its content, so that equal ones are kept once."""
    array = np.array(values)
    if array.dtype == np.int64:
        array = array.astype(np.result_type(*map(np.min_scalar_type, (array.min(), array.max()))))
    content = f"{array.dtype}{array.shape}".encode() + array.tobytes()
    name = hashlib.sha256(content).hexdigest()[:10]
    arrays[name] = array
    return name
