"""The tasks of the benchmark and the samples drawn from them.

Scope: what a task is, the five published ones, and `load_task`, which gives a task's training and
test samples with a record of where they came from. The rows come from `sources.py`, the choice
among them from `sampling.py`; tokenizing is the backbone's business.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass, replace
from itertools import combinations

import datasets

from bitstack_nb.data.sampling import check_request, draw, draw_held_out, is_integer
from bitstack_nb.data.sources import DataError, open_source

logger = logging.getLogger(__name__)

EVALUATIONS = ("test", "heldout")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A text-classification task: where its rows are and which columns to use.

    Attributes:
        name: short, used in tables, file names and state dicts: letters, digits, "_" and "-".
        dataset: Hub id ("stanfordnlp/imdb"); its last part names the folder under a data folder.
        text: the columns that make up the text, joined by a space; empty ones are skipped.
        label: the column of integer labels, 0 and up.
        num_labels: classes of the task, after `relabel`.
        relabel: the task's label for each label of the dataset; (0, 0, 1, 1) merges four into two,
            and None leaves the rows of a label out.
        config: the Hub's configuration name, where the dataset has several.

    Raises:
        DataError: a field that cannot be right.
    """

    name: str
    dataset: str
    text: tuple[str, ...]
    label: str
    num_labels: int
    relabel: tuple[int | None, ...] | None = None
    config: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w-]+", self.name):
            raise DataError(f"task name {self.name!r}: use letters, digits, '_' and '-' only")
        for field, value in (("dataset", self.dataset), ("label", self.label)):
            if not isinstance(value, str) or not value.strip("/"):
                raise DataError(f"task {self.name}: {field} is {value!r}: give a name")
        # A list, as JSON gives it back, is welcome; a bare string would be read letter by letter.
        text = tuple(self.text) if isinstance(self.text, tuple | list) else ()
        if not text or not all(isinstance(column, str) and column for column in text):
            raise DataError(
                f"task {self.name}: text is {self.text!r}: give a tuple of columns, as ('text',)"
            )
        object.__setattr__(self, "text", text)
        if not is_integer(self.num_labels) or self.num_labels < 2:
            raise DataError(f"task {self.name}: num_labels is {self.num_labels!r}: give 2 or more")
        if self.relabel is not None:
            relabel = tuple(self.relabel) if isinstance(self.relabel, tuple | list) else ()
            kept = [label for label in relabel if label is not None]
            if not all(map(is_integer, kept)) or set(kept) != set(range(self.num_labels)):
                raise DataError(
                    f"task {self.name}: relabel is {self.relabel!r}: every label from 0 to "
                    f"{self.num_labels - 1} has to occur, and no other"
                )
            object.__setattr__(self, "relabel", relabel)

    def only(self, *labels: int) -> Task:
        """The smaller task of telling these of the labels apart, named ``<name>_<label>-<label>``.

        A DataError if there are no such labels.
        """
        wrong = [label for label in labels if label not in range(self.num_labels)]
        if wrong or len(set(labels)) != len(labels):
            raise DataError(
                f"task {self.name}: labels {labels} cannot be told apart: give two or more from 0 "
                f"to {self.num_labels - 1}, each once"
            )
        number = {label: position for position, label in enumerate(labels)}
        return replace(
            self,
            name=f"{self.name}_{'-'.join(map(str, labels))}",
            num_labels=len(labels),
            relabel=tuple(map(number.get, self.relabel or range(self.num_labels))),
        )


FIVE_TASKS: tuple[Task, ...] = (
    Task(name="imdb", dataset="stanfordnlp/imdb", text=("text",), label="label", num_labels=2),
    Task(name="ag_news", dataset="fancyzhx/ag_news", text=("text",), label="label", num_labels=4),
    Task(
        name="dbpedia",
        dataset="fancyzhx/dbpedia_14",
        text=("title", "content"),
        label="label",
        num_labels=14,
    ),
    Task(name="yelp", dataset="Yelp/yelp_review_full", text=("text",), label="label", num_labels=5),
    Task(
        name="yahoo",
        dataset="community-datasets/yahoo_answers_topics",
        text=("question_title", "question_content", "best_answer"),
        label="topic",
        num_labels=10,
    ),
)
AG_NEWS_BINARY = Task(  # World and Sports against Business and Sci/Tech
    name="ag_news_binary",
    dataset="fancyzhx/ag_news",
    text=("text",),
    label="label",
    num_labels=2,
    relabel=(0, 0, 1, 1),
)


_IMDB, _AG_NEWS, _DBPEDIA, _YELP, _YAHOO = FIVE_TASKS
# Two classes each: all pairs of AG News, all classes of DBpedia in pairs, Yelp's neighbouring
# stars and its extremes. Labels occur in several tasks; no two tasks are the same.
TWENTY_TASKS: tuple[Task, ...] = (
    _IMDB,
    *(_AG_NEWS.only(*pair) for pair in combinations(range(4), 2)),
    *(_DBPEDIA.only(first, first + 1) for first in range(0, 14, 2)),
    *(_YELP.only(star, star + 1) for star in range(4)),
    _YELP.only(0, 4),
    _YAHOO.only(0, 1),
)
SEQUENCES = {"five": FIVE_TASKS, "twenty": TWENTY_TASKS}


def find_task(name: str) -> Task:
    """The known task of this name, or some labels of one: ``dbpedia_2-3``.

    A DataError lists the names there are.
    """
    known = {task.name: task for task in (*FIVE_TASKS, AG_NEWS_BINARY)}
    whole, _, labels = name.rpartition("_")
    if whole in known and re.fullmatch(r"\d+(-\d+)+", labels):
        return known[whole].only(*map(int, labels.split("-")))
    if name not in known:
        raise DataError(f"unknown task {name!r}: use one of {', '.join(known)}, or your own Task")
    return known[name]


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
