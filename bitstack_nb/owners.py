"""Exact recall's bookkeeping: which task owns which entry, what it holds, which task is shown.

Every eligible entry has one owner or none, so the tasks' values lie side by side in one set of
weights, and the model of a task is the base with the task's own entries put in. Owners are kept as
numbers in bit planes (``bits.owned``): T tasks take ceil(log2(T + 1)) bits per entry, and that no
two tasks own one entry needs no check. ``recall`` decides what is chosen and when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bitstack_nb import bits
from bitstack_nb import maskfile as storage
from bitstack_nb.locks import TaskLocks, layer_table

if TYPE_CHECKING:
    import pandas


class Owners:
    """Owned entries of some parameters, and the base that everything else stays at.

    Tasks are counted from 0; None is the base. One task at a time is *open*: its entries may move
    until it is closed, and it is the last. All follow a model that moves to another device; a cast
    is refused. A copy of the base is kept, because weights that may not move can only be put back
    from one; inference does without (:meth:`release_base`).

    Args:
        parameters: what tasks may own, by name: the eligible ones.
        fixed: the parameters that no task may move, by name.
        buffers: gives the buffers that no task may move, by name; asked each time, because a move
            to another device replaces them.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        fixed: Mapping[str, nn.Parameter],
        buffers: Callable[[], Mapping[str, torch.Tensor]],
    ) -> None:
        self.parameters = dict(parameters)
        self.held = {**parameters, **fixed}
        self.eligible = sum(p.numel() for p in self.parameters.values())
        self.shown: int | None = None
        self._buffers, self._buffer_names = buffers, set(buffers())
        self._planes = {
            name: torch.zeros(0, bits.packed_size(p.shape), dtype=torch.uint8, device=p.device)
            for name, p in self.parameters.items()
        }
        # Per closed task; each in the order of the flattened parameter.
        self._values: list[dict[str, torch.Tensor]] = []
        # The open task's positions, and its values while another task is shown.
        self._open: dict[str, torch.Tensor] | None = None
        self._aside: dict[str, torch.Tensor] = {}
        # What the base has in the place of the shown task's entries.
        self._covered: dict[str, torch.Tensor] = {}
        self._base: dict[str, torch.Tensor] | None = None
        self._digests: dict[str, str] | None = None
        self._kept_as = {n: (t.dtype, t.device) for n, t in self._everything().items()}
        self.keep_base()

    # Who owns what ------------------------------------------------------------------------------

    @property
    def closed(self) -> int:
        """Closed tasks."""
        return len(self._values)

    @property
    def is_open(self) -> bool:
        """Whether the task behind the closed ones is open."""
        return self._open is not None

    @property
    def _shows_open(self) -> bool:
        return self.is_open and self.shown == self.closed

    @property
    def count(self) -> int:
        """Owned entries in all."""
        tasks = [*self._values, self._open or {}]
        return sum(len(own) for task in tasks for own in task.values())

    def mask(self, name: str) -> torch.Tensor:
        """The entries of a parameter that any task owns: bool, of its shape and on its device."""
        self._follow({name: self.parameters[name]})
        mask = bits.unpack(bits.owned_by_any(self._planes[name]), self.parameters[name].shape)
        if self._open is not None:
            bits.put(mask, self._open[name], True)
        return mask

    def own_mask(self, task: int, name: str) -> torch.Tensor:
        """A task's own weights of a parameter: bool, of its shape and on its device."""
        self._follow({name: self.parameters[name]})
        mask = torch.zeros_like(self.parameters[name], dtype=torch.bool, requires_grad=False)
        bits.put(mask, self._positions(task, name), True)
        return mask

    def _positions(self, task: int, name: str) -> torch.Tensor:
        """Where a task's entries lie in the flattened parameter, ascending: int64."""
        if task == self.closed:
            return self._open[name]
        own = bits.owned(self._planes[name], task)
        return bits.positions(own, self.parameters[name].shape)

    def _entries(self, task: int | None) -> dict[str, torch.Tensor]:
        return {} if task is None else {n: self._positions(task, n) for n in self.parameters}

    # One task at a time -------------------------------------------------------------------------

    @torch.no_grad()
    def show(self, task: int | None) -> None:
        """Put a task's entries into the model, in the place of those of the one shown now.

        And the base's buffers: a forward pass may have moved them without an optimizer's step.
        """
        self._put_back_buffers()
        if task == self.shown:
            return
        self._follow(self.parameters)
        # All is found before anything is written.
        former, coming = self._entries(self.shown), self._entries(task)
        covered, leaving, own = {}, {}, {}
        for name, parameter in self.parameters.items():
            if self._shows_open:
                leaving[name] = bits.take(parameter, former[name])
            elif self.shown is not None:
                leaving[name] = self._values[self.shown][name]
            if task is not None:
                base = parameter if self._base is None else self._base[name]
                covered[name] = bits.take(base, coming[name])
                own[name] = (self._aside if task == self.closed else self._values[task])[name]
        try:
            self._write((former, self._covered), (coming, own))
        except BaseException:  # a notebook's interrupt too
            self._write((coming, covered), (former, leaving))
            raise
        self._aside = {} if task == self.closed else leaving if self._shows_open else self._aside
        self._covered = covered
        self.shown = task
        # Inside autocast the next forward would read the casts of the weights that were there.
        torch.clear_autocast_cache()

    def _put_back_buffers(self) -> None:
        if self._base is None or not self._buffer_names:
            return
        buffers = self._kept_buffers()
        self._follow(buffers)
        for name, buffer in buffers.items():
            if bits.differing(buffer, self._base[name]):  # or an eval-mode backward would refuse
                buffer.copy_(self._base[name])

    def _write(self, *parts: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]) -> None:
        """Put values into the parameters at positions, each by name, one part after the other."""
        for where, values in parts:
            for name, positions in where.items():
                bits.put(self.parameters[name], positions, values[name])

    @contextmanager
    def shown_as_before_on_error(self) -> Iterator[None]:
        """When the body raises, show the task that was shown before it."""
        before = self.shown
        try:
            yield
        except BaseException:
            self.show(before)
            raise

    @torch.no_grad()
    def open(self, chosen: Mapping[str, torch.Tensor]) -> None:
        """Open a task that owns these entries (bool masks). The base must be shown."""
        where = {name: mask.flatten().nonzero().flatten() for name, mask in chosen.items()}
        self._covered = {n: bits.take(p, where[n]) for n, p in self.parameters.items()}
        self._open, self.shown = where, self.closed

    @torch.no_grad()
    def close(self) -> None:
        """The open task's entries keep the values they have now. It must be shown."""
        planes, values = {}, {}
        for name, where in self._open.items():
            parameter = self.parameters[name]
            values[name] = bits.take(parameter, where)
            mask = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
            bits.put(mask, where, True)
            planes[name] = bits.with_owner(self._planes[name], bits.pack(mask), self.closed)
        self._planes, self._open = planes, None
        self._values.append(values)

    # The guarantee ------------------------------------------------------------------------------

    @torch.no_grad()
    def keep_base(self) -> None:
        """Copy the base, where there is no copy yet, for putting back what may not move.

        Raises a ``storage.MaskFileError`` where it is not the one of the state taken over.
        """
        if self._base is None:
            shown = self.shown
            with self.shown_as_before_on_error():
                self.show(None)
                if self._digests is not None:
                    storage.check_base(self._digests, _digests(self._everything()))
            self._base = self._copied()
            self.show(shown)

    def release_base(self) -> None:
        """Drop the copy; ``restore`` and ``moved`` know the shown task's own entries only then."""
        self._base = None

    def movable_part(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of a parameter, zero except where the open task is shown and may move."""
        part = torch.zeros_like(gradient)
        if self._shows_open and name in self._open:
            self._follow({name: self.parameters[name]})
            bits.put(part, self._open[name], bits.take(gradient, self._open[name]))
        return part

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back to the model of the task shown, but for the open task's entries."""
        for name, tensor in self._followed():
            own = self._own(name, tensor)
            try:
                if self._base is not None:
                    tensor.copy_(self._base[name])
                if own is not None:
                    bits.put(tensor, *own)
            except BaseException:  # an interrupt: nothing else has the open task's values
                if own is not None:
                    bits.put(tensor, *own)
                raise

    @torch.no_grad()
    def moved(self) -> dict[str, int]:
        """Tensors with entries that differ in any bit from what they should be: how many."""
        moved = {}
        for name, tensor in self._followed():
            expected = (tensor if self._base is None else self._base[name]).detach().clone()
            own = self._own(name, tensor)
            if own is not None:
                bits.put(expected, *own)
            moved[name] = bits.differing(tensor, expected)
        return {name: number for name, number in moved.items() if number}

    def _own(self, name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Where the shown task's entries are, and their values: the open one's as they stand."""
        if self.shown is None or name not in self.parameters:
            return None
        where = self._positions(self.shown, name)
        if self._shows_open:
            return where, bits.take(tensor, where)
        return where, self._values[self.shown][name]

    def _followed(self) -> Iterable[tuple[str, torch.Tensor]]:
        everything = self._everything()
        self._follow(everything)
        return everything.items()

    def _everything(self) -> dict[str, torch.Tensor]:
        """All that has a value in the base: parameters and buffers, those of heads apart."""
        return {**self.held, **self._kept_buffers()}

    def _copied(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._everything().items()}

    def _kept_buffers(self) -> dict[str, torch.Tensor]:
        return {n: b for n, b in self._buffers().items() if n in self._buffer_names}

    def _follow(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go to the devices of these of the model's tensors; refuse another dtype."""
        stores = [self._planes, *self._values, self._aside, self._covered]
        stores += [self._open or {}, self._base or {}]
        for name, tensor in tensors.items():
            if (tensor.dtype, tensor.device) == self._kept_as[name]:
                continue
            if tensor.dtype != self._kept_as[name][0]:
                raise RuntimeError(
                    f"{name} is {tensor.dtype} but was {self._kept_as[name][0]} when the stack was "
                    "made: exact values do not survive a cast; cast the base, then make the stack"
                )
            for store in stores:
                if name in store:
                    store[name] = store[name].to(tensor.device)
            self._kept_as[name] = tensor.dtype, tensor.device

    # What there is, and keeping it --------------------------------------------------------------

    def layer_table(self) -> pandas.DataFrame:
        """The table that ``BitStack.layer_table`` documents."""
        tasks = [*self._values, *([] if self._open is None else [self._open])]
        counts = [{n: TaskLocks(len(own), len(own)) for n, own in t.items()} for t in tasks]
        return layer_table(self.parameters, counts)

    def state_dict(self) -> dict[str, Any]:
        """Parameter shapes and dtypes, planes, values by task, digests of the base; all copied.

        Raises a RuntimeError while a task is open: its training could not be resumed from it.
        """
        self._check_closed("its training could not be resumed from what is saved now")
        if self._digests is None:
            self._digests = _digests(self._base)
        return {
            "parameters": {
                name: {"shape": list(p.shape), "dtype": str(self._kept_as[name][0])}
                for name, p in self.parameters.items()
            },
            "owners": {name: planes.clone() for name, planes in self._planes.items()},
            "values": [{n: own.clone() for n, own in task.items()} for task in self._values],
            "base": dict(self._digests),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state and show its last task; the model must hold the state's base.

        A state of other parameters or of another base raises a ``storage.MaskFileError`` that
        names the differences; nothing has changed then.
        """
        self._check_closed("a state would take its place")
        storage.check_match(state["parameters"], self.parameters)
        with self.shown_as_before_on_error():
            self.show(None)
            storage.check_base(state["base"], _digests(self._everything()))
        device = {name: p.device for name, p in self.parameters.items()}
        self._planes = {n: planes.to(device[n]).clone() for n, planes in state["owners"].items()}
        self._values = [
            {n: own.to(device[n]).clone() for n, own in task.items()} for task in state["values"]
        ]
        self._digests = dict(state["base"])
        if self._base is not None:
            self._base = self._copied()
        self.show(self.closed - 1 if self.closed else None)

    def _check_closed(self, why: str) -> None:
        if self.is_open:
            raise RuntimeError(f"task {self.closed} is still open, and {why}: close() it first")


def _digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    return {name: bits.digest(tensor) for name, tensor in tensors.items()}
