"""What the notebooks' first cell asks: which packages are missing, and what it runs on."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
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

    With a GPU and no ``BITSTACK_PRESET`` each notebook chooses its own, in the cell after this.

    Raises:
        ImportError: a package is missing. ``%pip`` only prints that it failed.
    """
    if missing := _missing_packages():
        raise ImportError(
            f"these packages are missing: {', '.join(missing)}. Install them with pip, then run "
            "this cell again"
        )
    # Only now: they import what may have been missing.
    from bitstack_nb.benchmark.protocol import PRESETS, default_preset
    from bitstack_nb.results.provenance import provenance

    here = provenance()
    preset = default_preset(gpu="as the next cell says")
    device = ", ".join(here["gpus"]) or f"{here['cpu']}, {here['cores']} cores"
    versions = {"Python": here["python"], **here["packages"]}
    return (
        f"device    {device}\n"
        f"versions  {', '.join(f'{name} {number}' for name, number in versions.items())}\n"
        f"preset    {preset} (of {', '.join(PRESETS)}; BITSTACK_PRESET chooses)"
    )


def _missing_packages() -> list[str]:
    """Dependencies named in ``pyproject.toml`` that cannot be imported."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())
    names = [re.match(r"\w+", need)[0] for need in project["project"]["dependencies"]]
    return [name for name in names if not find_spec(name)]


def report(checks: Mapping[str, bool]) -> str:
    """A line with PASS or FAIL per check, and one for all."""
    lines = [f"{'PASS' if passed else 'FAIL'}  {what}" for what, passed in checks.items()]
    failed = sum(not passed for passed in checks.values())
    all_of_them = f"{failed} of {len(checks)} checks failed" if failed else "all checks passed"
    return "\n".join([*lines, f"\n{'FAIL' if failed else 'PASS'}: {all_of_them}"])


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``40 s``, ``3 min``, ``1 h 20 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def default_output() -> str:
    """Where the notebooks keep runs: ``BITSTACK_OUTPUT``, else ``results/runs`` in the checkout."""
    return os.environ.get("BITSTACK_OUTPUT") or str(_ROOT / "results" / "runs")


def output_folder(path: str) -> Path:
    """The folder for results; one under ``/content/drive`` mounts Google Drive on Colab first."""
    if path.startswith("/content/drive/") and not Path("/content/drive/MyDrive").is_dir():
        from google.colab import drive  # only there, and asks for permission

        drive.mount("/content/drive")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
