"""A small task in a folder of Parquet files, for the tests of tasks and of the Hub."""

from __future__ import annotations

from pathlib import Path

import datasets

from bitstack_nb.data.tasks import Task

TASK = Task(name="toy", dataset="someone/toy", text=("title", "body"), label="kind", num_labels=3)
SIZES = {"train_size": 30, "test_size": 12, "seed": 0}


def write_split(folder: Path, name: str, kinds: list[int]) -> None:
    """A Parquet file with a row for each of these labels; every second one has no body."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        "title": [f"{name} title {number}" for number in range(len(kinds))],
        "body": [f"body {number}" if number % 2 else None for number in range(len(kinds))],
        "kind": kinds,
    }
    datasets.Dataset.from_dict(rows).to_parquet(folder / f"{name}.parquet")


def write_toy(root: Path) -> None:
    """TASK's folder, sorted by label as IMDB is: 40 rows of each class in train, 20 in test."""
    for split, each in (("train", 40), ("test", 20)):
        write_split(root / "toy", split, [0] * each + [1] * each + [2] * each)
