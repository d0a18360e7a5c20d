"""Drawing a task's samples from a source: how many rows, which, and as text and label.

Scope: `take` chooses among rows in visiting order, so that a table on disk and a stream of the Hub
are sampled by the same code; `draw` and `draw_held_out` lead a source's rows past it.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import datasets
import numpy as np

from bitstack_nb.data.errors import DataError
from bitstack_nb.data.sources import Source, hub_errors
from bitstack_nb.data.tasks import SAMPLINGS, Task, is_integer

logger = logging.getLogger(__name__)

# Up to this many rows are streamed: mixed splits need not be fetched whole then; those sorted by
# label (IMDB, DBpedia) are read to their last class but not stored. Also the shuffle buffer.
_STREAM_ROWS = 10_000
_T = TypeVar("_T")


def check_request(
    *, train_size: int | float, test_size: int | float, seed: int, sampling: str
) -> None:
    """Raise a DataError for a size, seed or sampling that cannot be meant."""
    if sampling not in SAMPLINGS:
        raise DataError(f"unknown sampling {sampling!r}: use {' or '.join(SAMPLINGS)}")
    if not is_integer(seed) or seed < 0:
        raise DataError(f"seed is {seed!r}: give an integer, 0 or more")
    for name, size in (("train_size", train_size), ("test_size", test_size)):
        fraction = isinstance(size, float) and 0 < size <= 1
        if not fraction and not (is_integer(size) and size >= 1):
            raise DataError(
                f"{name} is {size!r}: give a number of rows (an integer, 1 or more) or a fraction "
                "of the split (a float above 0, up to 1.0)"
            )


def rows_wanted(size: int | float, total: int) -> int:
    """Rows that a valid `size` asks for in a split of `total` rows; it may be more than there are.

    Fractions are rounded to the nearest row, as in the slices of `datasets`, but give one at least.
    """
    return int(size) if is_integer(size) else max(1, round(size * total))


def take(visits: Iterable[tuple[int, _T]], size: int, num_labels: int, sampling: str) -> list[_T]:
    """The rows of a sample, in the order they were visited.

    "head" takes the first `size` visits. "stratified" takes an equal share of every class (where
    `size` does not divide evenly, the low labels get one more) and, where a class runs short, the
    earliest visits of the others. It stops visiting as soon as every class has its share.

    Args:
        visits: pairs of a label, 0 .. num_labels - 1, and a row.
        size: rows wanted, 1 or more.
        num_labels: classes.
        sampling: "stratified" or "head".

    Returns:
        `size` rows, or all there were if they are fewer.
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
    """Rows to take per class: its share where it has that many, the rest spread over the others."""
    quotas = [min(share, count) for share, count in zip(shares, counts, strict=True)]
    while short := sum(shares) - sum(quotas):
        spare = [label for label, count in enumerate(counts) if quotas[label] < count]
        if not spare:
            break
        step = max(1, short // len(spare))
        for label in spare[:short]:
            quotas[label] += min(step, counts[label] - quotas[label])
    return quotas


def draw(
    task: Task, source: Source, split: str, size: int | float, *, seed: int, sampling: str
) -> tuple[datasets.Dataset, list[int]]:
    """A sample of one split (`text`, `label`) and its row numbers in that split.

    Streamed where that is quicker than fetching the split. A DataError says what does not fit.
    """
    stream = source.stream(split) if is_integer(size) and size <= _STREAM_ROWS else None
    if stream is None:
        table = source.table(split)
        order = _own_rows(task, table, seed, sampling)
        rows = _take_rows(task, table, order, size, sampling, split)
        return _sample(task, table.select(rows)), rows
    with hub_errors(task.dataset):
        visits = _visit_stream(task, stream)
        if sampling == "stratified":
            visits = _shuffle(visits, seed, _STREAM_ROWS)
        drawn = take(visits, size, task.num_labels, sampling)
    _check_enough(task, size, len(drawn), split)
    return _sample(task, [row for _, row in drawn]), [number for number, _ in drawn]


def draw_held_out(
    task: Task, source: Source, taken: list[int], size: int | float, *, seed: int, sampling: str
) -> datasets.Dataset:
    """A sample of the training split without the rows `taken` from it for training."""
    table = source.table("train")
    order = _own_rows(task, table, seed, sampling)
    rest = order[~np.isin(order, taken)]
    wanted = rows_wanted(size, len(order))
    if wanted > len(rest):
        raise DataError(
            f"{task.dataset}: {len(taken)} training and {wanted} held-out rows asked for, but the "
            f"train split holds {len(order)}{_of(task)}: ask for fewer"
        )
    if sampling == "stratified":
        # From the far end, so that more or fewer training rows leave the held-out ones alone.
        rest = rest[::-1]
    return _sample(task, table.select(_take_rows(task, table, rest, wanted, sampling, "train")))


def _own_rows(task: Task, table: datasets.Dataset, seed: int, sampling: str) -> np.ndarray:
    """A task's row numbers in visiting order: as they are for "head", else a seeded permutation."""
    _check_columns(task, table.column_names)
    own = np.array([_label(task, value) is not None for value in table[task.label][:]], dtype=bool)
    rows = len(table)
    order = np.random.default_rng(seed).permutation(rows) if sampling != "head" else np.arange(rows)
    return order[own[order]]


def _take_rows(
    task: Task,
    table: datasets.Dataset,
    order: np.ndarray,
    size: int | float,
    sampling: str,
    split: str,
) -> list[int]:
    """Row numbers of a sample of a table, chosen among those in ``order``."""
    wanted = rows_wanted(size, len(order))
    _check_enough(task, wanted, len(order), split)
    labels = table[task.label][:]
    visits = ((_label(task, labels[row]), row) for row in order.tolist())
    return take(visits, wanted, task.num_labels, sampling)


def _visit_stream(
    task: Task, stream: Iterable[dict[str, Any]]
) -> Iterator[tuple[int, tuple[int, dict[str, Any]]]]:
    """Label and (row number, row) of the task's rows, as they come."""
    for number, row in enumerate(stream):
        if number == 0:
            _check_columns(task, list(row))
        if (label := _label(task, row[task.label])) is not None:
            yield label, (number, row)


def _shuffle(visits: Iterable[_T], seed: int, buffer_size: int) -> Iterator[_T]:
    """Visits in a random order, each from a buffer of those that lie near it in the stream.

    Not `IterableDataset.shuffle`: its order changed between datasets 4 and 5, so that a seed would
    name two samples, and in 5 it sleeps for 5 s whenever a shuffled stream ends.
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


def _sample(task: Task, rows: datasets.Dataset | list[dict[str, Any]]) -> datasets.Dataset:
    """Rows of the source as a dataset of `text` and `label`, in memory."""
    texts, labels = [], []
    for row in rows:
        texts.append(" ".join(str(row[column]) for column in task.text if row[column]))
        labels.append(_label(task, row[task.label]))
    blank = sum(not text.strip() for text in texts)
    holds = f"{task.dataset}: {blank} of {len(texts)} rows drawn hold no text in {task.text}"
    if texts and blank == len(texts):
        raise DataError(f"{holds}: name other columns")
    if blank:  # nothing the user of a Hub dataset could mend; the tokenizer reads a full stop
        logger.warning("%s", holds)
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.Value("int64")}
    )
    return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)


def _label(task: Task, value: Any) -> int | None:
    """The task's label for a label of the dataset; None if the task leaves it out."""
    known = task.num_labels if task.relabel is None else len(task.relabel)
    if not is_integer(value) or not 0 <= value < known:
        raise DataError(
            f"{task.dataset}: label {value!r} in column {task.label!r}, but task {task.name} "
            f"expects 0 to {known - 1}: correct label, num_labels or relabel"
        )
    return int(value) if task.relabel is None else task.relabel[value]


def _check_columns(task: Task, columns: list[str]) -> None:
    absent = [column for column in (*task.text, task.label) if column not in columns]
    if absent:
        raise DataError(
            f"{task.dataset} has no column {absent[0]!r}: its columns are {', '.join(columns)}"
        )


def _check_enough(task: Task, wanted: int, there: int, split: str) -> None:
    if wanted > there:
        raise DataError(
            f"{task.dataset}: {wanted} rows asked for, but the {split} split holds {there}"
            f"{_of(task)}: ask for fewer"
        )


def _of(task: Task) -> str:
    """What a message adds to a number of rows that are not all of the split's."""
    return f" of task {task.name}" if None in (task.relabel or ()) else ""
