"""What a stack can be asked for, and the errors for what it cannot."""

from __future__ import annotations

from numbers import Real

from bitstack_nb.importance import IMPORTANCE, RANDOM

BUDGETS = ("union", "fresh")
# Strategies to which importance says how many entries to lock, not which.
CONTROLS = ("random-mask", "magnitude-mask")
# Of each mode. Protecting entries drawn by chance is a control, "random-mask".
IMPORTANCES = {"protect": tuple(IMPORTANCE), "recall": (*IMPORTANCE, RANDOM)}
MODES = tuple(IMPORTANCES)


def check_settings(
    sparsity: float,
    *,
    mode: str = "protect",
    budget: str = "union",
    importance: str = "gradient",
) -> None:
    """Raise a ValueError that names a setting out of range, and what it may be."""
    if not isinstance(sparsity, Real) or not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is {sparsity!r}, expected a share from 0 to 1, as 0.12")
    for what, value, known in (
        ("mode", mode, MODES),
        ("budget", budget, BUDGETS),
        ("importance", importance, IMPORTANCES.get(mode, ())),
    ):
        if value not in known:
            raise ValueError(f"{what} is {value!r}, expected one of {', '.join(known)}")
