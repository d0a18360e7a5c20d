"""Parameters that a reader sets in a notebook: one value or several, and any sparsity."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

from bitstack_nb.results.result import Result
from bitstack_nb.settings import check_settings

logger = logging.getLogger(__name__)


def several(value: Any, default: Iterable[Any] = ()) -> list[Any]:
    """A parameter as a list: of one value or of several; the default for None or an empty one."""
    if value is None:
        return list(default)
    one = isinstance(value, str) or not isinstance(value, Iterable)
    return [value] if one else list(value) or list(default)


def nearest_runs(
    results: Iterable[Result], sparsity: float, budget: str
) -> tuple[Result, list[Result]]:
    """The recorded runs of BitStack whose sparsity is nearest, and the first of the budget.

    Returns:
        That first run, and all runs of the sparsity, of other budgets too. A warning says which
        sparsity it is if it is another one.

    Raises:
        ValueError: no run has the budget and locks, or a parameter is out of range.
    """
    check_settings(sparsity, budget=budget)
    locked = [result for result in results if result.locks and "budget" in result.protocol]
    recorded = {result.protocol["sparsity"] for result in locked}
    own = [result for result in locked if result.protocol["budget"] == budget]
    if not own:
        raise ValueError(f"these results hold no run of BitStack with budget {budget!r}")
    first = min(own, key=lambda result: abs(result.protocol["sparsity"] - sparsity))
    shown = first.protocol["sparsity"]
    if not math.isclose(shown, sparsity):
        logger.warning(
            "no run was recorded at sparsity %g (but %s): the figures show %g, and the explorer "
            "any sparsity",
            sparsity,
            ", ".join(f"{value:g}" for value in sorted(recorded)),
            shown,
        )
    return first, [result for result in locked if result.protocol["sparsity"] == shown]
