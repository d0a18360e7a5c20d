"""A task's own weights: their positions in the eligible parameters, and their values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from bitstack_nb.bits import put, take
from bitstack_nb.locks import Masks, TaskLocks


class Own(NamedTuple):
    """A task's own weights.

    Attributes:
        counts: how many there are in each parameter of the layout.
        positions: int32, in each flattened parameter ascending, one parameter after the other.
        values: in the same order, a tensor per dtype of the layout.
    """

    counts: list[int]
    positions: torch.Tensor
    values: list[torch.Tensor]


class Piece(NamedTuple):
    """The own weights of one parameter, on its device."""

    name: str
    parameter: nn.Parameter
    where: torch.Tensor
    values: torch.Tensor


class Layout:
    """The eligible parameters in a fixed order, those of one dtype side by side.

    Args:
        parameters: by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.dtypes = list(dict.fromkeys(p.dtype for p in parameters.values()))
        places = [(name, p, self.dtypes.index(p.dtype)) for name, p in parameters.items()]
        self._places = sorted(places, key=lambda place: place[2])
        self.parameters = {name: p for name, p, _ in self._places}
        self.sizes = [p.numel() for p in self.parameters.values()]
        self.size = sum(self.sizes)

    def own(self, where: Sequence[torch.Tensor]) -> Own:
        """The weights at these positions of each parameter, with the values they have now."""
        positions = torch.cat([at.to(self._device(), torch.int32) for at in where])
        own = Own([len(at) for at in where], positions, [])
        return own._replace(values=self.read(own))

    def read(self, own: Own) -> list[torch.Tensor]:
        """The values that the model has at these positions now, a tensor per dtype."""
        sizes, device = self._by_dtype(own.counts), own.positions.device
        values = [
            torch.empty(sum(size), dtype=dtype, device=device)
            for dtype, size in zip(self.dtypes, sizes, strict=True)
        ]
        parts = [part for v, size in zip(values, sizes, strict=True) for part in v.split(size)]
        positions = own.positions.split(own.counts)
        for (_, parameter, _), where, part in zip(self._places, positions, parts, strict=True):
            part.copy_(take(parameter, where.to(parameter.device)))
        return values

    def pieces(self, own: Own) -> Iterator[Piece]:
        """The own weights parameter by parameter, without those that have none."""
        device = self._device()  # moved at once, not piece by piece
        positions = own.positions.to(device).split(own.counts)
        flat = [v.detach().to(device, d) for v, d in zip(own.values, self.dtypes, strict=True)]
        sizes = self._by_dtype(own.counts)
        values = [part for v, size in zip(flat, sizes, strict=True) for part in v.split(size)]
        for (name, parameter, _), where, value in zip(self._places, positions, values, strict=True):
            if value.numel():
                if (at := parameter.device) != device:  # the model lies on several
                    where, value = where.to(at), value.to(at)
                yield Piece(name, parameter, where, value)

    def _device(self) -> torch.device:
        return self._places[0][1].device

    def _by_dtype(self, counts: Sequence[int]) -> list[list[int]]:
        parted: list[list[int]] = [[] for _ in self.dtypes]
        for (*_, dtype), count in zip(self._places, counts, strict=True):
            parted[dtype].append(count)
        return parted

    def write(self, own: Own) -> None:
        """Put own weights into the model."""
        for piece in self.pieces(own):
            put(piece.parameter, piece.where, piece.values)

    def here(self, own: Own) -> Own:
        """Own weights on the device of the model, where they are not there yet."""
        device = self._device()
        if own.positions.device == device:
            return own
        values = [v if v.device == device else v.to(device) for v in own.values]
        return own._replace(positions=own.positions.to(device), values=values)

    def masks(self, own: Own) -> Mapping[str, torch.Tensor]:
        """By parameter a bool tensor of its shape, True at own weights; made on look-up."""
        where = dict(zip(self.parameters, own.positions.split(own.counts), strict=True))

        def mask(name: str) -> torch.Tensor:
            made = torch.zeros_like(self.parameters[name], dtype=torch.bool, requires_grad=False)
            put(made, where[name].to(made.device), made.new_ones(len(where[name])))
            return made

        return Masks(self.parameters, mask)

    def counted(self, tasks: Sequence[Own]) -> list[dict[str, TaskLocks]]:
        """Own weights by task and parameter, and how many of them are no earlier task's."""
        counted: list[dict[str, TaskLocks]] = [{} for _ in tasks]
        split = [own.positions.split(own.counts) for own in tasks]
        for at, (name, parameter) in enumerate(self.parameters.items()):
            taken = torch.zeros(parameter.numel(), dtype=torch.bool, device=parameter.device)
            for task, positions in zip(counted, split, strict=True):
                own = positions[at].to(taken.device, torch.int64)
                task[name] = TaskLocks(len(own), len(own) - int(taken[own].sum()))
                taken[own] = True
        return counted
