"""JSON that a person can read: plain values in, text with a line per record out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


def plain(value: Any, where: str) -> Any:
    """Copy ``value`` as plain JSON values: numpy ones converted, NaN and infinities None.

    Raises TypeError for what JSON cannot hold, naming its place below ``where``.
    """
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    kind = type(value).__name__
    raise TypeError(f"{where} is a {kind}, which JSON cannot hold: convert it to text or numbers")


def as_text(numbers: Iterable[int]) -> str:
    """Whole numbers in one line of text, short enough to be read beside other fields."""
    return " ".join(map(str, np.asarray(numbers).tolist()))


def from_text(text: str) -> np.ndarray:
    """The numbers of a line of text: int64 ``[count]``."""
    return np.array(text.split(), dtype=np.int64)


def canonical(value: Any) -> str:
    """One line of JSON, the same for equal values."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False)


def render(value: Any, indent: str = "") -> str:
    """JSON with a line per entry of a dict and per item of a list that holds lists or dicts."""
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        items = [f"{_line(key)}: {render(item, deeper)}" for key, item in value.items()]
        opening, closing = "{}"
    elif isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
        items = [_line(item) for item in value]
        opening, closing = "[]"
    else:
        return _line(value)
    return opening + "\n" + ",\n".join(deeper + item for item in items) + f"\n{indent}{closing}"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
