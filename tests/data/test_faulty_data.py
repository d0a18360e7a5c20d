"""Folders as people have them: other types of text and labels, half a split, files that changed."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bitstack_nb.data import DataError, Task, load_task

TASK = Task(name="pets", dataset="me/pets", text=("review",), label="kind", num_labels=2)


def write(folder: Path, name: str = "train", **columns) -> Path:
    """A file of four rows, with these columns instead of the usual ones."""
    file = folder / "pets" / f"{name}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = {"review": [f"cat {n}" for n in range(4)], "kind": [0, 1, 0, 1]}
    pq.write_table(pa.table(rows | columns), file)
    return file


def load(folder: Path, **how):
    """All rows of the training file, split into train and held-out ones if nothing else is said."""
    sizes = {"train_size": 2, "test_size": 2, "seed": 0, "evaluate_on": "heldout"}
    return load_task(TASK, str(folder), **(sizes | how))


def texts(made) -> set[str]:
    return {*made.train["text"], *made.test["text"]}


def refused(folder: Path, *parts: str, **how) -> None:
    with pytest.raises(DataError) as caught:
        load(folder, **how)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


# Files -------------------------------------------------------------------------------------------


def test_a_file_that_changed_within_its_time_of_change_is_read_anew(tmp_path):
    digests = []
    for word in ("cat", "dog"):
        file = write(tmp_path, review=[f"{word} {n}" for n in range(4)])
        os.utime(file, (1_600_000_000, 1_600_000_000))
        made = load(tmp_path)
        assert texts(made) == {f"{word} {n}" for n in range(4)}
        digests.append(made.provenance["sha256"]["train.parquet"])
    assert digests[0] != digests[1]


def test_no_cache_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("/proc/nowhere"))
    write(tmp_path)
    load(tmp_path)


def test_a_folder_named_like_a_pattern_is_that_folder(tmp_path):
    write(tmp_path / "v[12]*", review=["mine"] * 4)
    write(tmp_path / "v1", review=["theirs"] * 4)
    assert texts(load(tmp_path / "v[12]*")) == {"mine"}


def test_files_in_hidden_folders_are_left_out(tmp_path):
    hidden = write(tmp_path, "train-checkpoint").rename(tmp_path / "train-checkpoint.parquet")
    (tmp_path / "pets" / ".ipynb_checkpoints").mkdir()
    hidden.rename(tmp_path / "pets" / ".ipynb_checkpoints" / hidden.name)
    write(tmp_path)
    assert list(load(tmp_path).provenance["sha256"]) == ["train.parquet"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["-00001-of-00002"], "takes the parts 0 to 1 of 2"),
        (["-00000-of-00003", "-00002-of-00003"], "takes the parts 0 to 2 of 3"),
        (["", "-00000-of-00001"], "train split more than once"),
        (["", " (1)"], "train split more than once"),
        (["-00000-of-00001", "-00000-of-00002", "-00001-of-00002"], "train split more than once"),
    ],
)
def test_half_a_split_and_a_split_that_is_there_twice(tmp_path, names, said):
    for name in names:
        write(tmp_path, f"train{name}")
    refused(tmp_path, said, *(f"train{name}.parquet" for name in names))


def test_shards_may_differ_in_other_columns_and_in_what_fits(tmp_path):
    small = pa.array([0, 1, 0, 1], pa.int8())
    write(tmp_path, "train-00000-of-00002", note=pa.nulls(4), review=pa.nulls(4), kind=small)
    write(tmp_path, "train-00001-of-00002", note=[[1]] * 4, more=["x"] * 4)
    made = load(tmp_path, train_size=4, test_size=4)
    assert texts(made) == {"", *(f"cat {n}" for n in range(4))}


def test_shards_that_do_not_fit_are_named_with_their_types(tmp_path):
    write(tmp_path, "train-00000-of-00002")
    write(tmp_path, "train-00001-of-00002", kind=["a", "b"] * 2)
    refused(tmp_path, "differ in type", "train-00000-of-00002.parquet", "kind int64", "kind large")


@pytest.mark.parametrize(
    "names", [("train", "test"), ("train-00000-of-00002", "train-00001-of-00002")]
)
def test_classes_in_another_order(tmp_path, names):
    for name, classes in zip(names, (["cat", "dog"], ["dog", "cat"]), strict=True):
        features = datasets.Features(
            review=datasets.Value("string"), kind=datasets.ClassLabel(names=classes)
        )
        rows = {"review": ["cat", "dog"] * 2, "kind": ["cat", "dog"] * 2}
        data = datasets.Dataset.from_dict(rows, features=features)
        data.to_parquet(write(tmp_path, name))
    said = ("['cat', 'dog']", "['dog', 'cat']", *names)
    refused(tmp_path, *said, evaluate_on="test" if "test" in names else "heldout")


# Text --------------------------------------------------------------------------------------------


def test_text_may_be_bytes_or_a_category(tmp_path):
    for column in (
        pa.array([f"chat né {n}".encode() for n in range(4)], pa.binary()),
        pa.array([f"chat né {n}" for n in range(4)]).dictionary_encode(),
        pa.array([f"chat né {n}" for n in range(4)], pa.large_string()),
    ):
        write(tmp_path, review=column)
        assert texts(load(tmp_path)) == {f"chat né {n}" for n in range(4)}


@pytest.mark.parametrize("kind", [pa.string(), pa.binary()])
def test_text_that_is_not_utf8_is_named_with_file_column_and_row(tmp_path, kind):
    latin = [b"chat", b"chien", "chat né".encode("latin-1"), b"oiseau"]
    write(tmp_path, "train-00000-of-00002")
    write(tmp_path, "train-00001-of-00002", review=pa.array(latin, pa.binary()).view(kind))
    said = ("'review' is not UTF-8", "train-00001-of-00002.parquet, row 2")
    refused(tmp_path, *said, train_size=4, test_size=4)


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ([["good", "cat"]] * 4, "list"),
        ([{"title": "a"}] * 4, "dict"),
        ([float("nan"), 1.5] * 2, "float"),
        ([0, 1, 2, 3], "int"),
    ],
)
def test_text_of_another_type_is_refused(tmp_path, column, kind):
    write(tmp_path, review=column)
    refused(tmp_path, f"column 'review' holds {kind}, not text", "train.parquet, row ")


# Labels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels", [[0.0, 1.0] * 2, [False, True] * 2, ["0", "1"] * 2, [b"0", b"1"] * 2]
)
def test_labels_that_plainly_stand_for_integers(tmp_path, labels):
    write(tmp_path, kind=labels)
    made = load(tmp_path)
    assert {*made.train["label"]} == {0, 1}
    assert all(int(row["text"][-1]) % 2 == row["label"] for row in made.train)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["cat", "dog"] * 2, "are text, such as 'cat': make them 0 to 1"),
        ([0.5, 1.0] * 2, "label 0.5 in column 'kind'"),
        ([2, 1] * 2, "label 2 in column 'kind'"),
        ([None, 1] * 2, "rows without a label (None): remove them"),
    ],
)
def test_other_labels_are_named_in_one_line(tmp_path, labels, said):
    write(tmp_path, kind=labels)
    refused(tmp_path, said)


def test_secret_test_labels_and_no_test_split_lead_to_held_out_rows(tmp_path):
    write(tmp_path)
    refused(tmp_path, "put test.parquet there, or evaluate on held-out", evaluate_on="test")
    write(tmp_path, "test", kind=[-1] * 4)
    refused(tmp_path, "of the test split", "(-1): evaluate on held-out", evaluate_on="test")
    load(tmp_path)
