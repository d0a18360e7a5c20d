"""A protocol's data and model: the backbone on the device, and every task's encoded samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from glob import escape
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.strategies import all_strategies
from bitstack_nb.data.backbones import Backbone, encode, load_backbone
from bitstack_nb.data.loading import TaskData, load_task
from bitstack_nb.files import sha256
from bitstack_nb.pretrained import TINY_FOLDER
from bitstack_nb.settings import TINY

# Runs that differ in their strategy have the same samples, which are not read anew for each.
_load_once = lru_cache(maxsize=32)(load_task)


@dataclass(frozen=True)
class Inputs:
    """A protocol's samples in training order, raw and encoded, and its backbone on the device."""

    tasks: list[TaskData]
    backbone: Backbone
    train: list[Dataset]
    test: list[Dataset]


def load_inputs(protocol: Protocol, device: torch.device) -> Inputs:
    """Load and encode every task's samples, and load the backbone.

    Raises:
        ValueError: a dataset or the model is out of reach or does not fit the protocol.
    """
    load = _load_once if protocol.data in ("hub", "embedded") else load_task  # folders change
    tasks = [
        load(
            task,
            protocol.data,
            train_size=protocol.train_size,
            test_size=protocol.test_size,
            seed=protocol.seed,
            sampling=protocol.sampling,
            evaluate_on=protocol.evaluate_on,
        )
        for task in protocol.tasks
    ]
    backbone = load_backbone(
        protocol.model,
        max_length=protocol.max_length,
        seed=protocol.seed,
        pooling=all_strategies()[protocol.strategy].pooling or protocol.pooling,
    )
    backbone.model.to(device)
    train = [encode(task.train, backbone) for task in tasks]
    test = [encode(task.test, backbone) for task in tasks]
    return Inputs(tasks, backbone, train, test)


def changed_file(
    protocol: Protocol, origin: Mapping[str, Any], *, digest: Callable[[Path], str] = sha256
) -> Path | None:
    """A file of data or weights that is here with other bytes than a result was made with.

    Args:
        protocol: names the folders; files that are not there are passed over.
        origin: the result's provenance.
        digest: gives the SHA-256 of a file.
    """
    backbone = TINY_FOLDER if protocol.model == TINY else Path(protocol.model)
    folders = [(backbone, origin.get("model", {}))]
    for task in protocol.tasks:
        folders.append(
            (Path(protocol.data, task.folder), origin.get("data", {}).get(task.name, {}))
        )
    for folder, record in folders:
        for name, recorded in record.get("sha256", {}).items():
            for file in folder.expanduser().rglob(escape(name)):
                if digest(file) != recorded:
                    return file
    return None
