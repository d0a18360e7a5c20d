"""The choice of a task's samples: which rows of a split, as text and label.

Scope: `take` chooses among rows in the order they are visited, so tables and streams share one
code path. `sample_split` and `sample_held_out` read a source and check that its rows fit the task.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import datasets
import numpy as np

from bitstack_nb.data.columns import TaskColumns, check_columns
from bitstack_nb.data.errors import DataError
from bitstack_nb.data.sources import Source
from bitstack_nb.data.tasks import Task, is_integer

logger = logging.getLogger(__name__)

# Samples up to this size are streamed, which reads less than the whole split where classes are
# mixed. It is also the size of the shuffle buffer.
_STREAM_ROWS = 10_000
_T = TypeVar("_T")


def sample_split(
    task: Task, source: Source, *, split: str, size: int | float, seed: int, sampling: str
) -> tuple[datasets.Dataset, list[int]]:
    """A sample of one split (`text`, `label`) and its row numbers in that split.

    Raises:
        DataError: the rows do not fit the task, or are too few.
    """
    columns = TaskColumns(task, split, partial(source.place, split))
    stream = source.stream(split) if is_integer(size) and size <= _STREAM_ROWS else None
    if stream is None:
        table = source.table(split)
        order = _visiting_order(columns, table, seed, sampling)
        rows = _take_rows(columns, table, order, size=size, sampling=sampling)
        return _texts_and_labels(columns, zip(rows, table.select(rows), strict=True)), rows
    visits = _visit_stream(columns, stream)
    if sampling == "stratified":
        visits = _shuffle(visits, seed, _STREAM_ROWS)
    chosen = take(visits, size, num_labels=task.num_labels, sampling=sampling)
    _check_enough(task, size, len(chosen), split)
    return _texts_and_labels(columns, chosen), [number for number, _ in chosen]


def sample_held_out(
    task: Task, source: Source, *, taken: list[int], size: int | float, seed: int, sampling: str
) -> datasets.Dataset:
    """A sample of the training split without the row numbers in `taken`."""
    columns = TaskColumns(task, "train", partial(source.place, "train"))
    table = source.table("train")
    order = _visiting_order(columns, table, seed, sampling)
    rest = order[~np.isin(order, taken)]
    wanted = _rows_wanted(size, len(order))
    if wanted > len(rest):
        raise DataError(
            f"{task.dataset}: {len(taken)} training and {wanted} held-out rows asked for, but the "
            f"train split holds {len(order)}{_of(task)}: ask for fewer"
        )
    if sampling == "stratified":
        # The training rows are the first of this order: from its end, their number is irrelevant.
        rest = rest[::-1]
    rows = _take_rows(columns, table, rest, size=wanted, sampling=sampling)
    return _texts_and_labels(columns, zip(rows, table.select(rows), strict=True))


def take(
    visits: Iterable[tuple[int, _T]], size: int, *, num_labels: int, sampling: str
) -> list[_T]:
    """The rows of a sample, in the order they were visited.

    "head" takes the first `size` visits. "stratified" takes an equal share of every class, the low
    labels one more where `size` does not divide evenly. Where a class runs short, the earliest
    visits of other classes fill up. No row is visited after every class has its share.

    Args:
        visits: pairs of a label (0 to num_labels - 1) and a row.
        size: rows wanted, 1 or more.
        num_labels: number of classes.
        sampling: "stratified" or "head".

    Returns:
        `size` rows, or all rows if there are fewer.
    """
    if sampling == "head":
        return [row for _, row in itertools.islice(visits, size)]
    shares = [size // num_labels + (label < size % num_labels) for label in range(num_labels)]
    kept: list[list[tuple[int, _T]]] = [[] for _ in shares]
    unfilled = sum(share > 0 for share in shares)
    for position, (label, row) in enumerate(visits):
        if len(kept[label]) < size:
            kept[label].append((position, row))
            unfilled -= len(kept[label]) == shares[label]
        if not unfilled:
            break
    quotas = _fill_up(shares, [len(rows) for rows in kept])
    chosen = itertools.chain(*(rows[:quota] for rows, quota in zip(kept, quotas, strict=True)))
    return [row for _, row in sorted(chosen, key=lambda visit: visit[0])]


def _fill_up(shares: list[int], counts: list[int]) -> list[int]:
    """Rows to take of each class: its share or all it has, the others filling up."""
    quotas = [min(share, count) for share, count in zip(shares, counts, strict=True)]
    while short := sum(shares) - sum(quotas):
        spare = [label for label, count in enumerate(counts) if quotas[label] < count]
        if not spare:
            break
        step = max(1, short // len(spare))
        for label in spare[:short]:
            quotas[label] += min(step, counts[label] - quotas[label])
    return quotas


def _visiting_order(
    columns: TaskColumns, table: datasets.Dataset, seed: int, sampling: str
) -> np.ndarray:
    """The numbers of a task's rows: in the table's order for "head", else in random order."""
    _check_columns(columns.task, table.column_names)
    labels = table[columns.task.label][:]
    own = np.array([columns.label(value) is not None for value in labels], dtype=bool)
    rows = len(table)
    order = np.arange(rows) if sampling == "head" else np.random.default_rng(seed).permutation(rows)
    return order[own[order]]


def _take_rows(
    columns: TaskColumns,
    table: datasets.Dataset,
    order: np.ndarray,
    *,
    size: int | float,
    sampling: str,
) -> list[int]:
    """The row numbers of a sample, chosen among those in `order`."""
    task, wanted = columns.task, _rows_wanted(size, len(order))
    _check_enough(task, wanted, len(order), columns.split)
    labels = table[task.label][:]
    visits = ((columns.label(labels[row]), row) for row in order.tolist())
    return take(visits, wanted, num_labels=task.num_labels, sampling=sampling)


def _rows_wanted(size: int | float, total: int) -> int:
    """The rows that a size asks for: a number, or a fraction of all rows, at least one."""
    return int(size) if is_integer(size) else max(1, round(size * total))


def _visit_stream(
    columns: TaskColumns, stream: Iterable[dict[str, Any]]
) -> Iterator[tuple[int, tuple[int, dict[str, Any]]]]:
    """Label and (row number, row) of the task's rows, as they come."""
    for number, row in enumerate(stream):
        if number == 0:
            _check_columns(columns.task, list(row))
        if (label := columns.label(row[columns.task.label])) is not None:
            yield label, (number, row)


def _shuffle(visits: Iterable[_T], seed: int, buffer_size: int) -> Iterator[_T]:
    """Visits in random order: each is taken from a buffer of visits that are near in the stream.

    `IterableDataset.shuffle` is not used because its order changed between datasets 4 and 5.
    """
    rng = random.Random(seed)
    buffer: list[_T] = []
    for visit in visits:
        if len(buffer) < buffer_size:
            buffer.append(visit)
            continue
        place = rng.randrange(buffer_size)
        yield buffer[place]
        buffer[place] = visit
    rng.shuffle(buffer)
    yield from buffer


def _texts_and_labels(
    columns: TaskColumns, rows: Iterable[tuple[int, Mapping[str, Any]]]
) -> datasets.Dataset:
    """Numbered rows of the source in memory: `text`, `text_pair` if it is a pair, and `label`."""
    task = columns.task
    sample = [
        columns.texts(number, row) | {"label": columns.label(row[task.label])}
        for number, row in rows
    ]
    blank = sum(not (row["text"] + row.get("text_pair", "")).strip() for row in sample)
    if blank:
        found = f"{task.dataset}: {blank} of {len(sample)} sampled rows hold no text in {task.text}"
        if blank == len(sample):
            raise DataError(f"{found}: name other columns")
        logger.warning("%s", found)
    kinds = {"text": "string", "text_pair": "string", "label": "int64"}
    features = {name: datasets.Value(kinds[name]) for name in sample[0]}
    return datasets.Dataset.from_list(sample, features=datasets.Features(features))


def _check_columns(task: Task, there: list[str]) -> None:
    check_columns(task.dataset, (*task.text, task.label), there)


def _check_enough(task: Task, wanted: int, there: int, split: str) -> None:
    if wanted > there:
        raise DataError(
            f"{task.dataset}: {wanted} rows asked for, but the {split} split holds {there}"
            f"{_of(task)}: ask for fewer"
        )


def _of(task: Task) -> str:
    """Words for a message about a task that leaves rows of its dataset out."""
    return f" of task {task.name}" if None in (task.relabel or ()) else ""
