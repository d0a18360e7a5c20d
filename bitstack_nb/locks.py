"""What is locked: packed masks, and the exact values of locked weights, parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from bitstack_nb import bits, maskfile
from bitstack_nb.eligible import place

if TYPE_CHECKING:
    import pandas


class TaskLocks(NamedTuple):
    """How many weights of one parameter a task chose, and how many of these were new."""

    selected: int
    added: int


class Locks:
    """The locked weights of some parameters: one bit per weight, and the value of each locked one.

    Masks are unpacked one parameter at a time. Bits and values follow a parameter to another
    device; a cast of a parameter with locked weights is refused.

    Args:
        parameters: what may be locked, by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.eligible = sum(p.numel() for p in self.parameters.values())
        self._bits = {
            name: torch.zeros(bits.packed_size(p.shape), dtype=torch.uint8, device=p.device)
            for name, p in self.parameters.items()
        }
        # In the order of the flattened parameter.
        self._values = {name: p.detach().new_empty(0) for name, p in self.parameters.items()}
        self._tasks: list[dict[str, TaskLocks]] = []

    @property
    def count(self) -> int:
        """Locked weights in all."""
        return sum(len(values) for values in self._values.values())

    @property
    def names(self) -> list[str]:
        """The names of parameters with locked weights."""
        return [name for name, values in self._values.items() if len(values)]

    def mask(self, name: str) -> torch.Tensor:
        """A parameter's mask, unpacked on its device: bool, of its shape, True where locked."""
        return bits.unpack(self._followed(name), self.parameters[name].shape)

    def _positions(self, name: str) -> torch.Tensor:
        """Where a parameter is locked: int64 positions in it flattened, ascending."""
        return bits.positions(self._followed(name), self.parameters[name].shape)

    def _followed(self, name: str) -> torch.Tensor:
        """A parameter's packed mask, moved to its device with the values; refuses a cast."""
        parameter, values = self.parameters[name], self._values[name]
        if not len(values):  # nothing locked yet: a cast of the model loses nothing
            values = self._values[name] = parameter.detach().new_empty(0)
        if parameter.dtype != values.dtype:
            raise RuntimeError(
                f"{name} is {parameter.dtype} but its weights were locked as {values.dtype}: "
                "exact values do not survive a cast; train in the dtype of the locks"
            )
        if self._bits[name].device != parameter.device:
            self._bits[name] = self._bits[name].to(parameter.device)
            self._values[name] = values.to(parameter.device)
        return self._bits[name]

    @torch.no_grad()
    def add(self, chosen: Mapping[str, torch.Tensor]) -> None:
        """Lock a task's weights, given as bool masks, at the values they have now.

        All that is new is computed before anything old is replaced.
        """
        new_bits, new_values, task = {}, {}, {}
        for name, mask in chosen.items():
            old = self.mask(name)
            union = mask | old
            # A weight locked before keeps the value it was locked with, though it may have moved.
            current = self.parameters[name].detach().clone()
            current.masked_scatter_(old, self._values[name])
            new_bits[name] = bits.pack(union)
            new_values[name] = current.masked_select(union)
            added = len(new_values[name]) - len(self._values[name])
            task[name] = TaskLocks(int(mask.sum()), added)
        self._bits, self._values = new_bits, new_values
        self._tasks.append(task)

    def zeroed(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of a parameter, zero where it is locked."""
        # Not a product of numbers: inf * 0 is NaN.
        if gradient.device.type != "cpu" or gradient.requires_grad:
            return gradient.masked_fill(self.mask(name), 0)
        # A product of bit patterns is exact, and there three times as fast.
        free = bits.unpack(~self._followed(name), gradient.shape)
        return (bits.pattern(gradient) * free).view(gradient.dtype)

    @torch.no_grad()
    def restore(self) -> None:
        """Put every locked weight back to the value it was locked with."""
        for name in self.names:
            parameter = self.parameters[name]
            if parameter.device.type == "cpu":
                bits.put(parameter, self._positions(name), self._values[name])
            else:  # without waiting for how many positions there are
                parameter.masked_scatter_(self.mask(name), self._values[name])

    @torch.no_grad()
    def moved(self) -> dict[str, int]:
        """How many locked weights differ in any bit from their values, by name; 0 left out."""
        moved = {}
        for name in self.names:
            present = self.parameters[name].masked_select(self.mask(name))
            moved[name] = bits.differing(present, self._values[name])
        return {name: number for name, number in moved.items() if number}

    def state_dict(self) -> dict[str, Any]:
        """Parameter shapes and dtypes, packed masks, locked values, locks per task; all copied."""
        return {
            "parameters": {
                name: {"shape": list(p.shape), "dtype": str(self._values[name].dtype)}
                for name, p in self.parameters.items()
            },
            "bits": {name: packed.clone() for name, packed in self._bits.items()},
            "values": {name: values.clone() for name, values in self._values.items()},
            "tasks": [{n: list(locks) for n, locks in task.items()} for task in self._tasks],
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state and put its values into the parameters.

        Where it has no values (None) the parameters' present ones are locked. A state of other
        parameters raises a ``maskfile.MaskFileError`` that names every mismatch; nothing has
        changed then.
        """
        maskfile.check_match(state["parameters"], self.parameters)
        new_bits, new_values = {}, {}
        for name, p in self.parameters.items():
            new_bits[name] = state["bits"][name].to(p.device).clone()
            if state["values"] is None:
                mask = bits.unpack(new_bits[name], p.shape)
                new_values[name] = p.detach().masked_select(mask)
            else:
                new_values[name] = state["values"][name].to(p.device).clone()
        self._bits, self._values = new_bits, new_values
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

    rows = [
        (*place(name), number, p.numel(), *task[name])
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
