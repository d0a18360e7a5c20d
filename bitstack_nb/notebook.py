"""What the notebooks' first cell asks: which packages are missing, and what it runs on."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from bitstack_nb.protocol import PRESETS, default_preset
from bitstack_nb.provenance import provenance

# Colab's own builds fit its driver and each other: pip may not replace them.
_HELD = ("torch", "numpy")


def missing_packages() -> list[str]:
    """What pip has to be given so that the notebooks run; empty if nothing is missing.

    Names of the dependencies in ``pyproject.toml`` that cannot be imported, without versions: what
    is there stays as it is. With them go the installed versions of torch and numpy, so that pip
    does not replace these two for the sake of a new package.
    """
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())
    names = [re.match(r"[\w-]+", need)[0] for need in project["project"]["dependencies"]]
    missing = [name for name in names if not find_spec(name)]
    return missing and [*missing, *(f"{name}=={metadata.version(name)}" for name in _HELD)]


def describe() -> str:
    """Device, versions and preset of this process, a line each.

    Raises:
        ImportError: a package is still missing (``%pip`` says so, but does not stop a cell).
    """
    if missing := missing_packages():
        raise ImportError(f"missing: {', '.join(missing)}; install with: pip install -e .")
    here = provenance()
    device = ", ".join(here["gpus"]) or f"{here['cpu']}, {here['cores']} cores"
    versions = {"Python": here["python"], **here["packages"]}
    return (
        f"device    {device}\n"
        f"versions  {', '.join(f'{name} {version}' for name, version in versions.items())}\n"
        f"preset    {default_preset()} (of {', '.join(PRESETS)}; BITSTACK_PRESET chooses)"
    )
