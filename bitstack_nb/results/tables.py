"""Tables of results: configurations, means with intervals over seeds, and where they come from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from bitstack_nb.results.metrics import mean_interval
from bitstack_nb.results.plain_json import canonical
from bitstack_nb.results.result import Result, ResultError
from bitstack_nb.settings import CONTROLS

if TYPE_CHECKING:
    import pandas as pd

# Table column -> heading. In percent or points if nothing else is said; the half width stands in
# "<column>_interval".
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
    NaN where a seed lacks it, but for time per step, which is of the seeds that have recorded it.
    Storage is left out where no run has recorded it, time unless all configurations have: some of
    them would compare nothing. Raises ResultError as ``configurations`` does.
    """
    import pandas as pd

    frame = pd.DataFrame(
        item.shown | {"seeds": len(item.results)} | _averages(item.results)
        for item in configurations(results)
    )
    unknown = ["storage_per_task"] if frame["storage_per_task"].isna().all() else []
    unknown += ["time_per_step"] if frame["time_per_step"].isna().any() else []
    return frame.drop(columns=[f"{name}{end}" for name in unknown for end in ("", "_interval")])


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """``table``'s frame (or one like it) as text under headings: mean ± half width."""
    import pandas as pd

    kept = [name for name in frame.columns if not name.endswith("_interval")]
    rows = [
        [_cell(row[name], row.get(f"{name}_interval"), f"{name}_interval" in row) for name in kept]
        for row in frame.to_dict("records")
    ]
    return pd.DataFrame(rows, columns=[COLUMNS.get(n, n.replace("_", " ")) for n in kept])


def format_table(frame: pd.DataFrame) -> str:
    """Markdown of ``table``'s frame (or one like it): mean ± half width."""
    return markdown(readable(frame))


def markdown(shown: pd.DataFrame) -> str:
    """Markdown of a frame of text, aligned to be read as plain text too."""
    lines = [list(shown.columns), *shown.to_numpy().tolist()]
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def provenance_table(results: Iterable[Result]) -> pd.DataFrame:
    """What the results were made on and with: a column per origin, with how many runs it made.

    Published numbers, which say only where they were published, are left out.
    """
    import pandas as pd

    origins: dict[str, dict[str, Any]] = {}
    for result in results:
        origin = result.provenance
        if origin.get("published"):
            continue
        git = origin["git"] or {"commit": None, "dirty": None}
        row = {
            "data": _shown("data", result.protocol["data"]),
            "model": result.protocol["model"],
            "hardware": ", ".join(origin["gpus"]) or f"{origin['cpu']}, {origin['cores']} cores",
            "commit": f"{(git['commit'] or 'unknown')[:10]}{' + changes' if git['dirty'] else ''}",
            **{name: version or "-" for name, version in origin["packages"].items()},
        }
        own = origins.setdefault(canonical(row), row | {"runs": 0, "dates": set(), "seeds": set()})
        own["runs"] += 1
        own["dates"].add(origin["date"][:10])
        own["seeds"].add(result.protocol["seed"])
    columns = [
        {name: ", ".join(map(str, sorted(v))) if isinstance(v, set) else v for name, v in o.items()}
        for o in origins.values()
    ]
    return pd.DataFrame(columns).T


def _configuration(result: Result) -> dict[str, Any]:
    """The protocol less what belongs to the seed, and whether the numbers are published ones."""
    entries = {k: v for k, v in result.protocol.items() if k != "seed" and v is not None}
    if "sparsity" in entries and entries["strategy"] not in CONTROLS:
        entries.setdefault("importance", "gradient")  # what a protocol without one means
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
        found = [column_value(member, name) for member in members]
        values = [value for value in found if value is not None]
        # A seed that is left out would change what an accuracy is the mean of; a time it does not.
        whole = len(values) == len(found) or name == "time_per_step"
        row[name], row[f"{name}_interval"] = mean_and_half(values if whole else [])
    return row


def mean_and_half(values: list[float]) -> tuple[float, float]:
    """``metrics.mean_interval`` as frames hold it: NaN for what there are too few values for."""
    mean, half = mean_interval(values) if values else (math.nan, None)
    return mean, math.nan if half is None else half


def column_value(result: Result, name: str) -> float | None:
    """One run's number for a column of COLUMNS; None where it has none."""
    locked = {"locked_of_eligible": "frozen_pct", "locked_of_all": "locked_pct"}
    if name in locked:
        return result.lock_stats[-1].get(locked[name]) if result.lock_stats else None
    if name == "storage_per_task":
        stored = result.storage.get("bytes")
        return None if stored is None else stored / 1000 / len(result.protocol["tasks"])
    if name == "time_per_step":
        steps = result.times.get("step")
        return None if not steps or None in steps else 1000 * sum(steps) / len(steps)
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
    return f"{value:.10g}" if isinstance(value, float) else str(value)
