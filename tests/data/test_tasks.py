"""Tasks: the known ones, some labels of one, and fields that cannot be right."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bitstack_nb.data.errors import DataError
from bitstack_nb.data.tasks import FIVE_TASKS, TASKS, TWENTY_TASKS, Task, find_task

FIELDS = {"name": "toy", "dataset": "toy", "text": ["title"], "label": "kind", "num_labels": 3}


def test_the_five_tasks_and_how_to_find_them():
    labels = {"imdb": 2, "ag_news": 4, "dbpedia": 14, "yelp": 5, "yahoo": 10}
    assert {task.name: task.num_labels for task in FIVE_TASKS} == labels
    for name, task in TASKS.items():
        assert find_task(name) is task
    with pytest.raises(DataError, match=r"'snli'.*imdb.*ag_news_binary.*boolq"):
        find_task("snli")


def test_twenty_small_tasks_of_the_five():
    assert len({(task.dataset, task.relabel) for task in TWENTY_TASKS}) == 20
    assert len({task.name for task in TWENTY_TASKS}) == 20
    assert {task.dataset for task in TWENTY_TASKS} == {task.dataset for task in FIVE_TASKS}
    assert all(find_task(task.name) == task for task in TWENTY_TASKS)


def test_pairs_and_the_fields_that_their_record_has():
    """A record without the later fields is that of recorded runs, and hashes to their names."""
    assert [name for name, task in TASKS.items() if task.pair] == ["mnli", "qqp", "rte", "boolq"]
    assert FIVE_TASKS[0].to_dict() == {
        "name": "imdb",
        "dataset": "stanfordnlp/imdb",
        "text": ("text",),
        "label": "label",
        "num_labels": 2,
        "relabel": None,
        "config": None,
    }
    assert find_task("mnli_0-2").to_dict() | {"name": "mnli", "num_labels": 3, "relabel": None} == {
        **find_task("mnli").to_dict(),
        "pair": True,
        "test_split": "validation_matched",
    }
    assert all(Task(**task.to_dict()) == task for task in TASKS.values())
    assert Task(**FIELDS, pair=False) == Task(**FIELDS)


def test_some_labels_of_a_task():
    task = find_task("ag_news_3-1")
    assert (task.num_labels, task.relabel) == (2, (None, 1, None, 0))
    assert TASKS["ag_news_binary"].only(1, 0).relabel == (1, 1, 0, 0)
    for labels in ("0-4", "1-1"):
        with pytest.raises(DataError, match=r"labels .*0 to 3, each once"):
            find_task(f"ag_news_{labels}")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"name": "a/b"}, "a/b"),
        ({"dataset": ""}, "dataset"),
        ({"label": None}, "label"),
        ({"text": "title"}, r"\('text',\)"),
        ({"pair": True}, r"\('title',\) and pair is true: name the first and the second"),
        ({"num_labels": 1}, "num_labels"),
        ({"num_labels": 2.0}, "num_labels"),
        ({"relabel": (0, 0, 1, 1)}, "relabel"),
        ({"relabel": (0, 1, 2, 3)}, "relabel"),
    ],
)
def test_a_field_that_cannot_be_right_is_named(change, named):
    assert Task(**FIELDS).text == ("title",)
    with pytest.raises(DataError, match=named):
        Task(**{**FIELDS, **change})


def test_tasks_are_named_without_loading_heavy_libraries():
    code = (
        "import sys, bitstack_nb.data.tasks\n"
        "assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
