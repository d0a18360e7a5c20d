"""Tasks: the known ones, some labels of one, and fields that cannot be right."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bitstack_nb.data.errors import DataError
from bitstack_nb.data.tasks import AG_NEWS_BINARY, FIVE_TASKS, TWENTY_TASKS, Task, find_task

FIELDS = {"name": "toy", "dataset": "toy", "text": ["title"], "label": "kind", "num_labels": 3}


def test_the_five_tasks_and_how_to_find_them():
    labels = {"imdb": 2, "ag_news": 4, "dbpedia": 14, "yelp": 5, "yahoo": 10}
    assert {task.name: task.num_labels for task in FIVE_TASKS} == labels
    for task in (*FIVE_TASKS, AG_NEWS_BINARY):
        assert find_task(task.name) is task
    with pytest.raises(DataError, match=r"'snli'.*imdb.*ag_news_binary"):
        find_task("snli")


def test_twenty_small_tasks_of_the_five():
    assert len({(task.dataset, task.relabel) for task in TWENTY_TASKS}) == 20
    assert len({task.name for task in TWENTY_TASKS}) == 20
    assert {task.dataset for task in TWENTY_TASKS} == {task.dataset for task in FIVE_TASKS}
    assert all(find_task(task.name) == task for task in TWENTY_TASKS)


def test_some_labels_of_a_task():
    task = find_task("ag_news_3-1")
    assert (task.num_labels, task.relabel) == (2, (None, 1, None, 0))
    assert AG_NEWS_BINARY.only(1, 0).relabel == (1, 1, 0, 0)
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
