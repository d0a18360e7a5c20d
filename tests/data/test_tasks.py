"""Tasks and the samples drawn for them, from a folder and embedded."""

from __future__ import annotations

import json
import logging
import random
import re
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from toy_data import SIZES, TASK, write_split, write_toy

from bitstack_nb.data.errors import DataError
from bitstack_nb.data.loading import load_task
from bitstack_nb.data.sampling import take
from bitstack_nb.data.tasks import (
    AG_NEWS_BINARY,
    FIVE_TASKS,
    TWENTY_TASKS,
    Task,
    find_task,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Leaves nothing in the user's dataset cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path) -> str:
    write_toy(tmp_path / "data")
    return str(tmp_path / "data")


def texts(sample: datasets.Dataset) -> set[str]:
    return set(sample["text"])


# Tasks


def test_the_five_tasks_and_how_to_find_them():
    assert [(task.name, task.num_labels) for task in FIVE_TASKS] == [
        ("imdb", 2),
        ("ag_news", 4),
        ("dbpedia", 14),
        ("yelp", 5),
        ("yahoo", 10),
    ]
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
    assert find_task("ag_news_binary") is AG_NEWS_BINARY
    assert AG_NEWS_BINARY.only(1, 0).relabel == (1, 1, 0, 0)
    for labels in ("0-4", "1-1"):
        with pytest.raises(DataError, match=r"labels .*0 to 3, each once"):
            find_task(f"ag_news_{labels}")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"name": "a/b"}, "a/b"),
        ({"name": ""}, "''"),
        ({"dataset": ""}, "dataset"),
        ({"label": None}, "label"),
        ({"text": "title"}, r"\('text',\)"),
        ({"text": ()}, "text"),
        ({"num_labels": 1}, "num_labels"),
        ({"num_labels": 2.0}, "num_labels"),
        ({"relabel": (0, 0, 1, 1)}, "relabel"),
        ({"relabel": (0, 1, 2, 3)}, "relabel"),
        ({"relabel": 3}, "relabel"),
        ({"relabel": (0, 1, None, 1)}, "relabel"),
    ],
)
def test_a_field_that_cannot_be_right_is_named(change, named):
    fields = {"name": "toy", "dataset": "toy", "text": ["title"], "label": "kind", "num_labels": 3}
    assert Task(**fields).text == ("title",)
    with pytest.raises(DataError, match=named):
        Task(**{**fields, **change})


# Choosing rows


@pytest.mark.parametrize("size", [1, 2, 3, 7, 30, 33])
def test_classes_share_equally_and_the_longer_ones_fill_up(size):
    visits = [(label, (label, n)) for n in range(20) for label in (0, 1, 1, 2)]
    visits = [visit for visit in visits if visit[0] != 2 or visit[1][1] < 4]  # 20, 40 and 4 rows
    chosen = take(iter(visits), size, 3, "stratified")
    counts = [sum(label == wanted for label, _ in chosen) for wanted in range(3)]
    assert len(chosen) == size
    assert counts[2] == min(4, size // 3)
    assert abs(counts[0] - counts[1]) <= 1
    positions = [next(i for i, visit in enumerate(visits) if visit[1] == row) for row in chosen]
    assert positions == sorted(positions)


def test_a_stream_is_left_as_soon_as_every_class_has_its_share():
    visited = 0

    def endless():
        nonlocal visited
        while True:
            yield visited % 4, visited
            visited += 1

    assert len(take(endless(), 40, 4, "stratified")) == 40
    assert visited < 41
    assert take(endless(), 5, 4, "head") == list(range(39, 44))


def test_too_few_visits_give_what_there_is():
    assert take([(0, "a"), (1, "b")], 5, 3, "stratified") == ["a", "b"]


# A folder


def test_a_folder_gives_texts_labels_and_what_they_were_drawn_from(folder):
    drawn = load_task(TASK, folder, **SIZES)
    for sample, size in ((drawn.train, 30), (drawn.test, 12)):
        assert sample.features == {
            "text": datasets.Value("string"),
            "label": datasets.Value("int64"),
        }
        assert Counter(sample["label"]) == dict.fromkeys(range(3), size // 3)
        assert sample["label"][:] != sorted(sample["label"])
        for text in sample["text"]:
            number = int(re.fullmatch(r"(?:train|test) title (\d+)(?: body \1)?", text)[1])
            assert text.endswith("body " + str(number)) == bool(number % 2)
    record = json.loads(json.dumps(drawn.provenance))
    assert record["source"] == "folder"
    assert set(record["sha256"]) == {"train.parquet", "test.parquet"}
    assert record["missing_classes"] == {"train": [], "test": []}
    assert record["rows"] == {"train": 30, "test": 12}


def test_the_seed_decides_and_the_training_size_leaves_the_test_sample_alone(folder):
    one, same = (load_task(TASK, folder, **SIZES) for _ in range(2))
    assert one.provenance == same.provenance
    assert one.train.to_list() == same.train.to_list()
    other = load_task(TASK, folder, **{**SIZES, "seed": 1})
    for split in ("train", "test"):
        assert other.provenance["sample"][split] != one.provenance["sample"][split]
    more = load_task(TASK, folder, **{**SIZES, "train_size": 90})
    assert more.test.to_list() == one.test.to_list()


@pytest.mark.parametrize("sampling", ["stratified", "head"])
def test_held_out_rows_come_from_train_and_the_training_rows_stay(folder, sampling):
    usual = load_task(TASK, folder, **SIZES, sampling=sampling)
    Path(folder, "toy", "test.parquet").unlink()  # never read
    held = load_task(TASK, folder, **SIZES, sampling=sampling, evaluate_on="heldout")
    assert held.train.to_list() == usual.train.to_list()
    assert not texts(held.test) & texts(held.train)
    assert all(text.startswith("train") for text in held.test["text"])
    assert set(held.provenance["sha256"]) == {"train.parquet"}
    if sampling == "stratified":
        assert Counter(held.test["label"]) == {0: 4, 1: 4, 2: 4}
        more = load_task(TASK, folder, **{**SIZES, "train_size": 60}, evaluate_on="heldout")
        assert more.test.to_list() == held.test.to_list()


def test_fractions_are_of_the_split_and_1_is_one_row(folder):
    drawn = load_task(TASK, folder, train_size=0.05, test_size=1.0, seed=0)
    assert (len(drawn.train), len(drawn.test)) == (6, 60)
    assert len(load_task(TASK, folder, train_size=1, test_size=1, seed=0).train) == 1


def test_head_takes_the_first_rows_and_warns_once_what_they_hold(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="bitstack_nb"):
        drawn = load_task(TASK, folder, train_size=50, test_size=0.1, seed=0, sampling="head")
    assert drawn.train["text"][0] == "train title 0"
    assert drawn.train["label"][:] == [0] * 40 + [1] * 10
    assert drawn.provenance["missing_classes"] == {"train": [2], "test": [1, 2]}
    (record,) = caplog.records
    for part in ("none of class 2", "first 50 rows", "class 0-1", "none of class 1-2"):
        assert part in record.getMessage()


def test_a_class_missing_in_the_data_is_reported_once_and_the_others_fill_up(folder, caplog):
    wide = Task(name="wide", dataset="toy", text=("title",), label="kind", num_labels=6)
    with caplog.at_level(logging.WARNING, logger="bitstack_nb"):
        drawn = load_task(wide, folder, **SIZES)
    assert Counter(drawn.train["label"]) == {0: 10, 1: 10, 2: 10}
    assert drawn.provenance["missing_classes"] == {"train": [3, 4, 5], "test": [3, 4, 5]}
    (record,) = caplog.records
    assert "3-5" in record.getMessage()
    caplog.clear()
    load_task(TASK, folder, **SIZES)
    assert not caplog.records


def test_relabelled_classes_are_the_ones_that_share_equally(folder):
    merged = Task(
        name="m", dataset="toy", text=("title",), label="kind", num_labels=2, relabel=(1, 0, 1)
    )
    drawn = load_task(merged, folder, **SIZES)
    assert Counter(drawn.train["label"]) == {0: 15, 1: 15}
    for row in drawn.train:
        number = int(row["text"].rpartition(" ")[2])
        assert row["label"] == (0 if 40 <= number < 80 else 1)


@pytest.mark.parametrize("sampling", ["stratified", "head"])
def test_rows_of_labels_left_out_are_never_drawn(folder, sampling):
    """A fraction is one of the rows that are left: 40 of each kind to train on, 20 to test."""
    fields = {"dataset": "toy", "text": ("title",), "label": "kind"}
    task = Task(name="p", num_labels=2, relabel=(1, None, 0), **fields)
    how = {"seed": 0, "sampling": sampling, "train_size": 0.5}
    drawn = load_task(task, folder, **how, test_size=40)
    held = load_task(task, folder, **how, test_size=0.25, evaluate_on="heldout")
    for sample, size in ((drawn.train, 40), (drawn.test, 40), (held.test, 20)):
        assert len(sample) == size
        for row in sample:
            number = int(row["text"].rpartition(" ")[2])
            third = number // (20 if "test" in row["text"] else 40)
            assert row["label"] == {0: 1, 2: 0}[third]
    with pytest.raises(DataError, match=r"81 rows asked for, but the train split holds 80 of task"):
        load_task(task, folder, seed=0, train_size=81, test_size=1)


def test_files_may_be_sharded_and_lie_deeper_as_in_a_copy_of_the_hub(tmp_path):
    deep = tmp_path / "toy" / "data"
    for part in range(2):
        write_split(deep, f"train-0000{part}-of-00002", [0, 1, 2] * 10)
    write_split(deep, "test-00000-of-00001", [0, 1, 2] * 4)
    drawn = load_task(TASK, str(tmp_path), train_size=60, test_size=12, seed=0)
    assert len(texts(drawn.train)) == 60
    assert len(drawn.provenance["sha256"]) == 3


def test_no_global_random_state_moves(folder):
    random.seed(3)
    np.random.seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist()
    load_task(TASK, folder, **SIZES)
    load_task(FIVE_TASKS[0], "embedded", **SIZES)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


# Errors


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"train_size": 121}, "121 .*train.* holds 120"),
        ({"test_size": 61}, "61 .*test.* holds 60"),
        ({"train_size": 110, "evaluate_on": "heldout"}, "110 .* 12 .*120"),
        ({"train_size": 0}, "train_size is 0"),
        ({"train_size": 1.5}, r"train_size is 1\.5"),
        ({"test_size": float("nan")}, "test_size is nan"),
        ({"test_size": True}, "test_size is True"),
        ({"seed": -1}, "seed is -1"),
        ({"sampling": "random"}, "'random'.*stratified or head"),
        ({"evaluate_on": "dev"}, "'dev'.*test or heldout"),
    ],
)
def test_a_request_that_cannot_be_met_says_why_in_one_line(folder, change, named):
    with pytest.raises(DataError, match=named) as caught:
        load_task(TASK, folder, **{**SIZES, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"text": ("headline",)}, "no column 'headline'.*title, body, kind"),
        ({"label": "topic"}, "no column 'topic'.*title, body, kind"),
        ({"label": "title"}, "label 'train title 0'.*0 to 2"),
        ({"num_labels": 2}, "label 2 .*0 to 1"),
        ({"num_labels": 2, "relabel": (0, 1)}, "label 2 .*0 to 1"),
        ({"dataset": "someone/else"}, "no folder 'else'.*toy"),
    ],
)
def test_a_task_that_does_not_fit_the_data_says_what_is_there(folder, change, named):
    fields = {"name": "toy", "dataset": "toy", "text": ("title",), "label": "kind", "num_labels": 3}
    with pytest.raises(DataError, match=named) as caught:
        load_task(Task(**{**fields, **change}), folder, **SIZES)
    assert "\n" not in str(caught.value)


def test_missing_broken_and_ambiguous_files_are_named(folder, tmp_path):
    with pytest.raises(DataError, match=r"no folder .*nowhere.*embedded"):
        load_task(TASK, str(tmp_path / "nowhere"), **SIZES)
    test = Path(folder, "toy", "test.parquet")
    whole = test.read_bytes()
    test.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cannot read .*test\.parquet"):
        load_task(TASK, folder, **SIZES)
    test.unlink()
    with pytest.raises(DataError, match=r"no test\*\.parquet in .*toy"):
        load_task(TASK, folder, **SIZES)
    write_split(Path(folder, "toy", "copy"), "train", [0, 1, 2])
    with pytest.raises(DataError, match="several folders"):
        load_task(TASK, folder, **SIZES)


# Embedded


@pytest.mark.parametrize("task", [*FIVE_TASKS, AG_NEWS_BINARY], ids=lambda task: task.name)
def test_every_known_task_has_embedded_rows_called_synthetic(task):
    drawn = load_task(task, "embedded", train_size=280, test_size=0.2, seed=0)
    assert (len(drawn.train), len(drawn.test)) == (280, 100)
    assert set(drawn.train["label"]) == set(range(task.num_labels))
    assert drawn.provenance["synthetic"] is True
    assert drawn.provenance["generator"].startswith("bitstack_nb.embedded ")


def test_an_own_task_has_no_embedded_rows():
    with pytest.raises(DataError, match=r"someone/toy.*--data"):
        load_task(TASK, "embedded", **SIZES)


def test_blank_texts_are_reported_and_only_a_sample_of_them_is_refused(folder, caplog):
    """One blank row among the Hub's millions, which nobody can mend, must not stop a run."""
    fields = {"name": "toy", "dataset": "toy", "label": "kind", "num_labels": 3}
    sample = load_task(Task(**fields, text=("body",)), folder, **SIZES)
    assert "hold no text" in caplog.text
    assert {bool(text) for text in sample.train["text"]} == {True, False}
    for name in ("train", "test"):
        table = datasets.load_dataset("parquet", data_files=f"{folder}/toy/{name}.parquet")["train"]
        blank = table.remove_columns("body").add_column("body", [" "] * len(table))
        blank.to_parquet(f"{folder}/toy/{name}.parquet")
    with pytest.raises(DataError, match="hold no text"):
        load_task(Task(**fields, text=("body",)), folder, **SIZES)
