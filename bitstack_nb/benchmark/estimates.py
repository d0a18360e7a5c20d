"""How long runs will take here: a few batches timed, times what the protocols ask for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn

from bitstack_nb.benchmark.drift import groups
from bitstack_nb.benchmark.inputs import Inputs, load_inputs
from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.runner import finished_stages
from bitstack_nb.benchmark.strategies import STRATEGIES
from bitstack_nb.benchmark.training import find_device, half_precision
from bitstack_nb.results.plain_json import canonical
from bitstack_nb.rng import undisturbed_rng

# What decides how long a batch takes, and how many there are.
_SHAPE = ("model", "data", "max_length", "batch_size", "train_size", "test_size", "evaluate_on")


def estimate(
    protocols: Sequence[Protocol],
    *,
    output: str | os.PathLike[str] = "results/runs",
    device: str = "auto",
) -> float:
    """Seconds that :func:`bitstack_nb.run` of these protocols will take here, roughly.

    Finished runs cost nothing, broken ones only what is left of them. For each model and shape of
    batch a few batches are timed, of the first seed, in the precision of training. Reading that
    seed's data and the model is timed too and counted for every other seed; they are read when the
    estimate is there.

    Raises:
        ValueError: as ``run`` does.
    """
    found = find_device(device)
    alike: dict[str, list[tuple[Protocol, list[list[int]]]]] = {}
    for protocol in protocols:
        if stages := _stages_left(protocol, Path(output)):
            shape = canonical([getattr(protocol, name) for name in _SHAPE])
            alike.setdefault(shape, []).append((protocol, stages))
    return sum(_total(left, found) for left in alike.values())


def _total(left: list[tuple[Protocol, list[list[int]]]], device: torch.device) -> float:
    """Seconds of the stages left of protocols that share a model and the shape of its batches."""
    start = _now(device)
    inputs = load_inputs(left[0][0], device)
    total = (_now(device) - start) * (len({protocol.seed for protocol, _ in left}) - 1)
    with undisturbed_rng(device):
        seconds = _seconds(inputs, left[0][0], device)
    for protocol, stages in left:
        strategy = STRATEGIES[protocol.strategy]
        for stage in stages:
            batches = (
                {"fit": protocol.head_steps or 0}
                | strategy.further_batches(protocol)
                | {
                    "step": inputs.training_batches(
                        strategy.rows(stage, inputs.train, protocol), protocol
                    ),
                    "evaluate": inputs.evaluation_batches(stage[-1], protocol),
                }
            )
            total += sum(seconds[what] * count for what, count in batches.items())
        if strategy.drifts:
            drift = len(groups(inputs.backbone.model, {})) * inputs.evaluation_batches(0, protocol)
            total += seconds["evaluate"] * drift
    return total


def _stages_left(protocol: Protocol, output: Path) -> list[list[int]]:
    stages = STRATEGIES[protocol.strategy].stages(len(protocol.tasks))
    return stages[finished_stages(protocol, output) :]


def _seconds(inputs: Inputs, protocol: Protocol, device: torch.device) -> dict[str, float]:
    """Seconds of one training step, of one evaluation batch, and of ``further_batches``."""
    model, size = inputs.backbone.model, protocol.batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    half = half_precision(device)
    autocast = {"device_type": device.type, "enabled": half is not None}
    if half is not None:
        autocast["dtype"] = {"bf16": torch.bfloat16, "fp16": torch.float16}[half]

    def step(batch: dict[str, torch.Tensor]) -> None:
        with torch.autocast(**autocast):
            loss = _loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def forward(batch: dict[str, torch.Tensor]) -> None:
        with torch.no_grad(), torch.autocast(**autocast):
            _loss(model, batch)

    def measure(batch: dict[str, torch.Tensor]) -> None:
        torch.autograd.grad(_loss(model, batch), list(model.parameters()), allow_unused=True)

    training = _typical_batches(inputs, inputs.train, size, device)
    evaluation = _typical_batches(inputs, inputs.test, 4 * size, device)
    single = _typical_batches(inputs, inputs.train, 1, device)
    return {
        "step": _timed(step, training),
        "evaluate": _timed(forward, evaluation),
        "measure": _timed(measure, training),
        "single": _timed(measure, single),
        "fit": _timed(forward, training),
    }


def _loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    # The labels are another task's than the head's: any class costs the same time.
    labels = batch["labels"] % model.config.num_labels
    return model(**{**batch, "labels": labels}).loss


def _typical_batches(
    inputs: Inputs, data: list[Dataset], size: int, device: torch.device
) -> list[dict[str, torch.Tensor]]:
    """A batch of every task, of the texts of median length."""
    batches = []
    for rows in data:
        middle = sorted(range(len(rows)), key=rows["length"][:].__getitem__)
        start = max(0, (len(middle) - size) // 2)
        batch = inputs.collate(rows.select(middle[start : start + size]).to_list())
        batches.append({name: tensor.to(device) for name, tensor in batch.items()})
    return batches


def _timed(
    work: Callable[[dict[str, torch.Tensor]], None], batches: list[dict[str, torch.Tensor]]
) -> float:
    """Mean seconds of a batch; once before the clock starts, which warms up."""
    device = batches[0]["labels"].device
    work(batches[0])
    start = _now(device)
    for batch in batches:
        work(batch)
    return (_now(device) - start) / len(batches)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
