"""One run's Result, as JSON that can be read by eye."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar
from zipfile import BadZipFile

from bitstack_nb.files import replacing
from bitstack_nb.results.metrics import accuracy_matrix
from bitstack_nb.results.packed import ARRAYS, RUNS, unpack
from bitstack_nb.results.plain_json import plain, render

FORMAT = 1
_UTF8 = "utf-8-sig"  # with or without the byte order mark of some editors
_LISTS = ("matrix", "predictions", "locks", "lock_stats")  # the other fields are dicts


class ResultError(ValueError):
    """A result, or a file that should hold one, is not what it has to be."""


@dataclass(kw_only=True)
class Result:
    """The record of one run, kept as plain JSON values; NaN and infinities become None.

    Attributes:
        protocol: the run's settings: ``strategy``, ``tasks`` (dicts with ``name``, in training
            order), ``seed``, ...
        matrix: accuracies in percent, see ``metrics``. It is None only where
            ``provenance["published"]`` names the source of numbers that were not measured here.
        metrics: name -> value or None.
        predictions: per task, in training order, its name as ``task`` and labels as text:
            ``labels``, those of the test texts; ``learnt`` and ``final``, the predicted ones just
            after the task was trained (None: not measured) and after the last task. Runs that were
            recorded without them have none.
        locks: the records of the last ``layer_table()``.
        lock_stats: ``stats()`` after each task.
        importance: what other sparsities would have locked, the record of a ``LockCurves``.
        times: seconds, by stage; ``step`` is the mean of a task's training steps.
        peak_memory: MiB.
        provenance: machine, versions, commit, command and data.
        storage: ``bytes`` to keep beside one backbone and the heads, to predict every task and to
            go on to another; ``best_bytes``, those of its smallest usual form (values in bf16).
        drift: by group of weights, task 1's accuracy at the end with that group as task 1 left it
            (``drift.attribute``).

    Raises:
        ResultError: a field has the wrong form.
        TypeError: JSON cannot hold a value.
    """

    protocol: dict[str, Any]
    matrix: list[list[float | None]] | None
    metrics: dict[str, float | None]
    predictions: list[dict[str, str | None]] = field(default_factory=list)
    locks: list[dict[str, Any]] = field(default_factory=list)
    lock_stats: list[dict[str, Any]] = field(default_factory=list)
    importance: dict[str, Any] = field(default_factory=dict)
    times: dict[str, Any] = field(default_factory=dict)
    peak_memory: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    storage: dict[str, Any] = field(default_factory=dict)
    drift: dict[str, Any] = field(default_factory=dict)
    path: ClassVar[str] = ""  # of an instance: the file that it was read from, for messages

    def __post_init__(self) -> None:
        for item in fields(self):
            value = plain(getattr(self, item.name), item.name)
            setattr(self, item.name, value)
            kind = list if item.name in _LISTS else dict
            if not isinstance(value, kind) and not (item.name == "matrix" and value is None):
                raise ResultError(f"{item.name} must be a {kind.__name__}, got {value!r}")
        self._check_protocol()
        self._check_numbers()
        self._check_matrix()
        self._check_predictions()

    def _check_protocol(self) -> None:
        if not isinstance(self.protocol.get("strategy"), str):
            raise ResultError(f"protocol needs a strategy, it has {sorted(self.protocol)}")
        if not isinstance(self.protocol.get("seed"), int | None):
            raise ResultError(f"protocol.seed must be a number, got {self.protocol['seed']!r}")
        tasks = self.protocol.get("tasks", [])
        if not isinstance(tasks, list):
            raise ResultError(f"protocol.tasks must be a list, got {tasks!r}")
        for task in tasks:
            if not isinstance(task, dict) or not isinstance(task.get("name"), str):
                raise ResultError(f"protocol.tasks must be dicts with a name, got {task!r}")

    def _check_numbers(self) -> None:
        """Check the numbers that tables and figures calculate with."""
        records = {"metrics": self.metrics, "storage": self.storage}
        records |= {f"lock_stats[{at}]": own for at, own in enumerate(self.lock_stats)}
        records |= {f"drift.{group}": own for group, own in self.drift.items()}
        for where, record in records.items():
            if not isinstance(record, dict):
                raise ResultError(f"{where} must be a dict, got {record!r}")
            for name, value in record.items():
                _check_number(value, f"{where}.{name}")
        for at, record in enumerate(self.locks):
            if not isinstance(record, dict):
                raise ResultError(f"locks[{at}] must be a dict, got {record!r}")

    def _check_matrix(self) -> None:
        if self.matrix is None:
            if not self.provenance.get("published"):
                raise ResultError(
                    "matrix is null: give the measured accuracies, or name the source of "
                    'published numbers in provenance["published"]'
                )
            return
        try:
            size = len(accuracy_matrix(self.matrix))
        except ValueError as error:
            raise ResultError(str(error)) from error
        for value in (value for row in self.matrix for value in row):
            _check_number(value, "the accuracy matrix")
        tasks = self.protocol.get("tasks")
        if tasks is not None and len(tasks) != size:
            raise ResultError(f"the matrix has {size} rows, but protocol names {len(tasks)} tasks")

    def _check_predictions(self) -> None:
        kinds = {"task": str, "labels": str, "learnt": str | None, "final": str}
        for own in self.predictions:
            if not isinstance(own, dict) or own.keys() != kinds.keys():
                raise ResultError(f"predictions must be dicts of {[*kinds]}, got {own!r:.80}")
            for name, kind in kinds.items():
                if not isinstance(own[name], kind):
                    raise ResultError(f"predictions.{name} must be text, got {own[name]!r:.80}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON that can be read by eye; ``path`` is whole, or as it was before.

        Raises OSError, naming the file, where it cannot be written.
        """
        text = render({"format": FORMAT} | {f.name: getattr(self, f.name) for f in fields(self)})
        try:
            with replacing(path) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(
                error.errno,
                f"cannot write the result ({reason}): make room or choose another place",
                str(path),
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Result:
        """Read the JSON of one run. Raises ResultError naming the file and what is wrong in it."""
        try:
            data = json.loads(Path(path).expanduser().read_text(encoding=_UTF8))
        except OSError as error:
            raise ResultError(f"cannot read the result {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:  # bad JSON or UTF-8, nested without end
            raise ResultError(
                f"{path} is truncated or not JSON ({error}): delete it and run again"
            ) from error
        return _result(data, str(path))


def load_results(*paths: str | os.PathLike[str]) -> list[Result]:
    """Load results from files and folders, sorted by path.

    A file is one run's JSON, or a ``runs.jsonl`` (see ``packed``). Of a folder, every such file at
    any depth is loaded, once. Hidden files are left out, and ``*.state`` folders, which hold
    unfinished runs. Raises ResultError for a path that is not there, for a folder without results
    and for every file that holds no result.
    """
    found: dict[Path, None] = {}
    for path in (Path(path).expanduser() for path in paths):
        files = _files(path) if path.is_dir() else [path]
        if not files:
            raise ResultError(
                f"no result (*.json or {RUNS}) in {path}: run something with that output first"
            )
        found.update(dict.fromkeys(file.resolve() for file in files))
    loaded = [_packed(file) if file.name == RUNS else [Result.load(file)] for file in found]
    return [result for results in loaded for result in results]


def _files(folder: Path) -> list[Path]:
    files = sorted([*folder.rglob("*.json"), *folder.rglob(RUNS)])
    return [file for file in files if not _left_out(file.relative_to(folder))]


def _left_out(file: Path) -> bool:
    """Whether it belongs to an unfinished run, or is hidden (of Jupyter, or of macOS: ``._x``)."""
    unfinished = any(folder.suffix == ".state" for folder in file.parents)
    return unfinished or any(part.startswith(".") for part in file.parts)


def _packed(file: Path) -> list[Result]:
    try:
        records = unpack(file)
    except (OSError, ValueError, LookupError, AttributeError, TypeError, BadZipFile) as error:
        raise ResultError(
            f"{file} and the {ARRAYS} beside it cannot be read ({error!r}): restore both files"
        ) from error
    return [_result(record, f"{file}, line {at}") for at, record in enumerate(records, 1)]


def _result(data: Any, where: str) -> Result:
    try:
        result = Result(**_checked(data))
        result.path = where
        return result
    except ResultError as error:
        raise ResultError(f"{where}: {error}") from error


def _checked(data: Any) -> dict[str, Any]:
    """The fields of a file's JSON, once its format and keys are known to be right."""
    version = data.get("format") if isinstance(data, dict) else None
    if not isinstance(version, int):
        raise ResultError("not a result of bitstack_nb: it has no format number")
    if version != FORMAT:
        raise ResultError(
            f"format {version}, this version reads {FORMAT}: use the bitstack_nb that wrote it "
            "or a newer one"
        )
    missing = {"protocol", "matrix", "metrics"} - set(data)
    unknown = set(data) - {item.name for item in fields(Result)} - {"format"}
    if missing or unknown:
        raise ResultError(
            f"not a whole result: missing {sorted(missing)}, not known here {sorted(unknown)}"
        )
    return {name: value for name, value in data.items() if name != "format"}


def _check_number(value: Any, where: str) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ResultError(f"{where} must be a number or null, got {value!r}")
