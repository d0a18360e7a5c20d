"""The rows of a dataset: from the Hub, from a folder of Parquet files, or synthetic.

Scope: one split as a table or as a stream, and a record of which rows they are. `sampling.py`
chooses among the rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub import HfApi, HfFileSystem

from bitstack_nb.data.columns import HELD_OUT, OTHER_SPLIT
from bitstack_nb.data.embedded import EMBEDDED_VERSION, embedded_split
from bitstack_nb.data.errors import DataError
from bitstack_nb.data.parquet import (
    Header,
    Shard,
    check_classes,
    class_names,
    joined,
    plain,
    read_shard,
    split_files,
)
from bitstack_nb.data.tasks import FIVE_TASKS, Task
from bitstack_nb.hub import TIMEOUT, first_line, hub_errors

logger = logging.getLogger(__name__)
_BATCH = 1000  # rows of a stream that are decoded at once


class Source:
    """One dataset with the splits "train" and "test"."""

    def table(self, split: str) -> datasets.Dataset:
        """The whole split, with random access."""
        raise NotImplementedError

    def stream(self, split: str) -> Iterator[dict[str, Any]] | None:
        """The rows of a split one by one; None if the table is as cheap."""
        return None

    def place(self, split: str, number: int) -> str:
        """The place of a row, for messages."""
        return f"row {number} of {split}"

    def provenance(self) -> dict[str, Any]:
        """JSON-able: the source, the dataset, and the version of the splits read so far."""
        raise NotImplementedError


def open_source(data: str, task: Task) -> Source:
    """The dataset of a task.

    Args:
        data: "hub", "embedded", or a folder that holds one folder per dataset.
        task: names the dataset.

    Raises:
        DataError: the dataset is not there.
    """
    if data == "hub":
        return _Hub(task)
    if data == "embedded":
        return _Embedded(task.dataset)
    return _Folder(Path(data).expanduser(), task)


class _Embedded(Source):
    """The synthetic rows of one of the five datasets."""

    def __init__(self, dataset: str) -> None:
        self._dataset = dataset
        self._task = next((task.name for task in FIVE_TASKS if task.dataset == dataset), None)
        if self._task is None:
            raise DataError(
                f"no embedded data for {dataset!r}, only for the five tasks: use --data "
                "hub or --data FOLDER"
            )

    def table(self, split: str) -> datasets.Dataset:
        return embedded_split(self._task, split)

    def provenance(self) -> dict[str, Any]:
        return {
            "source": "embedded",
            "dataset": self._dataset,
            "synthetic": True,
            "generator": f"bitstack_nb.embedded {EMBEDDED_VERSION}",
        }


class _Folder(Source):
    """FOLDER/<the task's folder>/**/train*.parquet and test*.parquet.

    A copy of the Hub's files has the task's `test_split` in place of test*.parquet. Labels are
    checked between the splits that are read.
    """

    def __init__(self, root: Path, task: Task) -> None:
        self._dataset = dataset = task.dataset
        self._folder, self._test_split = root / task.folder, task.test_split
        self._label, self._columns = task.label, list(dict.fromkeys((*task.text, task.label)))
        self._shards: dict[str, list[Shard]] = {}
        self._tables: dict[str, datasets.Dataset] = {}
        if not root.is_dir():
            raise DataError(f"no folder {str(root)!r}: give --data hub, embedded or a folder")
        if not self._folder.is_dir():
            there = ", ".join(sorted(item.name for item in root.iterdir() if item.is_dir()))
            raise DataError(
                f"no folder {self._folder.name!r} for {dataset} in {root} (it holds: "
                f"{there or 'no folders'}): put train.parquet and test.parquet there"
            )

    def table(self, split: str) -> datasets.Dataset:
        if split not in self._tables:
            self._shards[split] = shards = self._read(split)
            for other in self._shards.values():
                check_classes(self._label, other[0], shards[0])
            self._tables[split] = joined(shards)
        return self._tables[split]

    def _read(self, split: str) -> list[Shard]:
        files = []
        if split == "test" and self._test_split:
            files = split_files(self._folder, self._test_split)
        files = files or split_files(self._folder, split)
        if not files:
            raise DataError(
                f"no {split}*.parquet in {self._folder}: put {split}.parquet there{_or_held(split)}"
            )
        return [read_shard(file, self._columns) for file in files]

    def place(self, split: str, number: int) -> str:
        for shard in self._shards[split]:
            if number < len(shard.table):
                break
            number -= len(shard.table)
        return f"{shard.file}, row {number}"

    def provenance(self) -> dict[str, Any]:
        read = [shard for shards in self._shards.values() for shard in shards]
        sha256 = {shard.file.name: shard.sha256 for shard in read}
        return {"source": "folder", "dataset": self._dataset, "sha256": sha256}


class _Hub(Source):
    """A dataset of the Hugging Face Hub, at the newest commit.

    Without a network it is the copy in the cache of `datasets`, if the whole split was loaded once.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._headers: list[Header] = []  # of the Parquet files read so far
        self._dataset, self._config = dataset, config = task.dataset, task.config
        with self._errors():
            try:
                # Asked first: without a network, load_dataset_builder retries for 20 s.
                revision = HfApi().dataset_info(dataset, timeout=TIMEOUT).sha
                self._builder = datasets.load_dataset_builder(dataset, config, revision=revision)
            except Exception as error:
                self._builder = _find_cached(dataset, config)
                if self._builder is None:
                    raise
                said = first_line(error)
                logger.warning("%s: read from the cache, the Hub failed (%s)", dataset, said)

    def table(self, split: str) -> datasets.Dataset:
        name = self._name(split)
        with self._errors():
            self._check_classes(name)
            self._builder.download_and_prepare()
            table = self._builder.as_dataset(name)
            return datasets.Dataset(plain(table.data.table), fingerprint=table._fingerprint)

    def stream(self, split: str) -> Iterator[dict[str, Any]]:
        if isinstance(self._builder, Cache):  # which cannot stream
            yield from self.table(split)
            return
        name = self._name(split)
        with self._errors():
            self._check_classes(name)
            # As arrow tables, because datasets would decode the text of a table without a place.
            stream = self._builder.as_streaming_dataset(name).with_format("arrow")
            for table in stream.iter(_BATCH):
                yield from plain(table).to_pylist()

    def place(self, split: str, number: int) -> str:
        return f"row {number} of {self._name(split)}"

    def provenance(self) -> dict[str, Any]:
        return {
            "source": "hub",
            "dataset": self._dataset,
            "config": self._config,
            "revision": self._builder.hash,  # the commit, also of a cached copy
        }

    def _name(self, split: str) -> str:
        """The Hub's name of a split. Raises DataError if there is none."""
        name = split if split == "train" else self._task.test_split or split
        there = self._builder.info.splits or self._builder.config.data_files or [name]
        if name not in there:
            other = f": {OTHER_SPLIT}{_or_held(split)}" if split == "test" else ""
            raise DataError(
                f"{self._dataset} has no {name} split, only {', '.join(map(str, there))}{other}"
            )
        return name

    def _check_classes(self, name: str) -> None:
        """Compare how the files of a split, and those read before, number the task's classes."""
        if isinstance(self._builder, Cache):  # compared when the Hub sent them
            return
        for file in (self._builder.config.data_files or {}).get(name, []):
            if file.startswith("hf://") and file.endswith(".parquet"):
                with HfFileSystem().open(file) as opened:
                    header = Header(file, class_names(pq.read_schema(opened)))
                self._headers.append(header)
                check_classes(self._task.label, self._headers[0], header)

    def _errors(self) -> Any:
        file = f"FOLDER/{self._task.folder}/train.parquet"
        instead = f"use --data embedded, or --data FOLDER with {file}"
        return hub_errors("dataset", self._dataset, raises=DataError, instead=instead)


def _or_held(split: str) -> str:
    """The way out where there is no test split."""
    return f", or {HELD_OUT}" if split == "test" else ""


def _find_cached(dataset: str, config: str | None) -> Cache | None:
    """The copy of a Hub dataset that was loaded last, if there is one."""
    name = dataset.rpartition("/")[2]
    try:
        return Cache(
            repo_id=dataset, dataset_name=name, config_name=config, version="auto", hash="auto"
        )
    except Exception:  # no copy, an unfinished one, or several configurations
        return None
