"""The strategies, a file each: the file's name is the strategy's, with ``_`` for ``-``."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from operator import attrgetter
from pkgutil import iter_modules
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitstack_nb.benchmark.strategy import Strategy


def strategy_names() -> list[str]:
    """The names of all strategies, from A to Z. Loads neither torch nor transformers."""
    return [module.name.replace("_", "-") for module in iter_modules(__path__)]


@cache
def all_strategies() -> dict[str, type[Strategy]]:
    """All strategies by name, in the order of tables and figures."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    found = [
        item
        for module in modules
        for item in vars(module).values()
        if isinstance(item, type) and item.__module__ == module.__name__ and "name" in vars(item)
    ]
    return {strategy.name: strategy for strategy in sorted(found, key=attrgetter("order"))}
