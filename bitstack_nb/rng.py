"""The global random generators, left as found."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


@contextmanager
def undisturbed_rng(device: torch.device) -> Iterator[None]:
    """Give back the states of torch (the CPU's and ``device``'s), numpy and random at the end."""
    python, legacy = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(legacy)
