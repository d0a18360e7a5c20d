"""Results as tidy frames: a row per run, or a row per run and task.

Tables and pairs are a ``groupby`` and a ``merge`` of these. pandas is imported where it is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from bitstack_nb.results.metrics import mean_interval
from bitstack_nb.results.plain_json import canonical
from bitstack_nb.results.result import Result, ResultError

if TYPE_CHECKING:
    import pandas as pd

# Numbers of a run -> heading. In percent or points where nothing else is said.
COLUMNS = {
    "average_accuracy": "average accuracy",
    "learning_accuracy": "learning accuracy",
    "forgetting": "forgetting",
    "forgetting_chaudhry": "forgetting (Chaudhry)",
    "first_task_after_last": "task 1 after the last",
    "locked_of_eligible": "locked % of eligible",
    "locked_of_all": "locked % of all",
    "storage_per_task": "kB per task",
    "time_per_step": "ms per step",
}
SYNTHETIC = "embedded (synthetic)"
# What the record of a dataset or a backbone calls its version.
_VERSIONS = ("sha256", "revision", "generator", "vocabulary")
# Strategies to which importance does not say which weights to lock or own.
_WITHOUT = ("random-mask", "magnitude-mask", "shira")


def frame(results: Iterable[Result]) -> pd.DataFrame:
    """One row per run, by seed; a result that is given twice counts once.

    Columns: the protocol's settings (``settings_of`` names them), ``seed``, ``order`` (the tasks as
    they were trained), the numbers of COLUMNS (NaN where there is none), ``configuration`` (a text
    that is equal for runs that differ in seed and order alone) and ``result``, the Result itself.
    Published numbers have their source in ``published``, and never mix with measured ones.

    Raises:
        ResultError: there are no results, or a seed and order have two different results, as
            counting both would feign a narrower interval.
    """
    import pandas as pd

    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for result in results:
        settings = configuration(result)
        order = canonical([task["name"] for task in result.protocol.get("tasks") or []])
        key = canonical(settings), result.protocol.get("seed"), order
        if key not in rows:
            own = {"seed": key[1], "order": order, **numbers(result)}
            own |= {"configuration": key[0], "result": result}
            rows[key] = {name: _cell(name, value) for name, value in settings.items()} | own
        elif rows[key]["result"] != result:
            both = " and ".join(one.path or "?" for one in (rows[key]["result"], result))
            raise ResultError(
                f"seed {key[1]} of strategy {settings['strategy']!r} has two different results "
                f"with the tasks {order} ({both}): leave one of them out"
            )
    if not rows:
        raise ResultError("there are no results: give at least one")
    runs = pd.DataFrame(rows.values()).astype(dict.fromkeys(COLUMNS, float))
    return runs.sort_values(["seed", "order"], kind="stable", ignore_index=True)


def task_frame(results: Iterable[Result]) -> pd.DataFrame:
    """One row per run and task, in training order, the lowest seed first.

    Columns: those of ``frame`` but its numbers; ``task``; ``learnt`` and ``final``, the accuracy on
    it just after it was trained and after the last task, in percent.
    """
    import pandas as pd

    runs = frame(results).drop(columns=[*COLUMNS])
    rows = [
        {"run": at, "task": task["name"], "learnt": row[place], "final": result.matrix[-1][place]}
        for at, result in enumerate(runs["result"])
        for place, (task, row) in enumerate(
            zip(result.protocol.get("tasks") or [], result.matrix or [], strict=False)
        )
    ]
    columns = {"run": int, "task": object, "learnt": float, "final": float}
    long = pd.DataFrame(rows, columns=list(columns)).astype(columns)
    return runs.merge(long, left_index=True, right_on="run").drop(columns="run")


def settings_of(runs: pd.DataFrame) -> list[str]:
    """The columns of ``frame`` that are settings."""
    others = {"seed", "order", *COLUMNS, "configuration", "result"}
    return [name for name in runs if name not in others]


def configuration(result: Result) -> dict[str, Any]:
    """The protocol less what belongs to the seed, its inputs, and whether it was published."""
    settings = {k: v for k, v in result.protocol.items() if k != "seed" and v is not None}
    if "sparsity" in settings and settings["strategy"] not in _WITHOUT:
        settings.setdefault("importance", "gradient")  # what a protocol without one means
    if "tasks" in settings:
        settings["tasks"] = sorted(settings["tasks"], key=lambda task: task["name"])
    settings |= _inputs(result)
    published = result.provenance.get("published")
    return settings | ({"published": published} if published else {})


def _inputs(result: Result) -> dict[str, str]:
    """``inputs``, a digest of the files of data and weights, and of folders only their names.

    So a folder's place is no difference between runs, and other bytes in it are one.
    """
    data, model = (result.provenance.get(name) for name in ("data", "model"))
    records = {"model": model, **data} if isinstance(data, dict) else {}
    if not records or not all(isinstance(record, dict) for record in records.values()):
        return {}
    versions = {
        name: [_version(record[key]) for key in _VERSIONS if key in record]
        for name, record in records.items()
    }
    found = {"inputs": hashlib.sha256(canonical(versions).encode()).hexdigest()[:8]}
    for name, record in (("data", next(iter(data.values()), {})), ("model", model)):
        if record.get("source") == "folder":
            found[name] = PurePath(str(result.protocol.get(name))).name
    return found


def _version(value: Any) -> Any:
    """A version, or the digests of files without the files' names."""
    return sorted(map(str, value.values())) if isinstance(value, dict) else value


def numbers(result: Result) -> dict[str, float | None]:
    """One run's number for each of COLUMNS; None where it has none."""
    last = result.lock_stats[-1] if result.lock_stats else {}
    stored, steps = result.storage.get("bytes"), result.times.get("step")
    counted = steps and None not in steps
    own = {
        "locked_of_eligible": last.get("frozen_pct"),
        "locked_of_all": last.get("locked_pct"),
        "storage_per_task": stored and stored / 1000 / len(result.protocol["tasks"]),
        "time_per_step": 1000 * sum(steps) / len(steps) if counted else None,
    }
    return {name: own[name] if name in own else result.metrics.get(name) for name in COLUMNS}


def averages(runs: pd.DataFrame, columns: Collection[str]) -> pd.DataFrame:
    """Means of columns by ``configuration``, each followed by ``<column>_interval``.

    That is the half width of the 95 % Student interval, NaN for one number. Missing numbers are
    left out.
    """
    import pandas as pd

    rows = {}
    for key, own in runs.groupby("configuration"):
        rows[key] = []
        for name in columns:
            values = own[name].dropna()
            rows[key] += mean_interval(values) if len(values) else (None, None)
    names = [f"{name}{end}" for name in columns for end in ("", "_interval")]
    index = pd.Index([*rows], name="configuration")
    return pd.DataFrame([*rows.values()], index=index, columns=names, dtype=float)


def _cell(name: str, value: Any) -> Any:
    """A setting as a cell: lists and dicts become text, tasks their names."""
    if name == "tasks":
        return ", ".join(task["name"] for task in value)
    if (name, value) == ("data", "embedded"):
        return SYNTHETIC
    return canonical(value) if isinstance(value, list | dict) else value
