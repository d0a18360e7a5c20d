"""Frozen after task 1: the first task is fine-tuned, later ones train a head alone."""

from __future__ import annotations

from bitstack_nb.benchmark.strategy import Batches, Strategy


class Frozen(Strategy):
    """The backbone stays as the first task left it."""

    name, label, order, colour = "frozen", "frozen after task 1", 15, "#B8B8B8"
    drifts = False

    def before_stage(self, number: int, loader: Batches) -> None:
        if number:
            self.model.base_model.requires_grad_(False)
