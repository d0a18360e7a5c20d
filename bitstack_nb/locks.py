"""Reading what is locked: masks unpacked on look-up, and the table per layer, module and task."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from bitstack_nb.eligible import place

if TYPE_CHECKING:
    import pandas


class TaskLocks(NamedTuple):
    """How many entries of one parameter a task chose, and how many of those were new."""

    selected: int
    added: int


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


def layer_table(
    sizes: Mapping[str, int], tasks: Sequence[Mapping[str, TaskLocks]]
) -> pandas.DataFrame:
    """The table that ``BitStack.layer_table`` documents.

    Args:
        sizes: entries of each eligible parameter.
        tasks: for each task in order, its locks by parameter.
    """
    import pandas

    rows = [
        (*place(name), number, size, *task[name])
        for number, task in enumerate(tasks, start=1)
        for name, size in sizes.items()
    ]
    columns = ["layer", "module", "task", "eligible", "selected", "added"]
    types = dict.fromkeys(columns, "int64") | {"layer": "Int64", "module": "str"}
    table = pandas.DataFrame(rows, columns=columns).astype(types)
    keys = ["layer", "module", "task"]
    table = table.groupby(keys, as_index=False, dropna=False, sort=False).sum()
    table["locked"] = table.groupby(keys[:2], dropna=False)["added"].cumsum()
    # An empty parameter has no entries to lock: 0, not 0 / 0.
    table["lock_fraction"] = (table["locked"] / table["eligible"]).where(table["eligible"] > 0, 0.0)
    return table
