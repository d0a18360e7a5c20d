"""All figures and tables of what is recorded, as ``python -m bitstack_nb figures`` writes them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.figures import accuracy as plots
from bitstack_nb.figures import evidence as evidence_plots
from bitstack_nb.figures import locks as lock_plots
from bitstack_nb.figures import masks as mask_plots
from bitstack_nb.figures.reports import tables_text
from bitstack_nb.figures.style import Figure, grouped, png
from bitstack_nb.files import replacing
from bitstack_nb.results.result import Result, ResultError

FILE_DPI = 130


def write_figures(
    results: list[Result], folder: str | os.PathLike[str]
) -> tuple[list[Path], dict[str, str]]:
    """Write what ``results`` allow to ``folder``: figures as PNG, and the tables as ``tables.md``.

    Each file is whole or not there; all are drawn before the first is written.

    Returns:
        The files, and by name why a figure was not drawn.

    Raises:
        ResultError: none can be drawn, or the results contradict each other.
        OSError: a file cannot be written; it is named.
    """
    grouped(results)  # what is wrong with the results as a whole is an error, and not a figure less
    contents: dict[str, bytes] = {}
    left_out: dict[str, str] = {}
    for name, draw in _figures(results):
        try:
            contents[f"{name}.png"] = png(draw(), dpi=FILE_DPI)
        except ResultError as error:
            left_out[name] = str(error)
    if not contents:
        raise ResultError("; ".join(f"no figure {name}: {why}" for name, why in left_out.items()))
    contents["tables.md"] = tables_text(results).encode()
    return _written(contents, folder), left_out


def _written(contents: Mapping[str, bytes], folder: str | os.PathLike[str]) -> list[Path]:
    files = []
    for name, content in contents.items():
        files.append(Path(folder) / name)
        try:
            with replacing(files[-1]) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            raise OSError(
                error.errno, f"cannot write the file ({error.strerror})", str(files[-1])
            ) from error
    return files


def _figures(results: list[Result]) -> Iterator[tuple[str, Callable[[], Figure]]]:
    for draw in (
        plots.comparison,
        plots.paired_differences,
        plots.forgetting_per_task,
        plots.accuracy_matrices,
        evidence_plots.task_differences,
        evidence_plots.accuracy_for_storage,
        evidence_plots.drift_attribution,
        lock_plots.ablation,
        lock_plots.capacity,
    ):
        yield draw.__name__, partial(draw, results)
    for name, result in _examples(results).items():
        for draw in (lock_plots.lock_heatmaps, mask_plots.task_overlap, mask_plots.mask_weight):
            yield f"{draw.__name__}_{name}", partial(draw, result)


def _examples(results: list[Result]) -> dict[str, Result]:
    """A run per strategy and budget that locks: the sparsity nearest the default, first seed."""
    locking = [g for g in grouped(results) if g.settings["sparsity"] and g.results[0].locks]
    locking.sort(key=lambda g: abs(g.settings["sparsity"] - Protocol.sparsity))
    found: dict[str, Result] = {}
    for group in locking:
        method = (group.settings["strategy"], group.settings["budget"])
        found.setdefault("_".join(filter(None, method)), group.results[0])
    return dict(sorted(found.items()))
