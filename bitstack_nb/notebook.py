"""What the notebooks' first cell asks: which packages are missing, and what it runs on."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from bitstack_nb.protocol import PRESETS, default_preset
from bitstack_nb.provenance import provenance

# Colab's own builds fit its driver and each other: pip may not replace them.
_HELD = ("torch", "numpy")


def to_install() -> str:
    """What pip has to be given so that the notebooks run; empty if nothing is missing.

    Missing dependencies by name: what is there stays as it is. With them go the installed versions
    of torch and numpy, so that pip does not replace these for the sake of a new package.
    """
    missing = _missing_packages()
    return " ".join(missing and [*missing, *(f"{name}=={version(name)}" for name in _HELD)])


def describe() -> str:
    """Device, versions and preset of this process, a line each.

    Raises:
        ImportError: a package is missing. ``%pip`` only prints that it failed.
    """
    if missing := _missing_packages():
        raise ImportError(
            f"these packages are missing: {', '.join(missing)}. Install them with pip, then run "
            "this cell again"
        )
    here = provenance()
    device = ", ".join(here["gpus"]) or f"{here['cpu']}, {here['cores']} cores"
    versions = {"Python": here["python"], **here["packages"]}
    return (
        f"device    {device}\n"
        f"versions  {', '.join(f'{name} {number}' for name, number in versions.items())}\n"
        f"preset    {default_preset()} (of {', '.join(PRESETS)}; BITSTACK_PRESET chooses)"
    )


def _missing_packages() -> list[str]:
    """Dependencies named in ``pyproject.toml`` that cannot be imported."""
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())
    names = [re.match(r"\w+", need)[0] for need in project["project"]["dependencies"]]
    return [name for name in names if not find_spec(name)]
