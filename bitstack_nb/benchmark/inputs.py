"""A protocol's data and model: the backbone on the device, and every task's encoded samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import torch
from datasets import Dataset

from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.training import Collate
from bitstack_nb.data.backbones import Backbone, collate, encode, load_backbone
from bitstack_nb.data.loading import TaskData, load_task


@dataclass(frozen=True)
class Inputs:
    """A protocol's data and model, ready to train.

    Attributes:
        tasks: the samples, in training order.
        backbone: its model is on the device.
        train, test: the samples encoded, by task.
        collate: makes a padded batch of encoded rows.
    """

    tasks: list[TaskData]
    backbone: Backbone
    train: list[Dataset]
    test: list[Dataset]
    collate: Collate


# Runs that differ in their strategy have the same samples, which are not read anew for each.
_load_once = lru_cache(maxsize=32)(load_task)


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
    backbone = load_backbone(protocol.model, max_length=protocol.max_length, seed=protocol.seed)
    backbone.model.to(device)
    return Inputs(
        tasks,
        backbone,
        [encode(task.train, backbone) for task in tasks],
        [encode(task.test, backbone) for task in tasks],
        collate(backbone),
    )


def training_batches(rows: Mapping[int, Dataset], protocol: Protocol) -> int:
    """Steps of a stage that trains on these rows together."""
    return ceil(protocol.epochs * ceil(sum(map(len, rows.values())) / protocol.batch_size))


def evaluation_batches(tests: Sequence[Dataset], protocol: Protocol) -> int:
    """Batches, of four times the training batch, that evaluating these test samples takes."""
    return sum(ceil(len(rows) / (4 * protocol.batch_size)) for rows in tests)
