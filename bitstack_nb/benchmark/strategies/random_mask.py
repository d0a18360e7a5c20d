"""Random mask: does it matter which weights are locked, or only how many?"""

from __future__ import annotations

import torch

from bitstack_nb.benchmark.locking import Control
from bitstack_nb.importance import random_scores


class RandomMask(Control):
    """Locks as many weights as BitStack, random ones by the protocol's seed."""

    name, label, order, colour = "random-mask", "random mask", 50, "#DE8F05"

    def _scores(self, number: int) -> dict[str, torch.Tensor]:
        return random_scores(self._stack.masks, seed=self.protocol.stage_seed(number))
