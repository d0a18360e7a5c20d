"""All tables of some results as one Markdown text."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from bitstack_nb.pairs import paired_table, paired_tasks
from bitstack_nb.results import Result, ResultError
from bitstack_nb.tables import format_table, markdown, provenance_table, table

if TYPE_CHECKING:
    import pandas as pd

_NOTE = (
    "In percent or points: mean ± half width of the 95 % Student interval over the seeds. Written "
    "by `python -m bitstack_nb figures`."
)


def tables_text(results: list[Result]) -> str:
    """Configurations, their paired differences as far as there are pairs, and provenance."""
    sections = {"Configurations": format_table(table(results))}
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
