"""Many runs at once: on this machine by joblib, on a cluster by Dask or Ray."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
from joblib import Parallel, cpu_count, delayed
from tqdm.auto import tqdm

from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.runner import read_finished, run
from bitstack_nb.benchmark.training import find_device
from bitstack_nb.files import sha256
from bitstack_nb.results.provenance import command_line

logger = logging.getLogger(__name__)

Ended = Iterator[tuple[str, str | None]]  # the names of runs as they end; a reason if one failed


def sweep(
    protocols: Sequence[Protocol],
    *,
    output: str | os.PathLike[str] = "results/runs",
    device: str = "auto",
    backend: str = "loky",
    jobs: int | None = None,
    progress: bool = False,
) -> dict[str, str]:
    """Run the protocols that have no result yet; a run that fails stops no other.

    Args:
        protocols: the runs.
        output: folder of the results, which a cluster's workers have to share.
        device: as for ``run``.
        backend: ``loky`` is this machine; ``dask`` is the cluster that DASK_SCHEDULER_ADDRESS
            names, ``ray`` that of RAY_ADDRESS.
        jobs: runs at once on this machine, which share its cores between them; if not given as
            many as cores, on a GPU one.
        progress: show one bar over the runs; with ``ray`` it moves at the end only.

    Returns:
        The names of the protocols that have no result now, or one that was made with other files
        than are there now, each with the reason in a line.

    Raises:
        ValueError: the backend is not installed, or does not fit the other arguments.
        OSError: there is no cluster.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(_BACKENDS)}")
    if jobs is not None and (jobs < 1 or backend != "loky"):
        expected = "at least 1" if backend == "loky" else f"none: {backend}'s workers say how many"
        raise ValueError(f"jobs is {jobs}, expected {expected}")
    folder = Path(output).expanduser().absolute()
    files = {protocol.name: folder / f"{protocol.name}.json" for protocol in protocols}
    left = {p.name: p for p in protocols if not files[p.name].exists()}
    several = jobs or (cpu_count() if find_device(device).type == "cpu" else 1)
    how = {"output": folder, "device": device, "command": command_line()}
    failed = _outdated({files[p.name]: p for p in protocols if p.name not in left})
    with tqdm(total=len(files), unit="run", disable=not progress) as bar:
        bar.update(len(files) - len(left))
        for name, reason in _BACKENDS[backend](left, how, several):
            bar.update()
            if not reason and not files[name].exists():
                reason = f"{files[name]} is not here: the workers have to share this folder"
            if reason:
                failed[name] = reason
    return failed


def _outdated(finished: Mapping[Path, Protocol]) -> dict[str, str]:
    """Names of finished runs whose files of data or weights have changed, each with the reason."""
    found, digest = {}, cache(sha256)  # each file is read once
    for path, protocol in finished.items():
        try:
            read_finished(protocol, path, digest=digest)
        except ValueError as error:
            found[protocol.name] = " ".join(str(error).split())
    return found


def _run(protocol: Protocol, how: dict[str, Any]) -> tuple[str, str | None]:
    """Carry out a run in a worker."""
    datasets.disable_progress_bars()
    try:
        run(protocol, **how)
    except Exception as error:
        return protocol.name, " ".join(str(error).split()) or type(error).__name__
    return protocol.name, None


def _loky(protocols: dict[str, Protocol], how: dict[str, Any], jobs: int) -> Ended:
    """Processes of this machine. When one is killed, loky ends all, and they are started again."""
    left, before = dict(protocols), None
    while left and len(left) != before:
        before, runs = len(left), [delayed(_run)(protocol, how) for protocol in left.values()]
        try:
            # No more at once than there are runs, so that these share all cores.
            parallel = Parallel(min(jobs, len(left)), "loky", "generator_unordered", batch_size=1)
            for name, reason in parallel(runs):
                del left[name]
                yield name, reason
        except BrokenProcessPool:
            logger.warning("a worker was killed, with %d runs left", len(left))
    for name in left:
        yield name, "a worker was killed; if for memory, try fewer at once"


def _dask(protocols: dict[str, Protocol], how: dict[str, Any], _: int) -> Ended:
    distributed = _installed("distributed")
    if not (address := os.environ.get("DASK_SCHEDULER_ADDRESS")):
        raise ValueError(
            "which Dask cluster? Set DASK_SCHEDULER_ADDRESS to its scheduler's address, such as "
            "tcp://10.0.0.1:8786 (started with: dask scheduler; dask worker --nthreads 1 ADDRESS)"
        )
    with distributed.Client(address) as client:
        if max(client.nthreads().values(), default=1) > 1:
            raise ValueError("a run needs a process: start the workers with --nthreads 1")
        names = {client.submit(_run, p, how, pure=False): name for name, p in protocols.items()}
        for ended in distributed.as_completed(names):
            error = ended.exception()  # Dask has given it up, as after killed workers
            yield (names[ended], type(error).__name__) if error else ended.result()


def _ray(protocols: dict[str, Protocol], how: dict[str, Any], _: int) -> Ended:
    _installed("ray")
    import_module("ray.util.joblib").register_ray()
    runs = [delayed(_run)(protocol, how) for protocol in protocols.values()]
    yield from Parallel(-1, "ray", batch_size=1, pre_dispatch="all")(runs)


def _installed(package: str) -> ModuleType:
    try:
        return import_module(package)
    except ImportError as error:
        raise ValueError(f"this backend is not installed: pip install {package}") from error


_BACKENDS = {"loky": _loky, "dask": _dask, "ray": _ray}
