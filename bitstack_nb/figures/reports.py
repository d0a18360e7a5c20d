"""All tables of some results as one Markdown text."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from bitstack_nb.results.pairs import differences, metric, paired_table, paired_tasks, with_partners
from bitstack_nb.results.result import Result, ResultError
from bitstack_nb.results.tables import (
    configurations,
    format_table,
    markdown,
    mean_and_half,
    provenance_table,
    table,
)

if TYPE_CHECKING:
    import pandas as pd

# What the summary leaves out of the table.
_LEFT_OUT = ("forgetting_chaudhry", "first_task_after_last", "locked_of_all", "locked_of_eligible")
# What names a row of it; then what must be said where it is there.
_TOLD_BY = ["strategy", "sparsity", "budget", "importance"]
_NAMED = [*_TOLD_BY, "data", "published"]
_NOTE = (
    "In percent or points: mean ± half width of the 95 % Student interval over the seeds. Written "
    "by `python -m bitstack_nb figures`."
)


def summary(results: list[Result]) -> pd.DataFrame:
    """The comparison in one table, best first; ``tables.readable`` shows it.

    As ``tables.table``, with less of it (settings, such as a tuned learning rate, only where
    strategy, sparsity, budget and importance do not tell the rows apart), and with
    ``minus_separate_models``: the average accuracy less that of separate models on the same seeds,
    in points, NaN where there is no such pair.
    """
    frame = table(results)
    if not frame.duplicated(frame.columns.intersection(_TOLD_BY)).any():
        settings = frame.columns[: frame.columns.get_loc("seeds")]
        frame = frame.drop(columns=settings.difference(_NAMED))
    found = [_to_single(item.results, results) for item in configurations(results)]
    frame["minus_separate_models"] = [mean for mean, _ in found]
    frame["minus_separate_models_interval"] = [half for _, half in found]
    columns = [name for name in frame if name.removesuffix("_interval") not in _LEFT_OUT]
    return frame[columns].sort_values("average_accuracy", ascending=False, kind="stable")


def _to_single(members: list[Result], results: list[Result]) -> tuple[float, float]:
    """Mean and half width of one configuration's differences, NaN where there are none."""
    others = [member for member in members if member.protocol["strategy"] != "single"]
    pairs = with_partners(others, results, baseline="single")
    return mean_and_half(differences(pairs, metric("average_accuracy")))


def tables_text(results: list[Result]) -> str:
    """Configurations, their paired differences as far as there are pairs, and provenance."""
    sections = {"Summary": format_table(summary(results))}
    sections["Configurations in full"] = format_table(table(results))
    for heading, make in {
        "Difference to fine-tuning": partial(paired_table, results, "finetune"),
        "Difference to separate models": partial(paired_table, results, "single"),
        "Difference to separate models, task by task": partial(paired_tasks, results, "single"),
        "Difference to the random mask": partial(paired_table, results, "random-mask"),
    }.items():
        try:
            sections[f"{heading}, the same seeds paired"] = format_table(make())
        except ResultError:
            continue  # no such pairs
    origins = provenance_table(results)
    if len(origins):
        sections["Where the numbers come from"] = markdown(_with_index(origins))
    parts = [f"## {heading}\n\n{text}\n" for heading, text in sections.items()]
    return "\n".join([f"{_NOTE}\n", *parts])


def _with_index(origins: pd.DataFrame) -> pd.DataFrame:
    """The index as a first column, all as text."""
    named = origins.rename(columns=lambda number: f"origin {number + 1}").astype(str)
    return named.rename_axis("").reset_index()
