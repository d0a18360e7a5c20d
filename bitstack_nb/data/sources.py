"""Where the rows of a task come from: the Hub, a folder of Parquet files, or the embedded grammar.

Scope: opening one split as a table or as a stream, and saying which bytes it was. What is drawn
from a split, and what its columns mean, is decided in `tasks.py`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import datasets
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from bitstack_nb.data import hub
from bitstack_nb.data.embedded import EMBEDDED_VERSION, embedded_split
from bitstack_nb.data.errors import DataError
from bitstack_nb.files import sha256

logger = logging.getLogger(__name__)


class Source(Protocol):
    """One dataset, split by split ("train", "test")."""

    def table(self, split: str) -> datasets.Dataset:
        """The whole split, with random access."""

    def stream(self, split: str) -> Iterator[dict[str, Any]] | None:
        """The split row by row without fetching all of it; None where that saves nothing."""

    def provenance(self) -> dict:
        """JSON-able: the source, the dataset, and what pins down the splits opened so far."""


def open_source(data: str, dataset: str, *, config: str | None, embedded: str | None) -> Source:
    """The source named by `data`: "hub", "embedded", or the path of a folder.

    Args:
        data: "hub", "embedded" or a folder that holds one folder per dataset.
        dataset: Hub id; its last part is the name of the dataset's folder.
        config: the Hub's configuration name, if the dataset has several.
        embedded: the synthetic task with this dataset's columns, if there is one.

    Raises:
        DataError: the dataset is not there.
    """
    if data == "hub":
        return _Hub(dataset, config)
    if data != "embedded":
        return _Folder(Path(data).expanduser(), dataset)
    if embedded is None:
        raise DataError(
            f"no embedded data for {dataset!r}, only for the five tasks: use --data hub or --data "
            "FOLDER"
        )
    return _Embedded(dataset, embedded)


class _Embedded:
    """The synthetic tasks."""

    def __init__(self, dataset: str, task: str) -> None:
        self._dataset, self._task = dataset, task

    def table(self, split: str) -> datasets.Dataset:
        return embedded_split(self._task, split)

    def stream(self, split: str) -> None:
        return None

    def provenance(self) -> dict:
        generator = f"bitstack_nb.embedded {EMBEDDED_VERSION}"
        return {
            "source": "embedded",
            "dataset": self._dataset,
            "synthetic": True,
            "generator": generator,
        }


class _Folder:
    """FOLDER/<last part of the dataset's id>/**/train*.parquet and test*.parquet."""

    def __init__(self, root: Path, dataset: str) -> None:
        self._dataset, self._folder = dataset, root / dataset.rpartition("/")[2]
        self._sha256: dict[str, str] = {}
        if not root.is_dir():
            raise DataError(f"no folder {str(root)!r}: give --data hub, embedded or a folder")
        if not self._folder.is_dir():
            there = ", ".join(sorted(item.name for item in root.iterdir() if item.is_dir()))
            raise DataError(
                f"no folder {self._folder.name!r} for {dataset} in {root} (it holds: "
                f"{there or 'no folders'}): put train.parquet and test.parquet there"
            )

    def table(self, split: str) -> datasets.Dataset:
        files = sorted(self._folder.rglob(f"{split}*.parquet"))
        if not files:
            raise DataError(f"no {split}*.parquet in {self._folder}: put {split}.parquet there")
        if len({file.parent for file in files}) > 1:
            raise DataError(
                f"{split}*.parquet lies in several folders under {self._folder}: keep one "
                "configuration there"
            )
        try:
            for file in files:
                self._sha256[file.name] = sha256(file)
            return datasets.load_dataset(
                "parquet", data_files={split: [str(file) for file in files]}, split=split
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"cannot read {files[0]} ({hub.first_line(error)}): is it a whole Parquet file?"
            ) from error

    def stream(self, split: str) -> None:
        return None

    def provenance(self) -> dict:
        return {"source": "folder", "dataset": self._dataset, "sha256": dict(self._sha256)}


class _Hub:
    """A dataset of the Hugging Face Hub, at the commit its main branch has now.

    Where the Hub cannot be reached, the one that `datasets` cached when it was last fetched whole.
    """

    def __init__(self, dataset: str, config: str | None) -> None:
        self._dataset, self._config = dataset, config
        with hub_errors(dataset):
            try:
                self._builder, self._revision = hub.ask(self._find, dataset)
            except (RepositoryNotFoundError, HFValidationError):
                raise
            except Exception as error:
                self._builder, self._revision = self._find_cached(error)

    def _find(self) -> tuple[datasets.DatasetBuilder, str]:
        # Asked first: it answers at once without a network, where the rest retries for 20 s.
        revision = HfApi().dataset_info(self._dataset, timeout=hub.TIMEOUT).sha
        builder = datasets.load_dataset_builder(self._dataset, self._config, revision=revision)
        if isinstance(builder, Cache):
            # On any error it takes, of its own accord, what was cached last.
            raise hub.HubBusy("a request failed while looking for its files")
        return builder, revision

    def _find_cached(self, failure: Exception) -> tuple[Cache, str]:
        names = {"repo_id": self._dataset, "dataset_name": self._dataset.rpartition("/")[2]}
        try:
            builder = Cache(**names, config_name=self._config, version="auto", hash="auto")
        except Exception:  # none there, several configurations, or an unfinished one
            raise failure from None
        said = hub.first_line(failure)
        logger.warning("%s: read from the local cache, the Hub failed (%s)", self._dataset, said)
        return builder, builder.hash  # its folder in the cache is named by the commit

    def table(self, split: str) -> datasets.Dataset:
        with hub_errors(self._dataset):
            hub.ask(self._builder.download_and_prepare, self._dataset)
            return self._builder.as_dataset(split)

    def stream(self, split: str) -> Iterator[dict[str, Any]]:
        if isinstance(self._builder, Cache):
            return iter(self.table(split))

        def open_at(row: int) -> Iterator[dict[str, Any]]:
            return itertools.islice(self._builder.as_streaming_dataset(split), row, None)

        return hub.rows(open_at, self._dataset)

    def provenance(self) -> dict:
        return {
            "source": "hub",
            "dataset": self._dataset,
            "config": self._config,
            "revision": self._revision,
        }


@contextmanager
def hub_errors(dataset: str) -> Iterator[None]:
    """Turn what the Hub's clients raise, on opening or at any row of a stream, into a DataError."""
    try:
        yield
    except DataError:
        raise
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DataError(
            f"no dataset {dataset!r} on the Hub, or no access to it: give its full id, owner/name"
        ) from error
    except Exception as error:
        # Broad on purpose: requests, httpx, fsspec and datasets each have errors of their own, and
        # which of them arrives changes between versions.
        raise DataError(
            f"cannot read {dataset} from the Hub ({hub.first_line(error)}): use --data embedded, "
            f"or --data FOLDER with FOLDER/{dataset.rpartition('/')[2]}/train.parquet and "
            "test.parquet"
        ) from error
