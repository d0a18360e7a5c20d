"""One run's Result as readable JSON, and tables of many with intervals over seeds."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bitstack_nb.files import replacing
from bitstack_nb.metrics import accuracy_matrix, mean_interval
from bitstack_nb.plain_json import canonical, plain, render

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1

# Table column -> heading. All in percent or points; the half width stands in "<column>_interval".
COLUMNS = {
    "average_accuracy": "average accuracy",
    "learning_accuracy": "learning accuracy",
    "forgetting": "forgetting",
    "forgetting_chaudhry": "forgetting (Chaudhry)",
    "first_task_after_last": "task 1 after the last",
    "locked_of_eligible": "locked % of eligible",
    "locked_of_all": "locked % of all",
}


class ResultError(ValueError):
    """A result, or a file that should hold one, is not what it has to be."""


@dataclass(kw_only=True)
class Result:
    """What one run gives. Everything is kept as plain JSON values; NaN and inf become None.

    protocol: what was run; ``strategy``, ``tasks`` (dicts with ``name``, in order), ``seed``, ...
    matrix: accuracies in percent, see ``metrics``; None only where ``provenance["published"]``
    names the source of numbers that were not measured here. metrics: name -> value or None.
    locks: the records of the last ``BitStack.layer_table()``. lock_stats: ``BitStack.stats()``
    after each task. importance: what other sparsities would have locked, the record of a
    ``LockCurves``. times: seconds. peak_memory: MiB. Raises ResultError, and TypeError for values
    that JSON cannot hold.
    """

    protocol: dict[str, Any]
    matrix: list[list[float | None]] | None
    metrics: dict[str, float | None]
    locks: list[dict[str, Any]] = field(default_factory=list)
    lock_stats: list[dict[str, Any]] = field(default_factory=list)
    importance: dict[str, Any] = field(default_factory=dict)
    times: dict[str, Any] = field(default_factory=dict)
    peak_memory: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for item in fields(self):
            value = plain(getattr(self, item.name), item.name)
            setattr(self, item.name, value)
            kind = list if item.name in ("matrix", "locks", "lock_stats") else dict
            if not isinstance(value, kind) and not (item.name == "matrix" and value is None):
                raise ResultError(f"{item.name} must be a {kind.__name__}, got {value!r}")
        if "strategy" not in self.protocol:
            raise ResultError(f"protocol needs a strategy, it has {sorted(self.protocol)}")
        for task in self.protocol.get("tasks") or []:
            if not isinstance(task, dict) or "name" not in task:
                raise ResultError(f"protocol.tasks must be dicts with a name, got {task!r}")
        for name, value in self.metrics.items():
            if value is not None and not isinstance(value, int | float):
                raise ResultError(f"metrics.{name} must be a number or null, got {value!r}")
        self._check_matrix()

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
        tasks = self.protocol.get("tasks")
        if tasks is not None and len(tasks) != size:
            raise ResultError(f"the matrix has {size} rows, but protocol names {len(tasks)} tasks")

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
        """Read what ``save`` wrote. Raises ResultError naming the file and what is wrong in it."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ResultError(f"cannot read the result {path}: {error.strerror}") from error
        except ValueError as error:  # bad JSON or bad UTF-8
            raise ResultError(
                f"{path} is truncated or not JSON ({error}): delete it and run again"
            ) from error
        try:
            return cls(**_checked(data))
        except ResultError as error:
            raise ResultError(f"{path}: {error}") from error


def load_results(*paths: str | os.PathLike[str]) -> list[Result]:
    """Load result files, and every ``*.json`` at any depth of folders, sorted by path.

    A file that is reached twice is loaded once; the ``*.state`` folders of runs that have not
    finished are left out. Raises ResultError for a path that is not there, for a folder without
    results and for every file that holds no result.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        files = _json_files(path) if path.is_dir() else [path]
        if not files:
            raise ResultError(f"no result (*.json) in {path}: run something with that output first")
        found.update(dict.fromkeys(file.resolve() for file in files))
    return [Result.load(file) for file in found]


def _json_files(folder: Path) -> list[Path]:
    files = sorted(folder.rglob("*.json"))
    suffixes = [{parent.suffix for parent in f.relative_to(folder).parents} for f in files]
    return [f for f, above in zip(files, suffixes, strict=True) if ".state" not in above]


class Configuration(NamedTuple):
    """What some runs share, under the names and values a table shows, and the runs themselves."""

    shown: dict[str, Any]
    results: list[Result]


def configurations(results: Iterable[Result]) -> list[Configuration]:
    """Results by configuration: the protocol without the seed and the order of the tasks.

    ``shown`` has strategy, sparsity, budget; every other protocol entry that differs between the
    configurations; ``published`` (the source) where there are such results, which never mix with
    measured ones; ``data`` where it is synthetic. Sorted by what is shown, the runs of each by seed
    and order of the tasks. Raises ResultError without results, and where a seed and order occur in
    a configuration with two different results, as counting both would feign a narrower interval.
    """
    groups: dict[str, list[Result]] = {}
    for result in results:
        group = groups.setdefault(canonical(_configuration(result)), [])
        if result not in group:  # one run that was given twice
            group.append(result)
    if not groups:
        raise ResultError("there are no results: give at least one")
    entries = [json.loads(key) for key in groups]
    names = _shown_columns(entries)
    found = []
    for configuration, members in zip(entries, groups.values(), strict=True):
        _check_distinct(members)
        shown = {name: _shown(name, configuration.get(name)) for name in names}
        found.append(Configuration(shown, sorted(members, key=lambda m: _sort_keys(_draw(m)))))
    return sorted(found, key=lambda item: _sort_keys(item.shown.values()))


def table(results: Iterable[Result]) -> pd.DataFrame:
    """One row per configuration: means and intervals over its seeds.

    Columns: what ``configurations`` shows; ``seeds`` (how many); then each of COLUMNS and, as
    ``<column>_interval``, the half width of its 95 % Student interval, NaN for one seed. A mean is
    NaN where a seed lacks it. Raises ResultError as ``configurations`` does.
    """
    import pandas as pd

    return pd.DataFrame(
        item.shown | {"seeds": len(item.results)} | _averages(item.results)
        for item in configurations(results)
    )


def format_table(frame: pd.DataFrame) -> str:
    """Markdown of ``table``'s frame, aligned to be read as plain text too: mean ± half width."""
    kept = [name for name in frame.columns if not name.endswith("_interval")]
    lines = [[COLUMNS.get(name, name.replace("_", " ")) for name in kept]]
    for row in frame.to_dict("records"):
        lines.append(
            [_cell(row[name], row.get(f"{name}_interval"), name in COLUMNS) for name in kept]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def _configuration(result: Result) -> dict[str, Any]:
    """The protocol less what belongs to the seed, and whether the numbers are published ones."""
    entries = {k: v for k, v in result.protocol.items() if k != "seed" and v is not None}
    if "tasks" in entries:
        entries["tasks"] = sorted(entries["tasks"], key=lambda task: task["name"])
    published = result.provenance.get("published")
    return entries | ({"published": published} if published else {})


def _shown_columns(configurations: list[dict[str, Any]]) -> list[str]:
    """Strategy, sparsity, budget, then what differs or must be said, by name."""
    always = ["strategy", "sparsity", "budget"]
    names = set().union(*configurations) - set(always)
    return always + sorted(name for name in names if _is_shown(name, configurations))


def _is_shown(name: str, configurations: list[dict[str, Any]]) -> bool:
    """Whether an entry differs; a setting that only other strategies have is no difference."""
    values: dict[str, set[str]] = {}
    for entries in configurations:
        kind = canonical([entries["strategy"], entries.get("published")])
        values.setdefault(kind, set()).add(canonical(entries.get(name)))
    present = set().union(*values.values()) - {"null"}
    differs = len(present) > 1 or any(len(own) > 1 for own in values.values())
    return differs or name == "published" or (name == "data" and '"embedded"' in present)


def _check_distinct(members: list[Result]) -> None:
    """The order of the tasks belongs to the seed; the pair has to be there once."""
    seen = set()
    for member in members:
        draw = _draw(member)
        if draw in seen:
            raise ResultError(
                f"seed {draw[0]} of strategy {member.protocol['strategy']!r} has two different "
                f"results with the tasks {draw[1]}: leave one of them out"
            )
        seen.add(draw)


def _draw(result: Result) -> tuple[Any, str]:
    names = [task["name"] for task in result.protocol.get("tasks") or []]
    return result.protocol.get("seed"), canonical(names)


def _averages(members: list[Result]) -> dict[str, float]:
    row = {}
    for name in COLUMNS:
        values = [column_value(member, name) for member in members]
        mean, half = (math.nan, None) if None in values else mean_interval(values)
        row |= {name: mean, f"{name}_interval": math.nan if half is None else half}
    return row


def column_value(result: Result, name: str) -> float | None:
    """One run's number for a column of COLUMNS; None where it has none."""
    locked = {"locked_of_eligible": "frozen_pct", "locked_of_all": "locked_pct"}
    if name in locked:
        return result.lock_stats[-1].get(locked[name]) if result.lock_stats else None
    return result.metrics.get(name)


def _shown(name: str, value: Any) -> Any:
    """A protocol entry as a table shows it."""
    if name == "tasks" and value:
        return ", ".join(task["name"] for task in value)
    if name == "data" and value == "embedded":
        return "embedded (synthetic)"
    return canonical(value) if isinstance(value, list | dict) else value


def _sort_keys(values: Iterable[Any]) -> list[tuple[int, float, str]]:
    """Order what is absent before numbers before text."""
    numbers = int | float
    return [
        (0, 0.0, "") if v is None else (1, v, "") if isinstance(v, numbers) else (2, 0.0, str(v))
        for v in values
    ]


def _cell(value: Any, half: float | None, is_metric: bool) -> str:
    if value is None or value != value:  # NaN
        return "–"
    if is_metric:
        return f"{value:.1f}" if half != half else f"{value:.1f} ± {half:.1f}"
    return f"{value:.10g}" if isinstance(value, float) else str(value).replace("|", "\\|")


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
    names = {item.name for item in fields(Result)}
    optional = {"importance"}  # runs recorded by earlier versions have none
    source = data.get("provenance")
    if isinstance(source, dict) and source.get("published"):
        optional |= {"locks", "lock_stats", "times", "peak_memory"}
    missing, unknown = names - optional - set(data), set(data) - names - {"format"}
    if missing or unknown:
        raise ResultError(
            f"not a whole result: missing {sorted(missing)}, not known here {sorted(unknown)}"
        )
    return {name: value for name, value in data.items() if name != "format"}
