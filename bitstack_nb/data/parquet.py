"""A folder of Parquet files: which of them are a split, and the task's columns of their rows.

Scope: files are named ``<split>.parquet``, or ``<split>-00000-of-00002.parquet`` and so on. Each is
read once, without a cache, so that a digest is of the bytes that the rows came from.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from bitstack_nb.data.columns import check_columns
from bitstack_nb.data.errors import DataError
from bitstack_nb.hub import first_line

_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)(-[0-9a-f]+)?")


@dataclass(frozen=True)
class Header:
    """What a file says of its columns.

    Attributes:
        file: its path, or its address on the Hub.
        classes: names of the classes by column, where the file says them.
    """

    file: Path | str
    classes: dict[str, list[str]]


@dataclass(frozen=True)
class Shard(Header):
    """The rows of one file.

    Attributes:
        sha256: of its bytes.
        table: the columns asked for; text as bytes, which need not be UTF-8.
    """

    sha256: str
    table: pa.Table


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split in a folder, at any depth, in order; there may be none.

    Raises:
        DataError: a shard is missing, or the files are more than one set.
    """
    files = [
        file
        for file in sorted(folder.rglob("*.parquet"))
        if file.name.startswith(split)
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if len({file.parent for file in files}) > 1:
        raise DataError(
            f"several folders under {folder} hold {split}*.parquet: keep the files of one "
            "configuration"
        )
    parts = [_SHARD.fullmatch(file.stem) for file in files]
    sets = {part.group(1, 3) if part else file for file, part in zip(files, parts, strict=True)}
    listed = ", ".join(file.name for file in files)
    if len(sets) > 1:
        raise DataError(f"{folder} holds the {split} split more than once ({listed}): keep one set")
    numbers = [int(part[2]) for part in parts if part]
    if numbers and numbers != list(range(int(parts[0][3]))):
        raise DataError(
            f"{folder} does not hold each part of the {split} split once ({listed}): it takes the "
            f"parts 0 to {int(parts[0][3]) - 1} of {int(parts[0][3])}"
        )
    return files


def read_shard(file: Path, columns: list[str]) -> Shard:
    """Read columns of a file. Raises DataError if it is damaged or lacks a column."""
    try:
        data = file.read_bytes()
        parquet = pq.ParquetFile(pa.BufferReader(data))
        schema = parquet.schema_arrow
        check_columns(str(file), columns, schema.names)
        table = parquet.read(columns=columns).select(columns)
        classes = class_names(table.schema)
    except DataError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"cannot read {file} ({first_line(error)}): replace it by a whole Parquet file"
        ) from error
    return Shard(file, classes, hashlib.sha256(data).hexdigest(), plain(table))


def joined(shards: list[Shard]) -> datasets.Dataset:
    """The rows of a split's files, in order. Raises DataError if columns differ in type."""
    for one, other in pairwise(shards):
        for name in one.table.column_names:
            check_classes(name, one, other)
    try:
        table = pa.concat_tables([s.table for s in shards], promote_options="permissive")
    except pa.ArrowException as error:
        kinds = "; ".join(
            f"{s.file.name}: {', '.join(f'{f.name} {f.type}' for f in s.table.schema)}"
            for s in shards
        )
        raise DataError(
            f"the columns of {shards[0].file.parent} differ in type ({kinds}): write them alike"
        ) from error
    # Of its own accord datasets would make a fingerprint by reading all rows.
    digest = hashlib.sha256("".join(shard.sha256 for shard in shards).encode())
    return datasets.Dataset(table, fingerprint=digest.hexdigest()[:16])


def class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """The names of the classes by column, where datasets has written them into the schema."""
    features = datasets.Features.from_arrow_schema(schema)
    names = {name: getattr(feature, "names", None) for name, feature in features.items()}
    return {name: known for name, known in names.items() if known}


def check_classes(column: str, one: Header, other: Header) -> None:
    """Raise DataError if two files number the classes of a column in another order."""
    first, second = one.classes.get(column), other.classes.get(column)
    if first and second and first != second:
        raise DataError(
            f"{one.file} numbers the classes of {column!r} as {first}, {other.file} as {second}: "
            "encode them in one order"
        )


def plain(table: pa.Table) -> pa.Table:
    """A table without dictionaries, and text as bytes: pyarrow reads text without a check."""
    return pa.table({name: _plain(table[name]) for name in table.column_names})


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)
    return column.cast(pa.large_binary()) if any(is_a(column.type) for is_a in kinds) else column
