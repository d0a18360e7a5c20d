"""Rank 8 of the difference: separate models of low rank, compressed after training."""

from __future__ import annotations

import torch

from bitstack_nb.benchmark.strategies.bitdelta import Compressed

RANK = 8


class DeltaRank8(Compressed):
    """The best approximation of each matrix's difference of rank 8, by its singular values."""

    name, label, order, colour = "delta-rank8", "separate models, rank 8", 104, "#B15928"

    def matrix(self, difference: torch.Tensor) -> torch.Tensor:
        if not difference.isfinite().all():
            return difference  # which is refused
        left, sizes, right = torch.linalg.svd(difference, full_matrices=False)
        root = sizes[:RANK].sqrt()
        one, other = left[:, :RANK] * root, root[:, None] * right[:RANK]
        return one.half().float() @ other.half().float()

    def matrix_bytes(self, shape: torch.Size) -> int:
        return 2 * min(RANK, *shape) * sum(shape)  # two factors in float16
