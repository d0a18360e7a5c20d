"""Public names of a package that are imported when they are first used.

So ``import bitstack_nb`` does not load torch, and a notebook's first cell can look for missing
packages before they are installed.
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
        try:
            return getattr(import_module(f"{package}.{names[name]}"), name)
        except ModuleNotFoundError as error:
            if str(error.name).startswith("bitstack_nb"):
                raise
            raise ModuleNotFoundError(
                f"{package}.{name} needs the package {error.name}: run "
                "pip install '.[notebooks]' in the repository",
                name=error.name,
            ) from error

    return get, lambda: sorted(names), sorted(names)
