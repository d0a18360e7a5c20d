"""Many runs at once: each a process of its own, started by a joblib task here or on a cluster.

A process for each run gives all of its memory back, draws from random generators of its own even
where a worker has several threads, and when it is killed takes no worker with it.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from joblib import Parallel, cpu_count, delayed, parallel_config
from joblib.parallel import BatchedCalls, ParallelBackendBase
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

# What pip installs for each; loky is joblib's own.
BACKENDS = {"loky": "joblib", "dask": "distributed", "ray": "ray"}


def sweep(
    commands: Mapping[Path, Sequence[str]],
    *,
    backend: str = "loky",
    jobs: int | None = None,
    progress: bool = False,
) -> dict[Path, str]:
    """Carry out the commands whose file is not there yet; one that fails stops no other.

    Args:
        commands: what Python is given, by the file that it writes. A cluster's workers run it in
            this process's working directory, with its interpreter: they have to share both.
        backend: ``loky`` is this machine; ``dask`` is the cluster that DASK_SCHEDULER_ADDRESS
            names, ``ray`` that of RAY_ADDRESS or, without it, the one this machine is part of.
        jobs: commands at once; as many as there are cores if not given. They share this machine's
            cores between them. ``dask`` has as many as its workers have threads.
        progress: show one bar over the commands; with ``ray`` it moves at the end only.

    Returns:
        The files that are not there, each with the reason in a line.

    Raises:
        ValueError: the backend is not installed, or does not fit the other arguments.
        OSError: there is no cluster, or its workers cannot start the commands.
    """
    if jobs is not None and (jobs < 1 or backend == "dask"):
        expected = "none: dask's workers say how many" if backend == "dask" else "at least 1"
        raise ValueError(f"jobs is {jobs}, expected {expected}")
    missing = {path: [*c] for path, c in commands.items() if not path.exists()}
    done = len(commands) - len(missing)
    logger.info("%d of %d runs are finished already", done, len(commands))
    failed = {}
    with tqdm(total=len(commands), initial=done, unit="run", disable=not progress) as bar:
        for path, ended in _carried_out(missing, backend, jobs):
            bar.update()
            logger.info("%s:\n%s", path.stem, ended.stderr)
            if ended.returncode or not path.exists():
                failed[path] = _reason(ended, path)
    return failed


def _carried_out(
    commands: Mapping[Path, list[str]], backend: str, jobs: int | None
) -> Iterator[tuple[Path, subprocess.CompletedProcess]]:
    """Each command as it ends, with its file."""
    if not commands:
        return
    if backend == "loky":
        # No more than there are commands, so that these few get the cores of the others.
        jobs = min(jobs or cpu_count(), len(commands))
    paths = {tuple(command): path for path, command in commands.items()}
    with _cluster(backend) as connected, parallel_config(backend=connected):
        # A function of the standard library: workers need no import of this package to get it.
        # All at once, because a cluster may grow while it works. Ray's backend gives lists only.
        start = Parallel(
            n_jobs=jobs or -1,
            batch_size=1,
            pre_dispatch="all",
            return_as="list" if backend == "ray" else "generator_unordered",
        )
        for ended in start(
            delayed(subprocess.run)(
                [sys.executable, *command],
                cwd=Path.cwd(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
            for command in commands.values()
        ):
            yield paths[tuple(ended.args[1:])], ended


@contextmanager
def _cluster(backend: str) -> Iterator[str | ParallelBackendBase]:
    """What joblib takes for the backend, connected with its cluster."""
    module = _installed(backend)
    if backend == "dask":
        if import_module("dask").config.get("scheduler-address", None) is None:
            raise ValueError(
                "which Dask cluster? Set DASK_SCHEDULER_ADDRESS to its scheduler's address, such "
                "as tcp://10.0.0.1:8786 (started with: dask scheduler; dask worker ADDRESS)"
            )
        with module.Client() as client:
            yield _dask(client)
    elif backend == "ray":
        with module.init(address="auto"):
            import_module("ray.util.joblib").register_ray()
            yield backend
    else:
        yield backend


def _dask(client: Any) -> ParallelBackendBase:
    """joblib's backend, without two habits of it.

    It waits without end for a task that Dask has given up; and the tasks of a cluster that has one
    thread, joblib does here.
    """
    from joblib._dask import DaskDistributedBackend  # loads Dask

    class Backend(DaskDistributedBackend):
        def submit(self, func: BatchedCalls, callback: Callable[[Any], None]) -> Future:
            ((_, (command,), _),) = func.items

            def end(future: Future) -> None:
                if error := future.exception():
                    why = f"{type(error).__name__}: Dask has given it up after killed workers"
                    callback([subprocess.CompletedProcess(command, 1, stderr=why)])

            future = super().submit(func, callback)
            future.add_done_callback(end)
            return future

        def effective_n_jobs(self, n_jobs: int) -> int:
            return max(2, super().effective_n_jobs(n_jobs))

    return Backend(client=client)


def _installed(backend: str) -> ModuleType:
    try:
        return import_module(BACKENDS[backend])
    except KeyError:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}") from None
    except ImportError as error:
        raise ValueError(
            f"the backend {backend} is not installed: pip install {BACKENDS[backend]}"
        ) from error


def _reason(ended: subprocess.CompletedProcess, path: Path) -> str:
    """Why there is no result, in a line."""
    if ended.returncode == 0:
        return f"it has ended, but {path} is not here: the workers have to share this folder"
    if ended.returncode < 0:
        name = signal.Signals(-ended.returncode).name
        return f"killed by {name}; if for memory, try fewer at once"
    lines = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
    return lines[-1].removeprefix("error: ")
