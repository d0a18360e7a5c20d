"""The costs of one machine: measured, kept as JSON, and shown in a table beside their limits.

``python -m bitstack_nb cost`` measures the costs of locking, ``cost recall`` those of exact recall,
``cost growth`` how both grow. ``cost bank`` is in ``bank``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from tqdm.auto import tqdm

from bitstack_nb.cost import measure, processes
from bitstack_nb.files import replacing
from bitstack_nb.results.plain_json import plain, render
from bitstack_nb.results.provenance import provenance
from bitstack_nb.results.result import ResultError

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1
# By cost: the work or unit that it is compared with, and the limit of the ratio or number.
LIMITS = {
    "training step": ("a step of plain training", 1.03),
    "update": ("forward and backward of its batches", 1.08),
    "threshold": ("one pass of torch.sort", 0.25),
    "threshold, memory": ("MiB beside the scores", 32.0),
    "mask in memory": ("bits per eligible weight", 1.02),
    "mask on disk": ("bits per eligible weight", 1.02),
    "training, memory": ("1 bit per eligible weight + 4 bytes per locked one + 32 MiB", 1.0),
    "recall step": ("a step of plain training", 0.6),
    "recall, optimizer state": ("bytes per own weight", 12.0),
    "recall, memory": ("MiB beside the model, 5 % own weights", 200.0),
    "recall switch": ("a forward pass, 12 % own weights", 0.5),
    "recall switch, 5 %": ("a forward pass of MiniLM, one text of 32 tokens", 1.0),
    "recall switch, 0.1 %": ("a forward pass of MiniLM, one text of 32 tokens", 0.25),
    "import": ("import torch", 1.2),
}


@dataclass(kw_only=True)
class CostReport:
    """The measurements of one machine.

    Attributes:
        device: ``cpu`` or ``cuda``.
        model: layers, width, parameters and eligible weights of the measured GPT-2.
        costs: by the names of LIMITS: ``value``, and for times ``seconds`` (per work, a number per
            round) and ``plain`` (the ratio of the plain implementation, if it has one).
        bank: ``settings``; ``found``, by cost and by label; ``seconds``, by cost and by label, a
            number per round.
        growth: records with ``what``, ``parameters``, ``tasks`` and ``ratio``.
        provenance: by part (``costs``, ``recall``, ``bank``, ``growth``), as in a ``Result``.
    """

    device: str
    model: dict[str, Any] = field(default_factory=dict)
    costs: dict[str, dict[str, Any]] = field(default_factory=dict)
    bank: dict[str, dict[str, Any]] = field(default_factory=dict)
    growth: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, dict[str, Any]] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write readable JSON; an error leaves the file at ``path`` as it was."""
        record = plain({"format": FORMAT, **vars(self)}, "costs")
        with replacing(path) as temporary:
            temporary.write_text(render(record) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CostReport:
        """Read a saved report; a ResultError names any other file."""
        try:
            record = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
            if record.pop("format") != FORMAT:
                raise ValueError("another format")
            return cls(**record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ResultError(f"{path} is no cost report of this version: {error}") from error


def measure_costs(
    report: CostReport,
    *,
    layers: int = 12,
    width: int = 768,
    tasks: int = 5,
    rounds: int = 7,
    progress: bool = False,
) -> None:
    """Measure the costs of locking on a GPT-2 of this size (the defaults are its 124 M parameters).

    Takes some minutes, in which nothing else should run on the machine.
    """
    shape = {"layers": layers, "width": width}
    model = measure.gpt2(**shape)
    eligible = measure.BitStack(model, measure.SPARSITY).stats()["eligible"]
    size = {"parameters": _parameters(model), "eligible": eligible}
    costs = _costs(shape, eligible, tasks=tasks, rounds=rounds, device=report.device)
    _measure(report, "costs", costs, progress=progress)
    report.model = {**shape, "tasks": tasks, "rounds": rounds, **size}


def measure_recall(
    report: CostReport,
    *,
    layers: int = 12,
    width: int = 768,
    tasks: int = 5,
    rounds: int = 7,
    progress: bool = False,
) -> None:
    """Measure the costs of exact recall, as ``measure_costs`` does those of locking."""
    shape = {"layers": layers, "width": width}
    costs = _recall_costs(shape, tasks=tasks, rounds=rounds, device=report.device)
    _measure(report, "recall", costs, progress=progress)


def _measure(
    report: CostReport,
    part: str,
    costs: Iterator[tuple[str, dict[str, Any]]],
    *,
    progress: bool,
) -> None:
    origin = provenance()
    with tqdm(costs, disable=not progress, unit="cost") as bar:
        for name, found in bar:
            bar.set_description(name)
            report.costs[name] = found
    report.provenance[part] = origin


def _costs(
    shape: dict[str, int], eligible: int, *, tasks: int, rounds: int, device: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    def fresh() -> nn.Module:
        return measure.gpt2(**shape).to(device)

    # Three times the rounds, because steps vary by as much as a lock costs.
    yield "training step", _timed(measure.training_step(fresh(), tasks=tasks, rounds=3 * rounds))
    yield "update", _timed(measure.update(fresh(), rounds=rounds))
    yield "threshold", _timed(measure.threshold(eligible, rounds=rounds, device=device))
    yield "import", _timed(processes.importing(rounds=rounds))
    memory, disk = processes.mask_bits(measure.locked_stack(fresh(), tasks=1))
    yield "mask in memory", {"value": memory}
    yield "mask on disk", {"value": disk}
    yield "threshold, memory", {"value": processes.threshold_memory(eligible, device=device)}
    added = processes.training_memory(**shape, tasks=tasks, device=device)
    yield "training, memory", {"value": added}


def _recall_costs(
    shape: dict[str, int], *, tasks: int, rounds: int, device: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    def fresh() -> nn.Module:
        return measure.gpt2(**shape).to(device)

    yield "recall step", _timed(measure.recall_step(fresh(), rounds=rounds))
    yield "recall, optimizer state", {"value": measure.optimizer_state(fresh())}
    yield "recall, memory", {"value": processes.recall_memory(**shape, device=device)}
    yield "recall switch", _timed(measure.recall_switch(fresh(), tasks=tasks, rounds=rounds))
    for name, share in (("recall switch, 5 %", 0.05), ("recall switch, 0.1 %", 0.001)):
        model, short = measure.minilm().to(device), {"rows": 1, "length": 32}
        times = measure.recall_switch(model, sparsity=share, rounds=10 * rounds, **short)
        yield name, _timed(times)


def _timed(times: measure.Times) -> dict[str, Any]:
    found = {"value": times.ratio("ours"), "seconds": times.seconds}
    return found | ({"plain": times.ratio("plain")} if "plain" in times.seconds else {})


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def cost_findings(report: CostReport) -> list[str]:
    """The report in a few sentences; costs that were not measured are left out."""
    found = {name: cost["value"] for name, cost in report.costs.items()}
    said = {
        "training step": "A locked step takes {:.2f} times as long as a plain one.",
        "update": "An update takes {:.2f} times as long as the passes over its batches.",
        "recall step": "A step of exact recall takes {:.2f} times as long as a plain one.",
        "mask in memory": "A mask takes {:.2f} bits per eligible weight.",
    }
    sentences = [text.format(found[name]) for name, text in said.items() if name in found]
    above = [name for name, (_, limit) in LIMITS.items() if found.get(name, 0) > limit]
    missed = f"{len(above)} of {len(found)} costs are above their limits"
    return [*sentences, f"{missed}: {'; '.join(above)}." if above else f"{missed}."]


def measure_growth(
    report: CostReport,
    sizes: Sequence[tuple[int, int]] = ((4, 192), (6, 320), (12, 512), (12, 768), (24, 1024)),
    tasks: Sequence[int] = (1, 2, 5, 10),
    *,
    rounds: int = 5,
    progress: bool = False,
) -> None:
    """Measure a step, an update and a switch over sizes (layers, width) and over tasks.

    Sizes vary at 5 tasks, and tasks at the second size. The plain implementation is left out.
    """
    origin, records = provenance(), []
    shapes = [(size, 5) for size in sizes] + [(sizes[1], number) for number in tasks]
    for size, number in tqdm(dict.fromkeys(shapes), disable=not progress, unit="model"):
        for what, work in _growing(number, rounds).items():
            model = measure.gpt2(*size).to(report.device)
            at = {"what": what, "parameters": _parameters(model), "tasks": number}
            records.append({**at, "ratio": work(model).ratio("ours")})
    report.growth, report.provenance["growth"] = records, origin


def _growing(tasks: int, rounds: int) -> dict[str, partial[measure.Times]]:
    works = {
        "training step": partial(
            measure.training_step, tasks=tasks, rounds=3 * rounds, plainly=False
        ),
        "update": partial(measure.update, rounds=rounds, plainly=False),
    }
    if tasks > 1:  # with one task there is no switch
        works["recall switch"] = partial(measure.recall_switch, tasks=tasks, rounds=rounds)
    return works


def cost_table(report: CostReport) -> pd.DataFrame:
    """A row per cost: its comparison, limit, measurement, and that of the plain implementation."""
    import pandas as pd

    rows = [
        {
            "cost": name,
            "compared with": compared,
            "at most": limit,
            "measured": found["value"],
            "plain implementation": found.get("plain"),
            "within": found["value"] <= limit,
        }
        for name, (compared, limit) in LIMITS.items()
        if (found := report.costs.get(name))
    ]
    return pd.DataFrame(rows)
