"""The tasks of the benchmark: names, columns and labels.

Scope: what a task is, and the known ones. Nothing here imports torch, transformers or datasets:
the command line and protocols name tasks without loading them. `loading.py` loads their samples.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from numbers import Integral
from typing import Any

from bitstack_nb.data.errors import DataError

SAMPLINGS = ("stratified", "head")  # how rows are chosen; see load_task
EVALUATIONS = ("test", "heldout")  # where the test sample comes from


def is_integer(value: Any) -> bool:
    """Whether a value is an integer of Python or NumPy; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A text-classification task: its dataset and the columns to use.

    Attributes:
        name: a short name for tables and files: letters, digits, "_" and "-".
        dataset: Hub id ("stanfordnlp/imdb").
        text: the columns that make up the text, joined by a space; empty ones are skipped.
        label: the column of labels: integers from 0 on, or what plainly stands for them.
        num_labels: the number of classes, after `relabel`.
        relabel: the task's label for each label of the dataset: (0, 0, 1, 1) merges four into two.
            None in place of a label leaves its rows out.
        config: the Hub's configuration name, if the dataset has several.
        pair: True gives the two text columns to the tokenizer as a pair, instead of joined.
        test_split: the Hub's split to test on, if it is not "test": that of GLUE has no labels.

    Raises:
        DataError: a field has a value that no task can have.
    """

    name: str
    dataset: str
    text: tuple[str, ...]
    label: str
    num_labels: int
    relabel: tuple[int | None, ...] | None = None
    config: str | None = None
    pair: bool | None = None
    test_split: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w-]+", self.name):
            raise DataError(f"task name {self.name!r}: use letters, digits, '_' and '-' only")
        for field, value in (("dataset", self.dataset), ("label", self.label)):
            if not isinstance(value, str) or not value.strip("/"):
                raise DataError(f"task {self.name}: {field} is {value!r}: give a name")
        # JSON gives lists; a bare string would be read letter by letter.
        text = tuple(self.text) if isinstance(self.text, tuple | list) else ()
        if not text or not all(isinstance(column, str) and column for column in text):
            raise DataError(
                f"task {self.name}: text is {self.text!r}: give a tuple of columns, as ('text',)"
            )
        object.__setattr__(self, "text", text)
        if self.pair and len(text) != 2:
            raise DataError(
                f"task {self.name}: text is {text} and pair is true: name the first and the second "
                "column of the pair"
            )
        object.__setattr__(self, "pair", bool(self.pair) or None)
        if not is_integer(self.num_labels) or self.num_labels < 2:
            raise DataError(f"task {self.name}: num_labels is {self.num_labels!r}: give 2 or more")
        if self.relabel is not None:
            relabel = tuple(self.relabel) if isinstance(self.relabel, tuple | list) else ()
            kept = [label for label in relabel if label is not None]
            if not all(map(is_integer, kept)) or set(kept) != set(range(self.num_labels)):
                raise DataError(
                    f"task {self.name}: relabel is {self.relabel!r}: use every label from 0 to "
                    f"{self.num_labels - 1}, and None for rows to leave out"
                )
            object.__setattr__(self, "relabel", relabel)

    @property
    def folder(self) -> str:
        """The folder's name under a data folder: the configuration, or the Hub id's last part."""
        return self.config or self.dataset.rpartition("/")[2]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able record. `relabel` and `config` are in it even if None, as in recorded runs."""
        fields = asdict(self)
        return {k: v for k, v in fields.items() if v is not None or k in ("relabel", "config")}

    def only(self, *labels: int) -> Task:
        """The task with only the rows of these labels, named ``<name>_<label>-<label>``.

        Raises:
            DataError: a label is unknown or given twice.
        """
        wrong = [label for label in labels if label not in range(self.num_labels)]
        if wrong or len(set(labels)) != len(labels):
            raise DataError(
                f"task {self.name}: labels {labels} make no task: give two or more from 0 to "
                f"{self.num_labels - 1}, each once"
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
AG_NEWS_BINARY = Task(  # World and Sports, or Business and Sci/Tech
    name="ag_news_binary",
    dataset="fancyzhx/ag_news",
    text=("text",),
    label="label",
    num_labels=2,
    relabel=(0, 0, 1, 1),
)


def _glue(name: str, *text: str, num_labels: int = 2, test_split: str = "validation") -> Task:
    """A task of GLUE, of two texts as a pair; the labels of its test splits are secret."""
    return Task(
        name=name,
        dataset="nyu-mll/glue",
        config=name,
        text=text,
        label="label",
        num_labels=num_labels,
        pair=True if len(text) == 2 else None,
        test_split=test_split,
    )


MORE_TASKS: tuple[Task, ...] = (
    _glue("mnli", "premise", "hypothesis", num_labels=3, test_split="validation_matched"),
    _glue("qqp", "question1", "question2"),
    _glue("rte", "sentence1", "sentence2"),
    _glue("sst2", "sentence"),
    Task(
        name="boolq",
        dataset="google/boolq",
        text=("question", "passage"),
        label="answer",
        num_labels=2,
        pair=True,
        test_split="validation",  # it has no test split
    ),
)
TASKS = {
    task.name: task for task in (*FIVE_TASKS, AG_NEWS_BINARY, *MORE_TASKS)
}  # all that are known

_IMDB, _AG_NEWS, _DBPEDIA, _YELP, _YAHOO = FIVE_TASKS
# Two classes each: all pairs of AG News, the classes of DBpedia in pairs, and Yelp's neighbouring
# stars and its extremes. A label may occur in several tasks.
TWENTY_TASKS: tuple[Task, ...] = (
    _IMDB,
    *(_AG_NEWS.only(*pair) for pair in combinations(range(4), 2)),
    *(_DBPEDIA.only(first, first + 1) for first in range(0, 14, 2)),
    *(_YELP.only(star, star + 1) for star in range(4)),
    _YELP.only(0, 4),
    _YAHOO.only(0, 1),
)
# Tasks for which the backbone has to be trained: how they were chosen is in results/README.md.
MIXED_TASKS = tuple(TASKS[name] for name in ("imdb", "yelp", "mnli", "qqp"))
SEQUENCES = {"five": FIVE_TASKS, "twenty": TWENTY_TASKS, "mixed": MIXED_TASKS}


def find_task(name: str) -> Task:
    """The known task of this name, or a known task with only some labels: ``dbpedia_2-3``.

    Raises:
        DataError: no task has this name.
    """
    whole, _, labels = name.rpartition("_")
    if whole in TASKS and re.fullmatch(r"\d+(-\d+)+", labels):
        return TASKS[whole].only(*map(int, labels.split("-")))
    if name not in TASKS:
        raise DataError(f"unknown task {name!r}: use one of {', '.join(TASKS)}, or your own Task")
    return TASKS[name]
