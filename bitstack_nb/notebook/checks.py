"""Checks of a notebook as lines of text: PASS, FAIL or OPEN."""

from __future__ import annotations

from collections.abc import Mapping

_WORDS = {True: "PASS", False: "FAIL", None: "OPEN"}


def report(checks: Mapping[str, bool | None]) -> str:
    """A line per check and one for all; None is a question that the numbers leave open."""
    lines = [f"{_WORDS[passed]}  {text}" for text, passed in checks.items()]
    found = list(checks.values())
    failed, left_open = found.count(False), found.count(None)
    if failed:
        total = f"FAIL: {failed} of {len(checks)} checks failed"
    elif left_open:
        total = f"OPEN: no check failed, and {left_open} of {len(checks)} could not be decided"
    else:
        total = "PASS: all checks passed"
    return "\n".join([*lines, "", total])
