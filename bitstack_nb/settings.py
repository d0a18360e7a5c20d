"""Values of settings, and a check of both methods' settings. This module loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

BUDGETS = ("union", "fresh")
IMPORTANCES = ("gradient", "gradient-weight", "fisher")
MODES = ("eval", "train")  # in which the benchmark measures importance
POOLINGS = ("cls", "mean")  # of the benchmark's classifier
PRECISIONS = ("fp32", "bf16")
TINY = "tiny-gpt2"  # the package's backbone, which knows only the words of synthetic texts
RANDOM = "random"  # for exact recall; locking random weights is the method random mask


def check_settings(
    sparsity: float,
    exclude: Sequence[str] | None = None,
    *,
    budget: str = "union",
    importance: str = "gradient",
    importances: Sequence[str] = IMPORTANCES,
) -> None:
    """Raise a ValueError that names a setting out of range, and its possible values."""
    if not isinstance(sparsity, Real) or not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is {sparsity!r}, expected a share from 0 to 1, as 0.12")
    if isinstance(exclude, str):
        raise ValueError(f"exclude is the string {exclude!r}, expected a list of strings")
    for what, value, known in (
        ("budget", budget, BUDGETS),
        ("importance", importance, importances),
    ):
        if value not in known:
            raise ValueError(f"{what} is {value!r}, expected one of {', '.join(known)}")
