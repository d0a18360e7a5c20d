"""BitStack: continual learning with cumulative 1-bit masks, and the notebooks' benchmark."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from bitstack_nb.stack import BitStack
from bitstack_nb.version import __version__

__all__ = ["BitStack", "Protocol", "Result", "Task", "__version__", "load_results", "run"]

# Imported on first use: the method alone needs neither transformers nor datasets nor pandas.
_LAZY = {
    "Protocol": "protocol",
    "Result": "results",
    "Task": "tasks",
    "load_results": "results",
    "run": "benchmark",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
