"""Small made-up results that figures and tables are tested on."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitstack_nb.benchmark.curves import SPARSITIES, LockCurves
from bitstack_nb.results.metrics import summarize
from bitstack_nb.results.plain_json import as_text
from bitstack_nb.results.result import Result

TASKS = ("imdb", "ag_news", "dbpedia")
# (layer, module): eligible entries.
PLACES = {(0, "attn.query"): 40, (0, "mlp.dense"): 60, (1, "attn.query"): 40, (1, "mlp.dense"): 60}
POOLER = {(None, "pooler.dense"): 20}

PROVENANCE = {
    "command": "x",
    "date": "2026-01-01T00:00:00+00:00",
    "gpus": [],
    "cpu": "toy",
    "cores": 2,
    "packages": {"torch": "2.13.0"},
    "git": None,
}


def run(strategy: str = "bitstack", seed: int = 0, *, tasks=TASKS, **settings: Any) -> Result:
    """A run whose accuracies and locks are drawn from its strategy, settings and seed."""
    rng = np.random.default_rng([seed, *f"{strategy}{sorted(settings.items())}".encode()])
    own = {"sparsity": 0.12, "budget": "union"} if strategy == "bitstack" else {}
    protocol = {"strategy": strategy, "model": "tiny", "data": "hub", "seed": seed}
    protocol |= {"epochs": 1, "train_size": 8}
    protocol["tasks"] = [{"name": name} for name in tasks]
    count = len(tasks)
    matrix = np.tril(rng.uniform(20, 90, (count, count)))
    matrix[np.triu_indices(count, 1)] = np.nan
    if strategy == "joint":
        matrix[:-1] = np.nan
    protocol |= own | settings
    locks = lock_records(protocol["sparsity"], count, rng) if own else []
    return Result(
        protocol=protocol,
        matrix=matrix,
        metrics=summarize(matrix),
        locks=locks,
        lock_stats=[stats(locks, task) for task in range(1, count + 1)] if locks else [],
        importance=importance(count) if locks else {},
        provenance=PROVENANCE,
        storage={}
        if strategy == "joint"
        else {"bytes": int(rng.integers(2, 9)) * 10_000 * len(own)},
        drift=drift(rng, bool(locks)) if strategy in ("bitstack", "finetune") else {},
        predictions=[predictions(name, seed, rng) for name in tasks],
    )


def predictions(task: str, seed: int, rng: np.random.Generator) -> dict[str, str]:
    """Labels of a seed's ten texts of three classes, predicted without regard to the matrix."""
    own = {"labels": as_text(np.random.default_rng([seed, *task.encode()]).integers(0, 3, 10))}
    own |= {name: as_text(rng.integers(0, 3, 10)) for name in ("learnt", "final")}
    return {"task": task} | own


def drift(rng: np.random.Generator, locks: bool) -> dict[str, Any]:
    """Accuracies with groups put back, as of ``drift.attribute``."""
    groups = ["norms", "attention", "MLP", *(["locked", "free"] if locks else [])]
    return {name: {"accuracy": rng.uniform(20, 90), "entries": 10} for name in groups}


def importance(tasks: int) -> dict[str, Any]:
    """Recorded curves as if each task chose at random."""
    cells = tuple((*place, eligible) for place, eligible in {**PLACES, **POOLER}.items())
    share, number = np.array(SPARSITIES), np.arange(1, tasks + 1)[:, None, None]
    shape = (tasks, len(cells), len(share))
    selected, union, fresh = (
        np.broadcast_to(curve, shape)
        for curve in (share, 1 - (1 - share) ** number, np.minimum(1, share * number))
    )
    same = np.eye(tasks)[..., None]
    shared = same * share + (1 - same) * share**2
    locked = {"union": union, "fresh": fresh}
    return LockCurves(SPARSITIES, cells, selected, locked, shared).to_record()


def lock_records(sparsity: float, tasks: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Records as of ``BitStack.layer_table``."""
    records = []
    locked = dict.fromkeys(PLACES | POOLER, 0)
    for task in range(1, tasks + 1):
        for place, eligible in (PLACES | POOLER).items():
            selected = int(rng.binomial(eligible, sparsity))
            added = int(rng.integers(0, min(selected, eligible - locked[place]) + 1))
            locked[place] += added
            records.append(
                {
                    "layer": place[0],
                    "module": place[1],
                    "task": task,
                    "eligible": eligible,
                    "selected": selected,
                    "added": added,
                    "locked": locked[place],
                    "lock_fraction": locked[place] / eligible,
                }
            )
    return records


def stats(locks: list[dict[str, Any]], task: int) -> dict[str, float]:
    """``BitStack.stats`` after a task."""
    own = [record for record in locks if record["task"] == task]
    locked, eligible = (sum(record[key] for record in own) for key in ("locked", "eligible"))
    return {
        "locked": locked,
        "eligible": eligible,
        "total": 2 * eligible,
        "locked_pct": 50 * locked / eligible,
        "frozen_pct": 100 * locked / eligible,
    }


def published(strategy: str, forgetting: float) -> Result:
    """Numbers that were not measured here."""
    own = {"sparsity": 0.12, "budget": "union"} if strategy == "bitstack" else {}
    return Result(
        protocol={"strategy": strategy, "model": "gpt2", "seed": 42} | own,
        matrix=None,
        metrics={"forgetting": forgetting},
        lock_stats=[{"locked_pct": 15.0}] if own else [],
        provenance={"published": "the paper"},
    )
