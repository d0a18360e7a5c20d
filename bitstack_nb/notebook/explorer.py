"""The sparsity explorer: a page with a slider that shows the weights which a sparsity would lock.

The page needs no kernel: all numbers are in it. ``explorer.html`` is its template. ``lock_view``
has the numbers of the locks, and ``measured`` those of the curves.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import to_hex

from bitstack_nb.figures.style import SHARES
from bitstack_nb.notebook.lock_view import LockView
from bitstack_nb.notebook.measured import measured
from bitstack_nb.results.result import Result
from bitstack_nb.stack import BitStack

if TYPE_CHECKING:
    from bitstack_nb.notebook.panel import RetrainingPanel

_HEIGHT = 820  # pixels of the page in a notebook, until its frame knows its own
_NOT_SHOWN = "No slider below? Run this cell, or open docs/explorer.html in a browser."


def explore(
    source: Result | BitStack | LockView,
    loader: Iterable[Mapping[str, Any]] | None = None,
    *,
    n_batches: int = 32,
    results: Iterable[Result] = (),
) -> Explorer:
    """The explorer of a recorded run, or of what a live stack's next ``update`` would lock.

    Args:
        source: a result with recorded importance, any other lock curves as a :class:`LockView`,
            or a stack, which is left as it is.
        loader, n_batches: for a stack, the arguments of ``update``.
        results: runs at several sparsities, for the curves of accuracy and forgetting.

    Raises:
        ValueError: the result has no recorded importance, or a stack comes without a loader.
    """
    if isinstance(source, BitStack):
        if loader is None:
            raise ValueError(
                "a stack needs batches to measure importance on: explore(stack, loader)"
            )
        source = LockView.of_stack(source, loader, n_batches=n_batches)
    view = LockView.of_result(source) if isinstance(source, Result) else source
    return Explorer(view, tuple(results))


@dataclass(frozen=True, repr=False)
class Explorer:
    """The page; a notebook shows it where a cell returns it.

    Attributes:
        view: the locks.
        results: the runs of its curves.
    """

    view: LockView
    results: tuple[Result, ...] = ()

    def to_html(self) -> str:
        """The page as one file that loads nothing else."""
        return self._page

    def retraining(self, output: str | os.PathLike[str] = "results/runs") -> RetrainingPanel:
        """A button that trains the smoke benchmark at a sparsity and then shows its locks.

        It needs a kernel and ipywidgets.

        Args:
            output: folder for these runs.
        """
        from bitstack_nb.notebook.panel import RetrainingPanel

        return RetrainingPanel(self, output)

    @cached_property
    def _page(self) -> str:
        ramp = [to_hex(colour) for colour in SHARES(np.linspace(0, 1, 101))]
        data = self.view.to_record() | {"measured": measured(self.results), "ramp": ramp}
        text = json.dumps(data, separators=(",", ":"), allow_nan=False)
        template = files("bitstack_nb.notebook").joinpath("explorer.html").read_text("utf-8")
        return template.replace("{data}", text.replace("<", "\\u003c"))

    def __repr__(self) -> str:
        return f"Explorer of {self.view.source}"

    def _repr_html_(self) -> str:
        return f"<small>{_NOT_SHOWN}</small>{self.frame()}"

    def frame(self) -> str:
        """The page in a frame of its own, so that its styles and names meet no others."""
        grow = "this.style.height = this.contentDocument.documentElement.scrollHeight + 20 + 'px'"
        return (
            f'<iframe title="BitStack: the sparsity explorer" srcdoc="{escape(self.to_html())}" '
            f'onload="{grow}" style="width: 100%; height: {_HEIGHT}px; border: 0"></iframe>'
        )
