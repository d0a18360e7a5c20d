"""Whether a device runs the Triton kernels. Without them every tensor is handled by itself."""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType

import torch


@cache
def kernels_on(device: torch.device) -> ModuleType | None:
    """The module ``kernels``, if its kernels run on the device: on a GPU that has Triton."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, for tests
    if device.type != ("cpu" if interpreted else "cuda"):
        return None
    try:
        from bitstack_nb import kernels
    except ImportError:  # no Triton: Windows, for example
        return None
    return kernels if kernels.work_on(device) else None
