"""Public names of a package that are imported when they are first used.

So ``import bitstack_nb`` loads torch alone, ``python -m bitstack_nb --help`` not even that, and a
notebook's first cell can ask what is missing before it is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def attach(package: str, names: Mapping[str, str]) -> tuple[Callable, Callable, list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package with these lazy names.

    Args:
        package: its ``__name__``.
        names: the module below the package that defines each name.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{names[name]}"), name)

    return get, lambda: sorted(names), sorted(names)
