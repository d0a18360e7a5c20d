"""The origin of a result: machine, versions, commit, date and command line; its peak memory."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitstack_nb.version import __version__

if TYPE_CHECKING:
    import torch

CODE = Path(__file__).resolve().parents[1] / "version.py"  # a file at the top of the package
PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "numpy",
    "safetensors",
    "tokenizers",
)


def provenance(*, command: str | None = None) -> dict[str, Any]:
    """Describe this process as a JSON-able dict; unknown values are None.

    ``command`` is the command line that repeats the run, by default the one that started this
    process. The date is UTC, ISO 8601. Threads and GPUs are asked of torch where it is loaded.
    """
    torch = sys.modules.get("torch")
    gpus = torch.cuda.device_count() if torch else 0
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line() if command is None else command,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads() if torch else None,
        "gpus": [torch.cuda.get_device_name(index) for index in range(gpus)],
        # From the code: a clone that was not installed (Colab) has no metadata.
        "packages": {"bitstack_nb": __version__} | {name: _version(name) for name in PACKAGES},
        "git": git_state(CODE),
        "code": code_digest(CODE.parent),
    }


def peak_memory(before: dict[str, float], device: torch.device) -> dict[str, float]:
    """Peak memory so far in MiB, over the processes that a resumed run took.

    ``process`` counts all that this process has done, earlier runs included; ``gpu`` this run only.
    """
    peak = {}
    if sys.platform != "win32":
        import resource

        # ru_maxrss counts KiB on Linux, bytes on macOS.
        unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
        peak["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    if device.type == "cuda":
        import torch

        peak["gpu"] = torch.cuda.max_memory_allocated(device) / (1 << 20)
    return {name: max(value, before.get(name, 0)) for name, value in peak.items()}


def command_line() -> str:
    """The command as a shell takes it; sys.argv begins with a file's path under ``python -m``."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    """The processor's name. Linux has it in /proc only, and not on every architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), None) or platform.processor() or platform.machine() or None


def code_digest(package: Path) -> str:
    """SHA-256 over the names and contents of a package's Python files.

    It tells two states of the code apart that git calls by one commit, or that have no commit.
    """
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.relative_to(package).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def git_state(file: Path) -> dict[str, Any] | None:
    """Commit of the checkout that tracks ``file``, and whether the file's folder differs from it.

    Other folders are not compared, since results written there do not change the code.
    """
    try:
        # A package installed inside some other repository (a venv in a project) is not tracked.
        _git(file.parent, "ls-files", "--error-unmatch", file.name)
        commit = _git(file.parent, "rev-parse", "HEAD")
        dirty = bool(_git(file.parent, "status", "--porcelain", "--", "."))
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": dirty}


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=10,
    )
    return done.stdout.strip()
