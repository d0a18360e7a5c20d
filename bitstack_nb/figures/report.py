"""All figures and tables of recorded results, and the summary table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.figures import accuracy, locks
from bitstack_nb.figures.methods import grouped, labels, rank
from bitstack_nb.figures.style import Figure, png
from bitstack_nb.files import replacing
from bitstack_nb.results.frames import frame
from bitstack_nb.results.pairs import (
    forward_transfers,
    mean_differences,
    paired_table,
    paired_tasks,
    pairs,
)
from bitstack_nb.results.result import Result, ResultError
from bitstack_nb.results.tables import (
    by_configuration,
    format_table,
    markdown,
    provenance_table,
    readable,
    table,
)

if TYPE_CHECKING:
    import pandas as pd

# Columns of ``results.table`` that the summary leaves to a table of their own.
_FURTHER = ["forgetting_chaudhry", "first_task_after_last", "locked_of_eligible", "locked_of_all"]
_MOST_COLUMNS = 8
_NOTE = (
    "In percent or points: mean ± half width of the 95 % Student interval over the seeds. Written "
    "by `python -m bitstack_nb figures`."
)


def summary(results: Iterable[Result]) -> pd.DataFrame:
    """The comparison in one table, a row per configuration; ``results.readable`` shows it.

    Columns: ``method``; ``seeds``; average accuracy, learning accuracy, forgetting, storage and
    time per step as far as they were recorded; ``minus_separate_models``, the average accuracy
    less that of separate models on the same seeds. Each comes with ``<column>_interval``.
    """
    runs = frame(results)
    minus = mean_differences(pairs(runs, "single"), ["average_accuracy"])
    minus = minus.reindex(columns=_with_intervals(["average_accuracy"]))
    minus.columns = _with_intervals(["minus_separate_models"])
    found = named(by_configuration(runs).join(minus))
    empty = [name for name in found if found[name].isna().all()]
    empty = [name for name in empty if not name.endswith("_interval")]
    return found.drop(columns=_with_intervals([*_FURTHER, *empty]), errors="ignore")


def named(rows: pd.DataFrame) -> pd.DataFrame:
    """A table of the room ``results`` with display names instead of settings.

    The first column is ``method``; rows are in the order of the methods.
    """
    settings, values = _split(rows)
    made = values.assign(method=labels(settings))[["method", *values.columns]]
    order = sorted(range(len(made)), key=lambda at: rank(settings[at]))
    return made.iloc[order].reset_index(drop=True)


def _split(frame: pd.DataFrame) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """The settings of each row, which end where ``seeds`` begins, and the other columns."""
    at = frame.columns.get_loc("seeds")
    settings = frame.iloc[:, :at].astype(object)
    return settings.where(settings.notna(), None).to_dict("records"), frame.iloc[:, at:]


def _with_intervals(names: Iterable[str]) -> list[str]:
    return [each for name in names for each in (name, f"{name}_interval")]


# Files --------------------------------------------------------------------------------------------


def write_figures(
    results: list[Result], folder: str | os.PathLike[str]
) -> tuple[list[Path], dict[str, str]]:
    """Write the figures that ``results`` allow as PNG, and their tables as ``tables.md``.

    Each file is whole or not there; all are drawn before the first is written.

    Returns:
        The files, and by name the reason why a figure was not drawn.

    Raises:
        ResultError: none can be drawn, or the results contradict each other.
        OSError: a file cannot be written; it is named.
    """
    frame(results)  # results that contradict each other are an error, and not a figure less
    contents: dict[str, bytes] = {}
    left_out: dict[str, str] = {}
    for name, draw in _figures(results):
        try:
            contents[f"{name}.png"] = png(draw())
        except ResultError as error:
            left_out[name] = str(error)
    if not contents:
        raise ResultError("; ".join(f"no figure {name}: {why}" for name, why in left_out.items()))
    contents["tables.md"] = tables_text(results).encode()
    folder = Path(folder).expanduser()
    return [_written(folder / name, content) for name, content in contents.items()], left_out


def _written(file: Path, content: bytes) -> Path:
    try:
        with replacing(file) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        reason = f"cannot write the file ({error.strerror})"
        raise OSError(error.errno, reason, str(file)) from error
    return file


def _figures(results: list[Result]) -> Iterator[tuple[str, Callable[[], Figure]]]:
    for draw in (
        accuracy.comparison,
        accuracy.paired_differences,
        accuracy.forgetting_per_task,
        accuracy.accuracy_matrices,
        accuracy.task_differences,
        accuracy.accuracy_for_storage,
        accuracy.drift_attribution,
        locks.ablation,
        locks.capacity,
    ):
        yield draw.__name__, partial(draw, results)
    smallest = partial(accuracy.accuracy_for_storage, results, best=True)
    yield "accuracy_for_smallest_storage", smallest
    for name, result in _examples(results).items():
        for draw in (locks.lock_heatmaps, locks.task_overlap, locks.mask_weight):
            yield f"{draw.__name__}_{name}", partial(draw, result)


def _examples(results: list[Result]) -> dict[str, Result]:
    """A run per strategy and budget that locks: the sparsity nearest the default, first seed."""
    locking = [g for g in grouped(frame(results)) if g.settings["budget"] and g.results[0].locks]
    locking.sort(key=lambda g: abs(g.settings["sparsity"] - Protocol.sparsity))
    found: dict[str, Result] = {}
    for group in locking:
        kind = (group.settings["strategy"], group.settings["budget"])
        found.setdefault("_".join(filter(None, kind)), group.results[0])
    return dict(sorted(found.items()))


def tables_text(results: list[Result]) -> str:
    """Summary, settings, paired differences as far as there are pairs, and provenance."""
    whole = table(results)
    further = named(whole)[["method", "seeds", *_with_intervals(_FURTHER)]]
    sections = {
        "Summary": format_table(summary(results)),
        "Further numbers": format_table(further),
        "Settings that differ": format_table(_settings(whole)),
    }
    for heading, make in {
        "Difference to fine-tuning": partial(paired_table, results, "finetune"),
        "Difference to separate models": partial(paired_table, results, "single"),
        "Difference to separate models, task by task": partial(paired_tasks, results, "single"),
        "Forward transfer": partial(forward_transfers, results, "single"),
        "Difference to the random mask": partial(paired_table, results, "random-mask"),
    }.items():
        try:
            shown = readable(named(make()))
        except ResultError:
            continue  # no such pairs
        sections[f"{heading}, the same seeds paired"] = markdown(_narrow(shown))
    origins = provenance_table(results)
    if len(origins):
        sections["Where the numbers come from"] = markdown(_with_index(origins))
    parts = [f"## {heading}\n\n{text}\n" for heading, text in sections.items()]
    return "\n".join([f"{_NOTE}\n", *parts])


def _settings(frame: pd.DataFrame) -> pd.DataFrame:
    """The settings of each row of ``results.table`` beside its display name."""
    ordered = named(frame.assign(row=range(len(frame))))
    settings = frame.iloc[ordered["row"], 1 : frame.columns.get_loc("seeds")]
    return settings.reset_index(drop=True).assign(method=ordered["method"])[
        ["method", *settings.columns]
    ]


def _narrow(shown: pd.DataFrame) -> pd.DataFrame:
    """A table of text; one with too many columns becomes a row per column."""
    if shown.shape[1] <= _MOST_COLUMNS:
        return shown
    return shown.set_index("method").T.rename_axis("", axis=0).reset_index()


def _with_index(origins: pd.DataFrame) -> pd.DataFrame:
    """The index as a first column, all as text."""
    shown = origins.rename(columns=lambda number: f"origin {number + 1}").astype(str)
    return shown.rename_axis("").reset_index()
