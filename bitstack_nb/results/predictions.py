"""What recorded predictions say of a task: confusion, macro F1, and McNemar's test of two models.

Predictions are those after the last task (``when="final"``), or just after the task was trained
(``"learnt"``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from bitstack_nb.results.frames import frame
from bitstack_nb.results.pairs import OTHER, Choice, chosen_pairs
from bitstack_nb.results.plain_json import from_text
from bitstack_nb.results.result import Result, ResultError
from bitstack_nb.results.significance import holm, mcnemar_p

if TYPE_CHECKING:
    import pandas as pd


def predicted(result: Result, task: str, *, when: str = "final") -> tuple[np.ndarray, np.ndarray]:
    """The true and the predicted labels of a task's test texts: int64 ``[texts]`` each.

    Raises ResultError where the run has not recorded them.
    """
    if when not in ("final", "learnt"):
        raise ValueError(f"when is {when!r}, expected 'final' or 'learnt'")
    for own in result.predictions:
        if own["task"] == task and own[when] is not None:
            return from_text(own["labels"]), from_text(own[when])
    raise ResultError(f"{result.path or 'the run'} has no {when} predictions of {task!r}")


def confusion(result: Result, task: str, *, when: str = "final") -> np.ndarray:
    """Counts of test texts, int64 ``[classes, classes]``: a row per true label, a column per
    predicted one. Matrices of several seeds may be added."""
    labels, found = predicted(result, task, when=when)
    (own,) = [own for own in result.protocol["tasks"] if own["name"] == task]
    classes = own.get("num_labels") or 1 + max(labels.max(), found.max())
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (labels, found), 1)
    return counts


def macro_f1(result: Result, task: str, *, when: str = "final") -> float:
    """Mean F1 in percent over the classes that occur among true or predicted labels."""
    counts = confusion(result, task, when=when)
    occurs = counts.sum(axis=0) + counts.sum(axis=1)
    return 100 * float(np.mean(2 * np.diagonal(counts)[occurs > 0] / occurs[occurs > 0]))


def mcnemar(
    results: Iterable[Result], one: Choice, other: Choice, *, when: str = "final"
) -> pd.DataFrame:
    """McNemar's test of two configurations on each task, texts of all paired seeds together.

    It is about the models that were trained, not about other seeds: ``contrasts`` is. A text in the
    samples of two seeds counts twice, which makes a p-value smaller than it should be.

    Returns:
        Columns ``task``, ``texts``, ``both``, ``only_first``, ``only_second`` and ``neither``
        (counts of texts that are classified rightly), ``p`` (mid-p), and ``p_holm`` over the tasks.

    Raises:
        ResultError: a choice is not clear, or a run lacks predictions.
    """
    import pandas as pd

    paired = chosen_pairs(frame(results), one, other)
    counts: dict[str, np.ndarray] = {}
    for own, partner in zip(paired["result"], paired[f"result{OTHER}"], strict=True):
        for task in own.protocol["tasks"]:
            name = task["name"]
            counts[name] = counts.get(name, 0) + _agreement(own, partner, name, when)
    columns = ["both", "only_first", "only_second", "neither"]
    table = pd.DataFrame(counts, index=columns).T.rename_axis("task").reset_index()
    table.insert(1, "texts", table[columns].sum(axis="columns"))
    both = zip(table["only_first"].tolist(), table["only_second"].tolist(), strict=True)
    return table.assign(p=(p := [mcnemar_p(*texts) for texts in both]), p_holm=holm(p))


def _agreement(one: Result, other: Result, task: str, when: str) -> np.ndarray:
    """Texts that both have right, only one of them (the first, the second), and neither: [4]."""
    labels, first = predicted(one, task, when=when)
    same, second = predicted(other, task, when=when)
    if not np.array_equal(labels, same):
        names = " and ".join(result.protocol["strategy"] for result in (one, other))
        seed = one.protocol["seed"]
        raise ResultError(f"{names} have different test texts of {task!r} with seed {seed}")
    right, also = first == labels, second == labels
    return np.array(
        [(right & also).sum(), (right & ~also).sum(), (~right & also).sum(), (~right & ~also).sum()]
    )
