"""The costs of a machine: measured, kept as JSON, and shown beside what they may be.

Three parts, which ``python -m bitstack_nb cost`` measures and writes one by one: the costs
themselves, how they grow, and what padding would cost.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.cost import measure as cost
from bitstack_nb.cost import padding
from bitstack_nb.files import replacing
from bitstack_nb.results.plain_json import plain, render
from bitstack_nb.results.provenance import provenance
from bitstack_nb.results.result import ResultError

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1
# What is measured, what it is compared with, and what the ratio (or the number) may be at most.
LIMITS = {
    "training step": ("a step of plain training", 1.03),
    "update": ("forward and backward of its batches", 1.08),
    "threshold": ("one pass of torch.sort", 0.25),
    "threshold, memory": ("MiB beside the scores", 32.0),
    "mask in memory": ("bits per eligible entry", 1.02),
    "mask on disk": ("bits per eligible entry", 1.02),
    "training, memory": ("1 bit per eligible entry + 4 bytes per locked one + 32 MiB", 1.0),
    "recall switch": ("a forward pass", 0.5),
    "import": ("import torch", 1.2),
    "benchmark": ("itself, every text padded to {max_length} tokens", 0.5),
}


@dataclass(kw_only=True)
class CostReport:
    """What one machine measured, part by part.

    Attributes:
        device: ``cpu`` or ``cuda``.
        model: layers, width, parameters and eligible entries of the GPT-2 of ``costs``.
        costs: by the names of LIMITS: ``value``, and for times ``plain`` (the plain
            implementation's ratio, if it has one) and ``seconds`` (per work, a number per round).
        growth: records with ``what``, ``parameters``, ``tasks`` and ``ratio``.
        provenance: by part (``costs``, ``growth``, ``padding``), as in a ``Result``.
    """

    device: str
    model: dict[str, Any] = field(default_factory=dict)
    costs: dict[str, dict[str, Any]] = field(default_factory=dict)
    growth: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, dict[str, Any]] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON that can be read by eye; ``path`` is whole, or as it was before."""
        record = plain({"format": FORMAT, **vars(self)}, "costs")
        with replacing(path) as temporary:
            temporary.write_text(render(record) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CostReport:
        """Read what ``save`` wrote; a ResultError names a file that is none."""
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            if record.pop("format") != FORMAT:
                raise ValueError("another format")
            return cls(**record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ResultError(f"{path} is no cost report of this version: {error}") from error


def load_or_new(path: str | os.PathLike[str], *, device: str) -> CostReport:
    """The report at ``path``, to which parts are added, or an empty one."""
    return CostReport.load(path) if Path(path).exists() else CostReport(device=device)


def measure_costs(
    report: CostReport,
    *,
    layers: int = 12,
    width: int = 768,
    tasks: int = 5,
    rounds: int = 7,
    progress: bool = False,
) -> None:
    """Measure every cost on a GPT-2 of this size (the defaults are its 124 M parameters).

    Takes some minutes; nothing else should run on the machine meanwhile.
    """
    origin, device = provenance(), report.device
    model = cost.gpt2(layers, width).to(device)
    entries = cost.BitStack(model, cost.SPARSITY).stats()["eligible"]
    parameters = sum(p.numel() for p in model.parameters())
    del model
    shape = {"layers": layers, "width": width}
    steps = _measurements(shape, entries, tasks=tasks, rounds=rounds, device=device)
    with tqdm(steps, total=len(LIMITS) - 1, disable=not progress, unit="cost") as bar:
        for name, value in bar:
            bar.set_description(name)
            report.costs[name] = value
    size = {"tasks": tasks, "rounds": rounds, "parameters": parameters, "eligible": entries}
    report.model, report.provenance["costs"] = shape | size, origin


def measure_padding(
    report: CostReport, protocol: Protocol, *, rounds: int = 1, progress: bool = False
) -> None:
    """Measure what padding every text to the protocol's ``max_length`` would cost."""
    origin = provenance()
    device = torch.device(report.device)
    times = padding.benchmark(protocol, rounds=rounds, device=device, progress=progress)
    report.costs["benchmark"] = _timed(times) | {"protocol": protocol.to_dict()}
    report.provenance["padding"] = origin


def _measurements(
    shape: dict[str, int], entries: int, *, tasks: int, rounds: int, device: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    def fresh() -> torch.nn.Module:
        return cost.gpt2(**shape).to(device)

    # More of them, as steps differ by as much as a lock costs.
    yield "training step", _timed(cost.training_step(fresh(), tasks=tasks, rounds=3 * rounds))
    yield "update", _timed(cost.update(fresh(), rounds=rounds))
    yield "recall switch", _timed(cost.recall_switch(fresh(), tasks=tasks, rounds=rounds))
    yield "threshold", _timed(cost.threshold(entries, rounds=rounds, device=device))
    yield "import", _timed(cost.importing(rounds=rounds))
    memory, disk = cost.mask_bits(cost.locked_stack(fresh(), tasks=1))
    yield "mask in memory", {"value": memory}
    yield "mask on disk", {"value": disk}
    yield "threshold, memory", {"value": cost.threshold_memory(entries, device=device)}
    extra = cost.training_memory(**shape, tasks=tasks, device=device)
    yield "training, memory", {"value": extra}


def _timed(times: cost.Times) -> dict[str, Any]:
    found = {"value": times.ratio("ours"), "seconds": times.seconds}
    return found | ({"plain": times.ratio("plain")} if "plain" in times.seconds else {})


def measure_growth(
    report: CostReport,
    sizes: Sequence[tuple[int, int]] = ((4, 192), (6, 320), (12, 512), (12, 768), (24, 1024)),
    tasks: Sequence[int] = (1, 2, 5, 10),
    *,
    rounds: int = 5,
    progress: bool = False,
) -> None:
    """Measure a step, an update and a switch over sizes (layers, width) and over tasks.

    Sizes at 5 tasks, and tasks at the second size; the plain implementation is left out.
    """
    origin, records = provenance(), []
    shapes = [(size, 5) for size in sizes] + [(sizes[1], number) for number in tasks]
    for size, number in tqdm(dict.fromkeys(shapes), disable=not progress, unit="model"):
        works = {
            "training step": partial(
                cost.training_step, tasks=number, rounds=3 * rounds, plainly=False
            ),
            "update": partial(cost.update, rounds=rounds, plainly=False),
        }
        # One task is never switched, and more than 1 / SPARSITY find no entries left.
        if 1 < number <= 1 / cost.SPARSITY:
            works["recall switch"] = partial(cost.recall_switch, tasks=number, rounds=rounds)
        for what, work in works.items():
            model = cost.gpt2(*size).to(report.device)
            parameters = sum(p.numel() for p in model.parameters())
            ratio = work(model).ratio("ours")
            records.append(
                {"what": what, "parameters": parameters, "tasks": number, "ratio": ratio}
            )
    report.growth, report.provenance["growth"] = records, origin


def cost_table(report: CostReport) -> pd.DataFrame:
    """A row per cost: what it is compared with, the limit, what was measured, the plain way."""
    import pandas as pd

    lengths = report.costs.get("benchmark", {}).get("protocol", {})
    rows = [
        {
            "cost": name,
            "compared with": compared.format(**lengths),
            "at most": limit,
            "measured": found["value"],
            "plain implementation": found.get("plain"),
            "within": found["value"] <= limit,
        }
        for name, (compared, limit) in LIMITS.items()
        if (found := report.costs.get(name))
    ]
    return pd.DataFrame(rows)
