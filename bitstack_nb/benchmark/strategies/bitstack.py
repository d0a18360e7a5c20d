"""BitStack: the published method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from bitstack_nb.benchmark.curves import CurveRecorder
from bitstack_nb.benchmark.locking import Locking
from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.strategy import Batches


class Published(Locking):
    """Locks the weights that matter most for each task, after it."""

    name, label, order, colour = "bitstack", "BitStack", 60, "#D55E00"

    def __init__(self, model: nn.Module, protocol: Protocol) -> None:
        super().__init__(model, protocol)
        self._recorder = CurveRecorder(self._stack.masks)

    def after_stage(self, number: int, loader: Batches) -> None:
        """Lock the weights that matter for the stage's task."""
        self._update(self._stack, loader, observe=self._recorder.add)

    def importance_record(self) -> dict[str, Any]:
        return self._recorder.curves().to_record()

    def save(self, folder: Path) -> None:
        super().save(folder)
        save_file(self._recorder.state_dict(), folder / "curves.safetensors")

    def load(self, folder: Path) -> None:
        super().load(folder)
        self._recorder.load_state_dict(load_file(folder / "curves.safetensors"))
