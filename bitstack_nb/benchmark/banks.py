"""Accuracy of a task bank on the benchmark's tasks: a text's task known, or chosen by the bank.

``python -m bitstack_nb bank measure`` runs it over several seeds; each seed has its own texts, own
weights and order of tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from bitstack_nb.bank import TaskBank
from bitstack_nb.data.loading import load_task
from bitstack_nb.data.tasks import Task
from bitstack_nb.results.frames import averages
from bitstack_nb.results.provenance import provenance
from bitstack_nb.router import Part, Router

FORMAT = 1
SHARES = ("known", "chosen", "routed", "lost", "found")  # in percent of a task's test texts


def measure_bank(
    model: str,
    data: str,
    tasks: Sequence[Task],
    *,
    seed: int,
    train_size: int = 480,
    test_size: int = 200,
    evaluate_on: str = "test",
    max_length: int = 32,
    sparsity: float = 0.01,
    unknown: float = 0.05,
    progress: bool = True,
    **learning: Any,
) -> dict[str, Any]:
    """Learn tasks one after the other, then test all of them.

    Args:
        model: a backbone, Hub name or folder.
        data, train_size, test_size, evaluate_on: as in a ``Protocol``.
        tasks: in any order; the seed shuffles them.
        seed: of the texts, the order, the own weights and the heads.
        max_length, sparsity: of the bank.
        unknown: the share of own texts that may count as texts of no task.
        progress: show a progress bar for each task.
        learning: further arguments of ``TaskBank.learn``.

    Returns:
        JSON-able: ``settings``, ``provenance``, and by task in percent of its test texts ``known``
        (classified rightly, its task given), ``chosen`` (task and label right, the bank chooses),
        ``routed`` (task right), ``lost`` (called unknown), and ``found`` (called unknown by a
        router without the task). ``bytes`` is what the task adds to the file.
    """
    settings = {k: v for k, v in locals().items() if k not in ("tasks", "progress", "learning")}
    order = torch.randperm(len(tasks), generator=torch.Generator().manual_seed(seed)).tolist()
    bank = TaskBank.from_pretrained(model, sparsity=sparsity, max_length=max_length)
    tested = {}
    for task in (tasks[number] for number in order):
        sizes = {"train_size": train_size, "test_size": test_size, "evaluate_on": evaluate_on}
        rows = load_task(task, data, seed=seed, **sizes)
        columns = ("text", "text_pair") if task.pair else "text"
        names = [str(label) for label in range(task.num_labels)]
        how = {"text": columns, "label": "label", "labels": names, "progress": progress}
        bank.learn(task.name, rows.train, seed=1000 * seed + len(tested), **how, **learning)
        tested[task.name] = rows.test
    return {
        "format": FORMAT,
        "settings": {**settings, **learning},
        "tasks": {name: _tested(bank, name, rows, unknown) for name, rows in tested.items()},
        "provenance": provenance(),
    }


def accuracy_table(measured: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Means over seeds of what ``measure_bank`` found, by task and over all tasks.

    Columns as there, in percent, each with its half width of a 95 % Student interval
    (``..._interval``); for ``results.format_table``.
    """
    seeds = [pd.DataFrame(found["tasks"]).T[list(SHARES)] for found in measured]
    by_task = pd.concat(seeds).rename_axis("configuration").reset_index()
    over_all = pd.DataFrame([own.mean() for own in seeds]).assign(configuration="all tasks")
    table = pd.concat([averages(by_task, SHARES), averages(over_all, SHARES)])
    return table.rename_axis("task").reset_index()


def _tested(bank: TaskBank, name: str, rows: Any, unknown: float) -> dict[str, float]:
    known = bank.evaluate(name, rows)
    chosen = bank.evaluate(name, rows, chosen=True)
    columns = bank.recall.notes(name)["text"]
    texts = list(zip(*(rows[column] for column in columns), strict=True))
    texts = texts if len(columns) == 2 else [text for (text,) in texts]
    lost = [choice["task"] for choice in bank.route(texts, unknown=unknown)]
    found = {
        "known": known["accuracy"],
        "chosen": chosen["accuracy"],
        "routed": chosen["routed"],
        "lost": lost.count(None) / len(lost),
    }
    pairs = bank.recall.notes(name)["pairs"]
    others = [n for n in bank.tasks if n != name and bank.recall.notes(n)["pairs"] == pairs]
    if others:
        router = Router({other: Part(**bank.recall.kept(other)) for other in others})
        alien = [choice.task for choice in router.choose(bank.features(texts), unknown=unknown)]
        found["found"] = alien.count(None) / len(alien)
    percent = {key: 100 * share for key, share in found.items()}
    return {**percent, "texts": known["texts"], "bytes": _bytes(bank, name)}


def _bytes(bank: TaskBank, name: str) -> int:
    """Bytes of a task's own weights, head and part of the router."""
    return sum(bank.recall.task_bytes(name).values())
