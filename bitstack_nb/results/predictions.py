"""Predicted labels of test texts: confusion, macro F1, and McNemar's test of two strategies.

A run keeps labels as text, ``"0 3 1"``, a number per test text in the order of the sample.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def as_text(labels: Iterable[int]) -> str:
    """Labels in one line of text."""
    return " ".join(map(str, np.asarray(labels).tolist()))


def numbers(text: str) -> np.ndarray:
    """Labels of a line of text: int64 ``[texts]``."""
    return np.array(text.split(), dtype=np.int64)
