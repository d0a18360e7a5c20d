"""The notebooks' first cells: missing packages, this machine, the folder for results."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
# pip may not replace these: Colab's builds fit its driver and each other.
_KEPT = ("torch", "numpy")


def to_install() -> str:
    """The packages that pip has to install for the notebooks; empty if none is missing.

    Installed packages stay as they are. The versions of torch and numpy are in the text too, so
    that pip does not replace them for a new package.
    """
    missing = _missing_packages()
    return " ".join(missing and [*missing, *(f"{name}=={version(name)}" for name in _KEPT)])


def describe() -> str:
    """Device, versions and preset of this process, a line each.

    With a GPU and without ``BITSTACK_PRESET`` each notebook chooses its own preset.

    Raises:
        ImportError: a package is missing. ``%pip`` prints that it failed, but raises nothing.
    """
    if missing := _missing_packages():
        raise ImportError(
            f"these packages are missing: {', '.join(missing)}. Install them with pip, then run "
            "this cell again"
        )
    # Only here, as they may have been missing. provenance asks torch for GPUs where it is loaded.
    import torch  # noqa: F401

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
    """The needs of the package and of its extra ``notebooks`` that cannot be imported."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    needs = [*project["dependencies"], *project["optional-dependencies"]["notebooks"]]
    names = [re.match(r"\w+", need)[0] for need in needs]
    return [name for name in names if not find_spec(name)]


def report(checks: Mapping[str, bool]) -> str:
    """A line with PASS or FAIL per check, and one for all."""
    lines = [f"{'PASS' if passed else 'FAIL'}  {text}" for text, passed in checks.items()]
    failed = sum(not passed for passed in checks.values())
    total = f"{failed} of {len(checks)} checks failed" if failed else "all checks passed"
    return "\n".join([*lines, f"\n{'FAIL' if failed else 'PASS'}: {total}"])


def duration(seconds: float) -> str:
    """Seconds in words: ``40 s``, ``3 min``, ``1 h 20 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def default_output() -> str:
    """The notebooks' folder for runs: ``BITSTACK_OUTPUT``, else ``results/runs`` in the clone."""
    return os.environ.get("BITSTACK_OUTPUT") or str(_ROOT / "results" / "runs")


def output_folder(path: str) -> Path:
    """The folder for results, made if missing; on Colab a folder on Google Drive is mounted."""
    folder, mounted_at = Path(path).expanduser().resolve(), Path("/content/drive")
    if folder.is_relative_to(mounted_at) and not mounted_at.is_mount():
        from google.colab import drive  # exists on Colab only, and asks the user for permission

        drive.mount(str(mounted_at))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
