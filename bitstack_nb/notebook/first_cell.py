"""The notebooks' first cell: missing packages, this machine, the folder for results."""

from __future__ import annotations

import os
import re
import tomllib
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
    """Device and versions of this process, a line each.

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

    from bitstack_nb.results.provenance import provenance

    here = provenance()
    device = ", ".join(here["gpus"]) or f"{here['cpu']}, {here['cores']} cores"
    versions = {"Python": here["python"], **here["packages"]}
    return (
        f"device    {device}\n"
        f"versions  {', '.join(f'{name} {number}' for name, number in versions.items())}"
    )


def _missing_packages() -> list[str]:
    """The needs of the package and of its extra ``notebooks`` that cannot be imported."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    needs = [*project["dependencies"], *project["optional-dependencies"]["notebooks"]]
    names = [re.match(r"\w+", need)[0] for need in needs]
    return [name for name in names if not find_spec(name)]


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
