"""A block after which the global random generators are as before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


@contextmanager
def undisturbed_rng(device: torch.device) -> Iterator[None]:
    """Restore at the end the states of torch (CPU and ``device``), numpy and random."""
    python, legacy = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(legacy)
