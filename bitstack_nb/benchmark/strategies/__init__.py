"""The strategies by name: ways to train one backbone on a sequence of tasks."""

from __future__ import annotations

from bitstack_nb.benchmark.strategies.finetune import FineTune, Joint
from bitstack_nb.benchmark.strategies.rivals import Adapters, Elastic, Frozen, Replay, Single
from bitstack_nb.benchmark.strategies.stacked import (
    MagnitudeMask,
    Masked,
    RandomMask,
    Recall,
    Strict,
)

STRATEGIES: dict[str, type[FineTune]] = {
    "finetune": FineTune,
    "bitstack": Masked,
    "bitstack-strict": Strict,
    "random-mask": RandomMask,
    "magnitude-mask": MagnitudeMask,
    "recall": Recall,
    "frozen": Frozen,
    "ewc": Elastic,
    "replay": Replay,
    "lora": Adapters,
    "single": Single,
    "joint": Joint,
}
