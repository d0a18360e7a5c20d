"""A stand-in for a Colab machine: this environment's packages without ours, and ``google.colab``.

An environment made by ``venv`` sees the packages of the running one through links, except those
that a test wants to be missing. Links are not installs: an editable install of this project, which
is a ``.pth`` file and a finder, does not come along.
"""

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def environment(folder: Path, *, colab: bool, without: Collection[str] = ()) -> Path:
    """Make an environment in ``folder`` that lacks the packages ``without``; its interpreter."""
    venv.create(folder / "env", symlinks=True)
    python = folder / "env" / "bin" / "python"
    links = folder / "links" / "site-packages"  # by which dill knows packages
    links.mkdir(parents=True)
    here = [Path(entry) for entry in sys.path if Path(entry).name.endswith("-packages")]
    for entry in (entry for place in here for entry in place.iterdir()):
        left_out = entry.name.lower().startswith(("bitstack", "__editable__", *without))
        if not left_out and not (links / entry.name).exists():
            (links / entry.name).symlink_to(entry)
    # .pth files are obeyed in site-packages itself only: not those among the links.
    (site_packages(python) / "links.pth").write_text(f"{links}\n")
    if colab:
        module = site_packages(python) / "google" / "colab" / "__init__.py"
        module.parent.mkdir(parents=True)
        module.touch()
        # Colab's kernel has it imported before the first cell.
        (site_packages(python) / "colab.pth").write_text("import google.colab\n")
    return python


def site_packages(python: Path) -> Path:
    """Where the interpreter's own packages lie."""
    (found,) = python.parents[1].glob("lib/python*/site-packages")
    return found


def repository(folder: Path) -> Path:
    """A git repository of this working tree as it is now: tracked and new files, one commit."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():  # not deleted since the last commit
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    who = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "as it is now"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def run(
    python: Path, arguments: list[str], cwd: Path, **variables: str
) -> subprocess.CompletedProcess:
    """Run the environment's Python, without this process's search path and with an empty home."""
    # IPython would add the packages of an active environment, which VIRTUAL_ENV names.
    left_out = ("PYTHON", "VIRTUAL_ENV")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    return subprocess.run(
        [python, *arguments],
        cwd=cwd,
        env={**inherited, "HOME": str(python.parents[2]), **variables},
        capture_output=True,
        text=True,
        check=False,
    )
