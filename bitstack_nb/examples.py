"""Texts and labels out of what a user has: a dataset, columns, or rows.

A text is a string, or two strings for a model that reads pairs. A label keeps its name; its number
is the place of the name among the task's labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy

Text = str | tuple[str, str]

TEXT, LABELS = "text", ("label", "labels", "class", "category", "target", "topic")


@dataclass(frozen=True)
class Examples:
    """Texts with their labels.

    Attributes:
        texts: strings, or pairs of them.
        labels: the number of each text's label in ``names``.
        names: of the labels.
        columns: the columns that the texts and the labels were in.
    """

    texts: list[Text]
    labels: list[int]
    names: list[str]
    columns: tuple[tuple[str, ...], str]

    @property
    def pairs(self) -> bool:
        """Whether a text is two strings."""
        return isinstance(self.texts[0], tuple)


def read_examples(
    data: Any,
    *,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    names: Sequence[str] | None = None,
    what: str = "train",
) -> Examples:
    """Examples out of a ``datasets.Dataset``, a mapping of columns (a pandas frame too), or rows.

    Args:
        data: rows are mappings, or tuples of a text and a label.
        text: the column of the texts, or two for pairs; None guesses it.
        label: the column of the labels; None guesses it.
        names: of the labels, in order. None takes those of the dataset, else the labels that occur.
        what: the name of ``data`` in errors.

    Raises:
        ValueError: columns cannot be found, a text is no string, or a label is missing or unknown.
    """
    table = _table(data, what)
    if not table or not len(next(iter(table.values()))):
        raise ValueError(f"{what} holds no rows")
    label = label or _guessed(_label_columns(data, table), table, "label", what)
    text = text or _guessed(_text_columns(table, label), table, "text", what)
    columns = (text,) if isinstance(text, str) else tuple(text)
    for name in (*columns, label):
        if name not in table:
            raise ValueError(f"{what} has no column {name!r}, only {', '.join(table)}")
    if len(columns) > 2:
        raise ValueError(f"text is {columns}, expected one column, or two for pairs")
    # A single column may hold pairs.
    values = table[columns[0]] if len(columns) == 1 else zip(*map(table.get, columns), strict=True)
    texts = [as_text(value, f"text {i} of {what}") for i, value in enumerate(values)]
    if len({type(each) for each in texts}) > 1:
        raise ValueError(f"{what} holds pairs and single texts: a task has one or the other")
    known = getattr(_features(data).get(label), "names", None)
    named = [_name(v, known, f"label {i} of {what}") for i, v in enumerate(table[label])]
    numbers, names = _numbered(named, names or known, what)
    return Examples(texts, numbers, names, (columns, label))


def as_text(value: Any, what: str) -> Text:
    """A text as a pipeline of transformers takes it: a string, a pair, or a mapping of them.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping) and "text" in value:
        parts = [value["text"], *([value["text_pair"]] if value.get("text_pair") else [])]
    else:
        parts = list(value) if isinstance(value, tuple | list) and len(value) == 2 else [value]
    if not all(isinstance(part, str) for part in parts):
        shown = repr(value)
        raise ValueError(
            f"{what} is {shown[:60]}{'...' if shown[60:] else ''}, expected a string, or two of "
            "them for a pair"
        )
    return (parts[0], parts[1]) if len(parts) == 2 else parts[0]


# Columns ------------------------------------------------------------------------------------------


def _table(data: Any, what: str) -> dict[str, list]:
    """Columns by name."""
    if isinstance(getattr(data, "column_names", None), Mapping):  # a datasets.DatasetDict
        raise ValueError(f"{what} has the splits {', '.join(data)}: give one of them, as data[...]")
    if hasattr(data, "features") and hasattr(data, "__len__"):
        return {name: list(data[name]) for name in data.column_names}
    if hasattr(data, "columns") or isinstance(data, Mapping):  # pandas frames are like mappings
        return {str(name): list(data[name]) for name in data}
    if not isinstance(data, Iterable) or isinstance(data, str):
        raise ValueError(f"{what} is {type(data).__name__}, expected a dataset, columns or rows")
    rows = list(data)
    if all(isinstance(row, Mapping) for row in rows):
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in names}
    if all(isinstance(row, tuple | list) and len(row) == 2 for row in rows):
        texts, labels = zip(*rows, strict=True)
        return {"text": list(texts), "label": list(labels)}
    raise ValueError(f"{what} has rows that are neither mappings nor tuples of a text and a label")


def _features(data: Any) -> Mapping[str, Any]:
    features = getattr(data, "features", None)
    return features if isinstance(features, Mapping) else {}


def _label_columns(data: Any, table: Mapping[str, list]) -> list[str]:
    classes = [name for name, kind in _features(data).items() if hasattr(kind, "names")]
    return classes or [name for name in LABELS if name in table][:1]


def _text_columns(table: Mapping[str, list], label: str) -> list[str]:
    strings = [n for n, v in table.items() if n != label and isinstance(v[0], str | tuple | list)]
    return [TEXT] if TEXT in strings else strings


def _guessed(found: list[str], table: Mapping[str, list], kind: str, what: str) -> str:
    if len(found) == 1:
        return found[0]
    pair = " (or two for pairs)" if kind == "text" else ""
    raise ValueError(
        f"{what} has the columns {', '.join(table)}: name the one of the {kind}s{pair}, {kind}=..."
    )


# Labels -------------------------------------------------------------------------------------------


def _name(value: Any, known: Sequence[str] | None, what: str) -> str | int:
    """The name of a label; a number where it has none."""
    if isinstance(value, str) and value:
        return str(value)  # numpy's strings are of a kind of their own
    if isinstance(value, bool | numpy.bool_):
        return str(bool(value))
    whole = isinstance(value, Integral) or (isinstance(value, Real) and float(value).is_integer())
    if not whole or value < 0 or (known is not None and value >= len(known)):
        raise ValueError(f"{what} is {value!r}, expected a name or a number: leave such rows out")
    return int(value) if known is None else known[int(value)]


def _numbered(
    named: list[str | int], names: Sequence[str] | None, what: str
) -> tuple[list[int], list[str]]:
    """Each label's number, and the names of all labels."""
    if names is None:
        names = [str(name) for name in sorted({*named}, key=lambda n: (isinstance(n, str), n))]
    place = {name: number for number, name in enumerate(names)}
    numbers = []
    for name in named:
        # A file of text has digits where the label is a number.
        number = place.get(str(name), int(name) if str(name).isdecimal() else None)
        if number is None or number >= len(names):
            raise ValueError(f"{what} has the label {name!r}, expected one of {', '.join(names)}")
        numbers.append(number)
    return numbers, list(names)
