"""The training and test samples of a task, and a record of where they came from.

Scope: `load_task`. The rows come from `sources.py`, the choice among them from `sampling.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass

import datasets

from bitstack_nb.data.errors import DataError
from bitstack_nb.data.sampling import check_request, draw, draw_held_out
from bitstack_nb.data.sources import open_source
from bitstack_nb.data.tasks import EVALUATIONS, FIVE_TASKS, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskData:
    """The samples of a task.

    Attributes:
        task: the task they were drawn for.
        train, test: columns `text` (string) and `label` (int64, the task's labels), in memory.
        provenance: JSON-able: source, dataset, its revision, file hashes or generator, how it was
            drawn, and per split the rows, the SHA-256 of the sample and the classes missing in it.
    """

    task: Task
    train: datasets.Dataset
    test: datasets.Dataset
    provenance: dict


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
    """Draw a task's training and test samples.

    The test sample of one seed is the same for every `train_size`; for "heldout" that holds as long
    as the training sample leaves those rows free.

    Args:
        task: what to load.
        data: "hub", "embedded" (synthetic), or a folder with FOLDER/<dataset>/train.parquet and
            test.parquet, <dataset> being the last part of the Hub id.
        train_size, test_size: an int is a number of examples, a float a fraction of the split.
        seed: of the drawing; the global random generators are left alone.
        sampling: "stratified" visits the rows in random order and takes an equal share of each
            class, others filling up where one runs short. "head" takes the first rows.
        evaluate_on: "test", or "heldout": the test sample comes from the training split too, from
            rows that are not in the training sample, and the test split is never read.

    Raises:
        DataError: the data are out of reach or do not fit the task or the sizes.
    """
    if evaluate_on not in EVALUATIONS:
        raise DataError(f"unknown evaluate_on {evaluate_on!r}: use {' or '.join(EVALUATIONS)}")
    check_request(train_size=train_size, test_size=test_size, seed=seed, sampling=sampling)
    # Synthetic rows exist per dataset, whatever a task makes of its labels.
    embedded = next((five.name for five in FIVE_TASKS if five.dataset == task.dataset), None)
    source = open_source(data, task.dataset, config=task.config, embedded=embedded)
    how = {"seed": int(seed), "sampling": sampling}
    train, rows = draw(task, source, "train", train_size, **how)
    if evaluate_on == "heldout":
        test = draw_held_out(task, source, rows, test_size, **how)
    else:
        test, _ = draw(task, source, "test", test_size, **how)
    samples = {"train": train, "test": test}
    provenance = {
        **source.provenance(),
        "drawn": {**how, "evaluate_on": evaluate_on},
        "rows": {split: len(sample) for split, sample in samples.items()},
        "sample": {split: _fingerprint(sample) for split, sample in samples.items()},
        "missing_classes": _missing_classes(task, samples, sampling),
    }
    return TaskData(task, train, test, provenance)


def _missing_classes(
    task: Task, samples: dict[str, datasets.Dataset], sampling: str
) -> dict[str, list[int]]:
    """Per split the classes without a row, reported in one warning if there are any."""
    missing, parts = {}, []
    for split, sample in samples.items():
        held = sorted(set(sample["label"]))
        missing[split] = sorted(set(range(task.num_labels)) - set(held))
        part = f"the {split} sample has none of class {_ranges(missing[split])}"
        if sampling == "head":
            part += f" (the first {len(sample)} rows hold class {_ranges(held)} only)"
        parts += [part] if missing[split] else []
    if parts:
        logger.warning("%s, %d classes: %s", task.name, task.num_labels, "; ".join(parts))
    return missing


def _ranges(labels: list[int]) -> str:
    """Sorted labels, runs of them shortened: "0, 2-9"."""
    runs: list[list[int]] = []
    for label in labels:
        if runs and label == runs[-1][1] + 1:
            runs[-1][1] = label
        else:
            runs.append([label, label])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)


def _fingerprint(sample: datasets.Dataset) -> str:
    """SHA-256 over the sample's rows in order, each as a line of JSON: [text, label]."""
    digest = hashlib.sha256()
    for row in sample:
        line = json.dumps([row["text"], row["label"]], ensure_ascii=False)
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()
