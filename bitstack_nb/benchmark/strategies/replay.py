"""Replay: some examples of each earlier task are trained on again. It keeps data; others do not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.strategy import Data, Strategy

if TYPE_CHECKING:
    from datasets import Dataset


class Replay(Strategy):
    """Mixes ``replay_size`` rows of each earlier task into a task's own."""

    name, label, order, colour = "replay", "replay", 40, "#CA9161"
    settings = ("replay_size", "head_steps")

    @staticmethod
    def rows(stage: list[int], data: Data, protocol: Protocol) -> dict[int, Dataset]:
        """The stage's own rows, and the same few of each earlier task at every stage."""
        kept = {task: kept_rows(data[task], task, protocol) for task in range(stage[0])}
        return Strategy.rows(stage, data, protocol) | kept

    def storage(self, data: Data) -> int:
        return rows_bytes(kept_rows(rows, task, self.protocol) for task, rows in enumerate(data))


def rows_bytes(data: Iterable[Dataset]) -> int:
    """Bytes of rows that are kept: four for each token and each label."""
    return 4 * sum(sum(rows["length"]) + len(rows) for rows in data)


def kept_rows(rows: Dataset, task: int, protocol: Protocol) -> Dataset:
    """Random ``replay_size`` rows of a task, by the protocol's seed; all where there are fewer."""
    generator = torch.Generator().manual_seed(protocol.stage_seed(task))
    kept = torch.randperm(len(rows), generator=generator)[: protocol.replay_size]
    return rows.select(sorted(kept.tolist()))
