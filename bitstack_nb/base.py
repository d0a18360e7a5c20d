"""The base of exact recall: all of a model but its head, which no task may move."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from bitstack_nb import eligible
from bitstack_nb.bits import digest, put
from bitstack_nb.maskfile import MaskFileError
from bitstack_nb.own import Piece


class Base:
    """Digests of the base, the places of its tensors in the model, and copies of its buffers.

    Weights are not copied: what a task covers, it keeps.

    Args:
        model: already unwrapped; it is the base now.
        parameters: all but the head's, by name.
        head: the names of the modules and parameters that make up its head.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], head: Iterable[str]
    ) -> None:
        self._model = model
        self.parameters = dict(parameters)
        self._kinds = {name: (p.dtype, p.shape) for name, p in parameters.items()}
        buffers = eligible.backbone_buffers(model)
        named = {id(buffer): name for name, buffer in buffers.items()}
        self._buffer_slots = {
            named[id(buffer)]: (module._buffers, own)
            for module in model.modules()
            for own, buffer in module._buffers.items()
            if id(buffer) in named
        }
        self._buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        # Every place where a module or parameter stands, to see that it still stands there.
        self._slots = [
            (table, name, value)
            for path, module in model.named_modules()
            for table in (module._modules, module._parameters)
            for name, value in table.items()
            if value is not None
            and eligible.canonical(f"{path}.{name}" if path else name) not in head
        ]
        self.digests = {name: digest(tensor) for name, tensor in self._tensors().items()}

    @property
    def digest(self) -> str:
        """One digest of all of it."""
        return hashlib.sha256(json.dumps(self.digests, sort_keys=True).encode()).hexdigest()

    def _tensors(self) -> dict[str, torch.Tensor]:
        buffers = {name: table[own] for name, (table, own) in self._buffer_slots.items()}
        return {**self.parameters, **buffers}

    def check_present(self) -> None:
        """Raise a RuntimeError if the model has other parameters now, or was cast."""
        if any(table.get(name) is not value for table, name, value in self._slots):
            present = {id(p) for p in self._model.parameters()}
            gone = [name for name, p in self.parameters.items() if id(p) not in present]
            if gone:
                raise RuntimeError(
                    f"the model no longer holds {', '.join(gone[:3])}{' ...' if gone[3:] else ''}: "
                    "a module was replaced. Load the tasks from their file onto the model as it "
                    "is to be, with the base in it"
                )
        for name, parameter in self.parameters.items():
            dtype, shape = self._kinds[name]
            if parameter.dtype != dtype:
                raise RuntimeError(
                    f"{name} is {parameter.dtype} but was {dtype}: exact values do "
                    "not survive a cast; cast the base, then make the ExactRecall"
                )
            if parameter.shape != shape:
                raise RuntimeError(
                    f"{name} has shape {tuple(parameter.shape)} but had {tuple(shape)}: tasks "
                    "belong to the base as it was; resize the base, then make the ExactRecall"
                )

    def check_same(self, digests: Mapping[str, str]) -> None:
        """Raise a MaskFileError that names the tensors whose digests are others."""
        names = self.digests.keys() | digests.keys()
        wrong = sorted(n for n in names if digests.get(n) != self.digests.get(n))
        if wrong:
            more = f" and {len(wrong) - 3} more" if wrong[3:] else ""
            raise MaskFileError(
                f"the tasks were trained on another base: {', '.join(wrong[:3])}{more} of "
                f"{len(names)} tensors differ. Load the backbone that they were trained on"
            )

    @torch.no_grad()
    def put_back_buffers(self) -> None:
        """Undo what forward passes did to running statistics."""
        for name, (table, own) in self._buffer_slots.items():
            table[own].copy_(self._buffers[name])

    @torch.no_grad()
    def moved(self, covered: Mapping[str, Piece]) -> list[str]:
        """The tensors of the base that are not what they were.

        Args:
            covered: what the base has under the own weights that are in the model, by name.
        """
        moved = []
        for name, tensor in self._tensors().items():
            if name in covered:
                tensor = tensor.detach().clone()
                put(tensor, covered[name].where, covered[name].values)
            if digest(tensor) != self.digests[name]:
                moved.append(name)
        return moved
