"""Average accuracy and forgetting against sparsity, as recorded, for the explorer's curves."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

import pandas as pd

from bitstack_nb.figures.locks import SparsityLine, sparsity_lines
from bitstack_nb.results import frame
from bitstack_nb.results.metrics import mean_interval
from bitstack_nb.results.pairs import OTHER, pairs
from bitstack_nb.results.result import Result
from bitstack_nb.settings import BUDGETS

_RATES = ("learning_rate", "head_learning_rate")  # chosen for each sparsity in exact recall
_DASHES = ("none", "6 4")


def measured(results: Iterable[Result]) -> dict[str, Any]:
    """The curves that results allow, JSON-able: ``lock`` for BitStack, ``recall`` for exact recall.

    Each has ``lines`` (a line needs three sparsities), a ``note`` on their runs and, where separate
    models were run with the same settings, their mean as ``reference``.
    """
    if not (results := list(results)):
        return {}
    runs = frame(results)
    strategy = runs["strategy"]
    found = {
        "lock": _family(runs[strategy.isin(["bitstack", "finetune"])]),
        "recall": _family(runs[strategy.isin(["recall", "single"])], ignoring=_RATES),
    }
    return {name: family for name, family in found.items() if family}


def _family(runs: pd.DataFrame, ignoring: Iterable[str] = ()) -> dict[str, Any] | None:
    """The lines of one kind, of each variant the one with most sparsities."""
    longest: dict[str, SparsityLine] = {}
    for line in sparsity_lines(runs, ignoring=ignoring).values():
        own = line.runs[line.runs["strategy"] != "finetune"].iloc[0]
        variant = own["importance"] if own["strategy"] == "recall" else own["budget"]
        if len(line.points) > max(2, len(longest[variant].points) if variant in longest else 0):
            longest[variant] = line
    if not longest:
        return None
    lines = [_line(*item, dash) for item, dash in zip(longest.items(), _DASHES, strict=False)]
    seeds = sorted({point["seeds"] for line in lines for point in line["points"]})
    model = PurePath(runs["model"].iloc[0]).name
    note = f"Recorded runs of {model}, {' to '.join(map(str, seeds))} seeds"
    note += ": mean and 95 % interval." if seeds[-1] > 1 else "."
    family = {"lines": lines, "note": f"{note} At sparsity 0: fine-tuning.", "reference": None}
    others = pairs(runs[runs["strategy"] != "finetune"], "single")
    if len(others):
        separate = others.drop_duplicates(["seed", "order"])[f"average_accuracy{OTHER}"]
        note += (
            " Their settings are not those of BitStack's curves: compare with separate models only."
        )
        family |= {"note": note, "reference": {"accuracy": round(separate.mean(), 3)}}
    return family


def _line(variant: str, line: SparsityLine, dash: str) -> dict[str, Any]:
    locks = variant in BUDGETS
    points = line.points.dropna(subset=["average_accuracy", "forgetting"])
    made = [
        {"sparsity": sparsity, "seeds": int(line.seeds[sparsity])}
        | {"accuracy": row["average_accuracy"], "accuracy_half": row["average_accuracy_interval"]}
        | {"forgetting": row["forgetting"], "forgetting_half": row["forgetting_interval"]}
        for sparsity, row in points.fillna(0).round(3).sort_index().iterrows()
    ]
    label = variant if locks else "random" if variant == "random" else f"by {variant}"
    return {
        "mode": variant if locks else "recall",
        "label": label,
        "colour": line.look["color"],
        "dash": dash,
        "best": _best(label, line.runs),
        "points": made,
    }


def _best(label: str, runs: pd.DataFrame) -> str:
    """The sparsity with the highest mean accuracy, and those that end lower on the same seeds."""
    accuracy = runs.pivot_table("average_accuracy", ["seed", "order"], "sparsity")
    best = accuracy.mean().idxmax()
    lower, alike = [], []
    for sparsity in accuracy.columns.drop(best):
        behind, half = mean_interval((accuracy[best] - accuracy[sparsity]).dropna())
        settled = half is not None and behind > half
        (lower if settled else alike).append(f"{100 * sparsity:g} %")
    said = [f"lower on the same seeds: {', '.join(lower)}"] * bool(lower)
    said += [f"not told apart: {', '.join(alike)}"] * bool(alike)
    return f"{label.capitalize()}: accuracy is highest at {100 * best:g} % ({'; '.join(said)})."
