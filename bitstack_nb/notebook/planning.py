"""How long a notebook's runs will take, and a question before hours of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bitstack_nb.benchmark import Protocol, estimate

LONG = 30 * 60  # seconds
DRIVE = "/content/drive/MyDrive/bitstack"


def plan(
    protocols: Sequence[Protocol], *, output: str | os.PathLike[str], confirmed: bool = False
) -> str:
    """The number of runs and the time that they will take here, estimated from real steps.

    Raises:
        RuntimeError: they may take more than half an hour and are not confirmed. On Colab the
            message proposes a folder on Google Drive.
    """
    low, high = estimate(protocols, output=output)
    runs = f"{len(protocols)} run{'s' * (len(protocols) != 1)}"
    said = f"{runs}, {duration(low, high)} from here (estimated)"
    if high <= LONG or confirmed:
        return said
    lines = [f"{said}. Set CONFIRM_LONG_RUN = True to start them."]
    if "google.colab" in sys.modules and not Path(output).is_relative_to("/content/drive"):
        lines.append(f'Set OUTPUT = "{DRIVE}", too: a disconnect loses what is not on Drive.')
    raise RuntimeError(" ".join(lines))


def duration(low: float, high: float | None = None) -> str:
    """Seconds in words, of one time or of a range: ``40 s``, ``3 to 5 min``, ``1 h 20 min``."""
    first, last = _words(low), _words(low if high is None else high)
    if first == last:
        return first
    number, *unit = first.split()
    return f"{number if unit == last.split()[1:] else first} to {last}"


def _words(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
