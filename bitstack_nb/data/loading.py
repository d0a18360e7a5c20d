"""The training and test samples of a task, and a record of where they came from.

Scope: `load_task`. The rows come from `sources.py`, the choice among them from `sampling.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from typing import Any

import datasets

from bitstack_nb.data.errors import DataError
from bitstack_nb.data.sampling import sample_held_out, sample_split
from bitstack_nb.data.sources import open_source
from bitstack_nb.data.tasks import EVALUATIONS, SAMPLINGS, Task, is_integer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskData:
    """The samples of a task.

    Attributes:
        task: the task they belong to.
        train, test: columns `text` (string) and `label` (int64, the task's labels), in memory; of
            a pair, `text` is the first and `text_pair` the second.
        provenance: JSON-able: the source, the dataset, its revision, file hashes or generator, how
            the samples were chosen, and per split the number of rows, the SHA-256 of the sample
            and the classes that it lacks.
    """

    task: Task
    train: datasets.Dataset
    test: datasets.Dataset
    provenance: dict[str, Any]


def load_task(
    task: Task,
    data: str,
    *,
    train_size: int | float,
    test_size: int | float,
    seed: int,
    sampling: str = "stratified",
    evaluate_on: str = "test",
) -> TaskData:
    """Load a task's training and test samples.

    The test sample of one seed does not depend on `train_size`, except that "heldout" needs rows
    that the training sample leaves free.

    Args:
        task: the task to load.
        data: "hub", "embedded" (synthetic), or a folder with FOLDER/<dataset>/train.parquet and
            test.parquet, where <dataset> is the task's configuration, or the last part of its Hub
            id.
        train_size, test_size: an int is a number of rows, a float a fraction of the split.
        seed: of the random choice; the global random state is left as found.
        sampling: "stratified" visits the rows in random order and takes an equal share of each
            class, other classes filling up where one runs short. "head" takes the first rows.
        evaluate_on: "test", or "heldout" for a test sample from the rows of the training split
            that are not in the training sample. The test split is then not read.

    Raises:
        DataError: the data cannot be reached, or do not fit the task or the sizes.
    """
    _check_request(train_size, test_size, seed, sampling, evaluate_on)
    source = open_source(data, task)
    how = {"seed": int(seed), "sampling": sampling}
    train, rows = sample_split(task, source, split="train", size=train_size, **how)
    if evaluate_on == "heldout":
        test = sample_held_out(task, source, taken=rows, size=test_size, **how)
    else:
        test, _ = sample_split(task, source, split="test", size=test_size, **how)
    samples = {"train": train, "test": test}
    provenance = {
        **source.provenance(),
        "drawn": {**how, "evaluate_on": evaluate_on},
        "rows": {split: len(sample) for split, sample in samples.items()},
        "sample": {split: _fingerprint(sample) for split, sample in samples.items()},
        "missing_classes": _missing_classes(task, samples),
    }
    return TaskData(task, train, test, provenance)


def _check_request(
    train_size: int | float, test_size: int | float, seed: int, sampling: str, evaluate_on: str
) -> None:
    if sampling not in SAMPLINGS:
        raise DataError(f"unknown sampling {sampling!r}: use {' or '.join(SAMPLINGS)}")
    if evaluate_on not in EVALUATIONS:
        raise DataError(f"unknown evaluate_on {evaluate_on!r}: use {' or '.join(EVALUATIONS)}")
    if not is_integer(seed) or seed < 0:
        raise DataError(f"seed is {seed!r}: give an integer, 0 or more")
    for name, size in (("train_size", train_size), ("test_size", test_size)):
        fraction = isinstance(size, float) and 0 < size <= 1
        if not fraction and not (is_integer(size) and size >= 1):
            raise DataError(
                f"{name} is {size!r}: give a number of rows (an integer, 1 or more) or a fraction "
                "of the split (a float above 0, up to 1.0)"
            )


def _missing_classes(task: Task, samples: dict[str, datasets.Dataset]) -> dict[str, list[int]]:
    """The classes without a row, per split; one warning if there are any."""
    missing = {
        split: sorted(set(range(task.num_labels)) - set(sample["label"]))
        for split, sample in samples.items()
    }
    if any(missing.values()):
        parts = [f"{split} lacks {absent}" for split, absent in missing.items() if absent]
        logger.warning("%s: classes without a row: %s", task.name, "; ".join(parts))
    return missing


def _fingerprint(sample: datasets.Dataset) -> str:
    """SHA-256 over the rows in order, each as a line of JSON: [text, label], or with both texts."""
    digest = hashlib.sha256()
    for row in sample:
        line = json.dumps([*row.values()], ensure_ascii=False)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()
