"""Locks of a model: packed masks, and the exact values of locked weights, by parameter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from bitstack_nb import bits, maskfile
from bitstack_nb.eligible import places
from bitstack_nb.gpu import kernels_on

if TYPE_CHECKING:
    import pandas

    from bitstack_nb.kernels import Fused


class TaskLocks(NamedTuple):
    """How many weights of one parameter a task chose, and how many of these were new."""

    selected: int
    added: int


class Locks:
    """The locked weights of some parameters: one bit per weight, and the value of each locked one.

    Masks are unpacked one parameter at a time. Bits and values follow a parameter to another
    device. A parameter with locked weights must keep its dtype and its shape, or a RuntimeError is
    raised.

    Args:
        parameters: the parameters whose weights may be locked, by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self._bits: dict[str, torch.Tensor] = {}
        # Locked values, in the order of the flattened parameter.
        self._values: dict[str, torch.Tensor] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._tasks: list[dict[str, TaskLocks]] = []
        self._fused: Fused | None = None
        # Gradients that are still to be zeroed, by the backward pass that made them.
        self._waiting: dict[int, set[str]] = {}
        self.include(parameters)

    def include(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Let the weights of more parameters be locked; those already here stay as they are."""
        for name, parameter in parameters.items():
            if name not in self.parameters:
                self.parameters[name] = parameter
                self._clear(name)
                for task in self._tasks:
                    task[name] = TaskLocks(0, 0)

    def _clear(self, name: str) -> None:
        """Nothing of a parameter is locked, as it is now."""
        p = self.parameters[name]
        size = bits.packed_size(p.shape)
        self._bits[name] = torch.zeros(size, dtype=torch.uint8, device=p.device)
        self._values[name], self._shapes[name] = p.detach().new_empty(0), p.shape

    @property
    def eligible(self) -> int:
        """Number of weights that may be locked."""
        return sum(p.numel() for p in self.parameters.values())

    @property
    def count(self) -> int:
        """Number of locked weights."""
        return sum(len(values) for values in self._values.values())

    @property
    def names(self) -> list[str]:
        """Names of the parameters that have locked weights."""
        return [name for name, values in self._values.items() if len(values)]

    def mask(self, name: str) -> torch.Tensor:
        """A parameter's mask, unpacked on its device: bool, in its shape, True where locked."""
        return bits.unpack(self._followed(name), self.parameters[name].shape)

    def _positions(self, name: str) -> torch.Tensor:
        """Positions of locked weights in the flattened parameter: int64, ascending."""
        return bits.positions(self._followed(name), self.parameters[name].shape)

    def _followed(self, name: str) -> torch.Tensor:
        """A parameter's packed mask, moved to its device with the values; checks its kind."""
        parameter, values, shape = self.parameters[name], self._values[name], self._shapes[name]
        if not len(values) and (parameter.dtype, parameter.shape) != (values.dtype, shape):
            self._clear(name)  # nothing is locked yet, so a cast or a resize loses nothing
            values, shape = self._values[name], parameter.shape
        if parameter.shape != shape:
            raise RuntimeError(
                f"{name} has shape {tuple(parameter.shape)}, and its weights were locked in shape "
                f"{tuple(shape)}: resize embeddings before the first update, or exclude them"
            )
        if parameter.dtype != values.dtype:
            raise RuntimeError(
                f"{name} is {parameter.dtype} but its weights were locked as {values.dtype}: "
                "exact values do not survive a cast; train in the dtype of the locks"
            )
        if self._bits[name].device != parameter.device:
            self._bits[name] = self._bits[name].to(parameter.device)
            self._values[name] = values.to(parameter.device)
            self._fused = None
        return self._bits[name]

    @torch.no_grad()
    def add(self, chosen: Mapping[str, torch.Tensor]) -> None:
        """Lock the weights of a task's bool masks, at the values they have now.

        Everything is computed before anything is replaced, so an error changes nothing.
        """
        new_bits, task = {}, {}
        for name, mask in chosen.items():
            new_bits[name] = bits.pack(mask) | self._followed(name)
        new_values = self._present(new_bits)
        for name, mask in chosen.items():
            # A weight locked before keeps the value it was locked with, though it may have moved.
            old = self.mask(name).masked_select(bits.unpack(new_bits[name], mask.shape))
            new_values[name].masked_scatter_(old, self._values[name])
            added = len(new_values[name]) - len(self._values[name])
            task[name] = TaskLocks(int(mask.sum()), added)
        self._bits, self._values, self._fused = new_bits, new_values, None
        self._tasks.append(task)

    def _present(self, packed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The values that the weights of these packed masks have now."""
        kernels = self._kernels()
        taken = kernels.Fused(self.parameters, packed).take(self.parameters) if kernels else {}
        return {
            name: taken[name]
            if name in taken
            else p.detach().masked_select(bits.unpack(packed[name], p.shape))
            for name, p in self.parameters.items()
        }

    # The guarantee ------------------------------------------------------------------------------

    def zeroed(self, name: str, gradient: torch.Tensor) -> torch.Tensor | None:
        """A parameter's gradient, with zeros where the parameter is locked.

        With ``kernels`` it is None: ``zero_waiting`` zeroes all when the backward pass ends.
        """
        waiting = self._waiting_now(gradient.device)
        # One with such a hook may be stepped by an optimizer before the pass ends.
        if waiting is not None and not self.parameters[name]._post_accumulate_grad_hooks:
            waiting.add(name)
            return None
        # A product of numbers would be wrong: inf * 0 is NaN.
        if gradient.device.type != "cpu" or gradient.requires_grad:
            return gradient.masked_fill(self.mask(name), 0)
        # On the CPU a product of bit patterns is exact, and three times as fast.
        free = bits.unpack(~self._followed(name), gradient.shape)
        return (bits.pattern(gradient) * free).view(gradient.dtype)

    def _waiting_now(self, device: torch.device) -> set[str] | None:
        """Names whose gradients are zeroed when the running backward pass ends; None: at once."""
        kernels = kernels_on(device)
        if kernels is None:
            return None
        backward_pass = torch._C._current_graph_task_id()
        if backward_pass not in self._waiting:
            if not kernels.fills_grad():
                return None
            kernels.after_backward(self.zero_waiting)
            self._waiting[backward_pass] = set()
        return self._waiting[backward_pass]

    @torch.no_grad()
    def zero_waiting(self) -> None:
        """Set the gradients that ``zeroed`` left for later to zero where they are locked."""
        waiting, self._waiting = self._waiting, {}
        names = set().union(*waiting.values())
        gradients = {n: g for n in names if (g := self.parameters[n].grad) is not None}
        fused = self._fused_for(gradients)
        for name in fused.zero(gradients) if fused else gradients:
            gradients[name].masked_fill_(self.mask(name), 0)

    @torch.no_grad()
    def restore(self, stepped: Container[int] | None = None) -> None:
        """Put locked weights back to the values they were locked with.

        Args:
            stepped: ids of the parameters to put back; None means all.
        """
        locked = ((name, self.parameters[name]) for name in self.names)
        held = {n: p for n, p in locked if stepped is None or id(p) in stepped}
        fused = self._fused_for(held)
        for name in fused.put(held) if fused else held:
            parameter = self.parameters[name]
            if parameter.device.type == "cpu":
                bits.put(parameter, self._positions(name), self._values[name])
            else:  # without waiting for how many positions there are
                parameter.masked_scatter_(self.mask(name), self._values[name])

    @torch.no_grad()
    def moved(self) -> dict[str, int]:
        """Numbers of locked weights that differ in any bit from their values, by name; no zeros."""
        held = {name: self.parameters[name] for name in self.names}
        fused = self._fused_for(held)
        counted = fused.compare(held) if fused else {}
        moved = {}
        for name, parameter in held.items():
            if name in counted:
                moved[name] = counted[name]
            else:
                present = parameter.masked_select(self.mask(name))
                moved[name] = bits.differing(present, self._values[name])
        return {name: number for name, number in moved.items() if number}

    def _fused_for(self, names: Collection[str]) -> Fused | None:
        """Kernels that handle the locked weights of all parameters in one launch; None on a CPU."""
        if len(names) < 2:  # one parameter alone needs no tables
            return None
        if self._fused is None and (kernels := self._kernels()):
            packed = {name: self._followed(name) for name in self.names}
            held = {name: self.parameters[name] for name in packed}
            self._fused = kernels.Fused(held, packed, self._values)
        return self._fused

    def _kernels(self) -> ModuleType | None:
        found = (kernels_on(p.device) for p in self.parameters.values())
        return next((kernels for kernels in found if kernels), None)

    # Tables and files ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Copies of parameter shapes and dtypes, packed masks, locked values, locks per task."""
        return {
            "parameters": {
                name: {"shape": list(shape), "dtype": str(self._values[name].dtype)}
                for name, shape in self._shapes.items()
            },
            "bits": {name: packed.clone() for name, packed in self._bits.items()},
            "values": {name: values.clone() for name, values in self._values.items()},
            "tasks": [{n: list(locks) for n, locks in task.items()} for task in self._tasks],
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all locks by those of a state, and put its values into the parameters.

        If its values are None, the parameters' present values are locked. A state of other
        parameters raises a ``maskfile.MaskFileError`` that names every mismatch; nothing has
        changed then.
        """
        maskfile.check_match(state["parameters"], self.parameters)
        device = {name: p.device for name, p in self.parameters.items()}
        new_bits = {name: state["bits"][name].to(device[name]).clone() for name in device}
        if state["values"] is None:
            new_values = self._present(new_bits)
        else:
            new_values = {name: state["values"][name].to(device[name]).clone() for name in device}
        self._bits, self._values, self._fused = new_bits, new_values, None
        self._tasks = [{n: TaskLocks(*v) for n, v in task.items()} for task in state["tasks"]]
        self.restore()

    def layer_table(self) -> pandas.DataFrame:
        """The table that ``BitStack.layer_table`` documents."""
        return layer_table(self.parameters, self._tasks)


def layer_table(
    parameters: Mapping[str, torch.Tensor], tasks: Sequence[Mapping[str, TaskLocks]]
) -> pandas.DataFrame:
    """The table that ``BitStack.layer_table`` documents, from each task's locks by name."""
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("layer_table needs pandas: pip install pandas") from error

    place = places(parameters)
    rows = [
        (*place[name], number, p.numel(), *task[name])
        for number, task in enumerate(tasks, start=1)
        for name, p in parameters.items()
    ]
    columns = ["layer", "module", "task", "eligible", "selected", "added"]
    types = dict.fromkeys(columns, "int64") | {"layer": "Int64", "module": "str"}
    table = pandas.DataFrame(rows, columns=columns).astype(types)
    keys = ["layer", "module", "task"]
    table = table.groupby(keys, as_index=False, dropna=False, sort=False).sum()
    table["locked"] = table.groupby(keys[:2], dropna=False)["added"].cumsum()
    fraction = table["locked"] / table["eligible"]
    # An empty parameter has no weights to lock: 0, not 0 / 0.
    table["lock_fraction"] = fraction.where(table["eligible"] > 0, 0.0)
    return table


class Masks(Mapping[str, torch.Tensor]):
    """Read-only mapping of names to bool tensors, each unpacked when it is looked up."""

    def __init__(self, names: Collection[str], lookup: Callable[[str], torch.Tensor]) -> None:
        self._names, self._lookup = names, lookup

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._lookup(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
