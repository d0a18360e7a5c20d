"""The samples of tasks: which rows are chosen, from a folder and embedded."""

from __future__ import annotations

import json
import logging
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from toy_data import SIZES, TASK, write_split, write_toy

from bitstack_nb.data import AG_NEWS_BINARY, FIVE_TASKS, DataError, Task, load_task
from bitstack_nb.data.sampling import take

FIELDS = {"name": "toy", "dataset": "toy", "text": ("title",), "label": "kind", "num_labels": 3}


@pytest.fixture
def folder(tmp_path) -> str:
    write_toy(tmp_path / "data")
    return str(tmp_path / "data")


# Choosing rows


@pytest.mark.parametrize("size", [1, 2, 7, 30, 33])
def test_classes_share_equally_and_the_longer_ones_fill_up(size):
    visits = [(label, (label, n)) for n in range(20) for label in (0, 1, 1, 2)]
    visits = [visit for visit in visits if visit[0] != 2 or visit[1][1] < 4]  # 20, 40 and 4 rows
    chosen = take(iter(visits), size, num_labels=3, sampling="stratified")
    counts = Counter(label for label, _ in chosen)
    assert len(chosen) == size
    assert counts[2] == min(4, size // 3)
    assert abs(counts[0] - counts[1]) <= 1
    positions = [visits.index((row[0], row)) for row in chosen]
    assert positions == sorted(positions)


def test_a_stream_is_left_as_soon_as_every_class_has_its_share():
    endless = ((number % 4, number) for number in iter(range(10**9)))
    assert len(take(endless, 40, num_labels=4, sampling="stratified")) == 40
    assert take(endless, 3, num_labels=4, sampling="head") == [40, 41, 42]
    few = [(0, "a"), (1, "b")]
    assert take(few, 5, num_labels=3, sampling="stratified") == ["a", "b"]


# A folder


def test_a_folder_gives_texts_labels_and_their_provenance(folder):
    made = load_task(TASK, folder, **SIZES)
    for sample, size in ((made.train, 30), (made.test, 12)):
        kinds = {name: kind.dtype for name, kind in sample.features.items()}
        assert kinds == {"text": "string", "label": "int64"}
        assert Counter(sample["label"]) == dict.fromkeys(range(3), size // 3)
        assert sample["label"][:] != sorted(sample["label"])
        for text in sample["text"]:
            number = int(re.fullmatch(r"(?:train|test) title (\d+)(?: body \1)?", text)[1])
            assert text.endswith("body " + str(number)) == bool(number % 2)
    record = json.loads(json.dumps(made.provenance))
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


def test_recorded_fingerprints_still_name_the_same_samples(folder):
    """The runs in results/ were made on samples that a new version has to find again."""
    made = load_task(FIVE_TASKS[1], "embedded", train_size=28, test_size=14, seed=0)
    assert made.provenance["sample"]["train"].startswith("330a8a4c3a4259e4")
    made = load_task(TASK, folder, **SIZES)
    assert made.provenance["sample"]["train"].startswith("55715907cba2aca0")


@pytest.mark.parametrize("sampling", ["stratified", "head"])
def test_held_out_rows_come_from_train_and_the_training_rows_stay(folder, sampling):
    usual = load_task(TASK, folder, **SIZES, sampling=sampling)
    Path(folder, "toy", "test.parquet").unlink()  # never read
    held = load_task(TASK, folder, **SIZES, sampling=sampling, evaluate_on="heldout")
    assert held.train.to_list() == usual.train.to_list()
    assert not set(held.test["text"]) & set(held.train["text"])
    assert all(text.startswith("train") for text in held.test["text"])
    assert set(held.provenance["sha256"]) == {"train.parquet"}
    if sampling == "stratified":
        assert Counter(held.test["label"]) == {0: 4, 1: 4, 2: 4}
        more = load_task(TASK, folder, **{**SIZES, "train_size": 60}, evaluate_on="heldout")
        assert more.test.to_list() == held.test.to_list()


def test_fractions_are_of_the_split_and_1_is_one_row(folder):
    made = load_task(TASK, folder, train_size=0.05, test_size=1.0, seed=0)
    assert (len(made.train), len(made.test)) == (6, 60)
    assert len(load_task(TASK, folder, train_size=1, test_size=1, seed=0).train) == 1


def test_head_takes_the_first_rows_and_warns_once_of_absent_classes(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="bitstack_nb"):
        made = load_task(TASK, folder, train_size=50, test_size=0.1, seed=0, sampling="head")
    assert made.train["text"][0] == "train title 0"
    assert made.train["label"][:] == [0] * 40 + [1] * 10
    assert made.provenance["missing_classes"] == {"train": [2], "test": [1, 2]}
    (record,) = caplog.records
    assert "train lacks [2]; test lacks [1, 2]" in record.getMessage()


def test_where_a_class_is_absent_the_others_fill_up(folder):
    made = load_task(Task(**{**FIELDS, "num_labels": 6}), folder, **SIZES)
    assert Counter(made.train["label"]) == {0: 10, 1: 10, 2: 10}
    assert made.provenance["missing_classes"] == {"train": [3, 4, 5], "test": [3, 4, 5]}


def test_merged_classes_are_the_ones_that_share_equally(folder):
    made = load_task(Task(**{**FIELDS, "num_labels": 2, "relabel": (1, 0, 1)}), folder, **SIZES)
    assert Counter(made.train["label"]) == {0: 15, 1: 15}
    for row in made.train:
        number = int(row["text"].rpartition(" ")[2])
        assert row["label"] == (0 if 40 <= number < 80 else 1)


@pytest.mark.parametrize("sampling", ["stratified", "head"])
def test_rows_of_labels_left_out_are_never_chosen(folder, sampling):
    """A fraction counts the rows that are left: 40 of each kind to train on, 20 to test."""
    task = Task(**{**FIELDS, "num_labels": 2, "relabel": (1, None, 0)})
    how = {"seed": 0, "sampling": sampling, "train_size": 0.5}
    made = load_task(task, folder, **how, test_size=40)
    held = load_task(task, folder, **how, test_size=0.25, evaluate_on="heldout")
    for sample, size in ((made.train, 40), (made.test, 40), (held.test, 20)):
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
    made = load_task(TASK, str(tmp_path), train_size=60, test_size=12, seed=0)
    assert len(set(made.train["text"])) == 60
    assert len(made.provenance["sha256"]) == 3


def test_a_pair_keeps_its_two_texts_apart(folder):
    made = load_task(replace(TASK, pair=True), folder, **SIZES)
    joined = load_task(TASK, folder, **SIZES)
    assert made.train.column_names == ["text", "text_pair", "label"]
    for one, other in zip(made.train, joined.train, strict=True):
        assert f"{one['text']} {one['text_pair']}".strip() == other["text"]
    swapped = load_task(replace(TASK, pair=True, text=("body", "title")), folder, **SIZES)
    prints = {data.provenance["sample"]["train"] for data in (made, joined, swapped)}
    assert len(prints) == 3


def test_a_configuration_is_a_folder_and_a_copy_of_the_hub_has_its_test_split(folder):
    task = replace(TASK, config="de", test_split="validation")
    Path(folder, "toy").rename(Path(folder, "de"))
    assert load_task(task, folder, **SIZES).test["text"][0].startswith("test title")
    write_split(Path(folder, "de"), "validation-00000-of-00001", [0, 1, 2] * 4)
    made = load_task(task, folder, **SIZES)
    assert all(text.startswith("validation") for text in made.test["text"])
    assert set(made.provenance["sha256"]) == {
        "train.parquet",
        "validation-00000-of-00001.parquet",
    }


# Errors


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"train_size": 121}, "121 .*train.* holds 120"),
        ({"test_size": 61}, "61 .*test.* holds 60"),
        ({"train_size": 110, "evaluate_on": "heldout"}, "110 .* 12 .*120"),
        ({"train_size": 0}, "train_size is 0"),
        ({"train_size": 1.5}, r"train_size is 1\.5"),
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
        ({"label": "title"}, "labels in column 'title' are text, such as 'train title 0'.*0 to 2"),
        ({"num_labels": 2}, "label 2 .*0 to 1"),
        ({"num_labels": 2, "relabel": (0, 1)}, "label 2 .*0 to 1"),
        ({"dataset": "someone/else"}, "no folder 'else'.*toy"),
    ],
)
def test_a_task_that_does_not_fit_the_data_says_what_is_there(folder, change, named):
    with pytest.raises(DataError, match=named) as caught:
        load_task(Task(**{**FIELDS, **change}), folder, **SIZES)
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


def test_blank_texts_are_reported_and_only_a_sample_of_them_is_refused(folder, caplog):
    """A blank row among the millions of the Hub must not stop a run."""
    task = Task(**{**FIELDS, "text": ("body",)})
    load_task(task, folder, **SIZES)
    assert "hold no text" in caplog.text
    table = datasets.Dataset.from_dict({"body": [" "] * 120, "kind": [0, 1, 2] * 40})
    table.to_parquet(f"{folder}/toy/train.parquet")
    with pytest.raises(DataError, match="30 of 30 sampled rows hold no text"):
        load_task(task, folder, **SIZES)


# Embedded


@pytest.mark.parametrize("task", [*FIVE_TASKS, AG_NEWS_BINARY], ids=lambda task: task.name)
def test_every_known_task_has_embedded_rows_called_synthetic(task):
    random.seed(3)
    np.random.seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist()
    made = load_task(task, "embedded", train_size=280, test_size=0.2, seed=0)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert (len(made.train), len(made.test)) == (280, 100)
    assert set(made.train["label"]) == set(range(task.num_labels))
    assert made.provenance["synthetic"] is True
    assert made.provenance["generator"].startswith("bitstack_nb.embedded ")


def test_an_own_task_has_no_embedded_rows():
    with pytest.raises(DataError, match=r"someone/toy.*--data"):
        load_task(TASK, "embedded", **SIZES)
