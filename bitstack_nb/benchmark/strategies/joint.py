"""Joint training: all tasks at once, which no method for sequences is given."""

from __future__ import annotations

from bitstack_nb.benchmark.strategies.replay import rows_bytes
from bitstack_nb.benchmark.strategy import Data, Strategy


class Joint(Strategy):
    """One stage of all tasks, each row of a batch under its own task's head: an upper bound."""

    name, label, order, colour = "joint", "joint training", 110, "#6B6B6B"
    settings = ()
    drifts = False

    @staticmethod
    def stages(n_tasks: int) -> list[list[int]]:
        return [list(range(n_tasks))]

    def storage(self, data: Data) -> int:
        return rows_bytes(data)  # all texts, to train again with a further task's
