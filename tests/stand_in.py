"""A stand-in for a Colab machine: this environment's packages without ours, and ``google.colab``.

A new environment has links to the packages of the running one. An editable install of this project
is no package but a ``.pth`` file with a finder, so it is left out.
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
    links = folder / "links" / "site-packages"  # dill looks for a folder of this name
    links.mkdir(parents=True)
    here = [Path(entry) for entry in sys.path if Path(entry).name.endswith("-packages")]
    for entry in (entry for place in here for entry in place.iterdir()):
        left_out = entry.name.lower().startswith(("bitstack", "__editable__", *without))
        if not left_out and not (links / entry.name).exists():
            (links / entry.name).symlink_to(entry)
    # Python reads .pth files in site-packages itself only, not those among the links.
    (site_packages(python) / "links.pth").write_text(f"{links}\n")
    if colab:
        module = site_packages(python) / "google" / "colab" / "__init__.py"
        module.parent.mkdir(parents=True)
        module.touch()
        # Colab's kernel has imported it before the first cell.
        (site_packages(python) / "colab.pth").write_text("import google.colab\n")
    return python


def site_packages(python: Path) -> Path:
    """The folder of the interpreter's own packages."""
    (found,) = python.parents[1].glob("lib/python*/site-packages")
    return found


def repository(folder: Path) -> str:
    """The address of a new git repository with this working tree, untracked files included."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.split("\0"):
        if (ROOT / name).is_file():  # not deleted since the last commit
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return committed(folder)


def committed(folder: Path) -> str:
    """The address of a new git repository in a folder, with all its files."""
    who = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "as it is now"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder.as_uri()


def run(python: Path, arguments: list[str], cwd: Path, **variables: str) -> str:
    """Run the environment's Python with an empty home; its output, errors included."""
    # This process's PYTHONPATH and VIRTUAL_ENV would bring packages that are left out.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [python, *arguments],
        cwd=cwd,
        env={**kept, "HOME": str(python.parents[2]), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout
