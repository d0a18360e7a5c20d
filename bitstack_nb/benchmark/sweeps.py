"""Many runs at once, on this machine or on a cluster, by joblib."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets
from joblib import Parallel, cpu_count, delayed, parallel_config
from tqdm.auto import tqdm

from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.runner import run
from bitstack_nb.benchmark.training import find_device
from bitstack_nb.results.provenance import command_line

logger = logging.getLogger(__name__)

BACKENDS = {"loky": "joblib", "dask": "distributed", "ray": "ray"}  # what each backend needs


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
        jobs: runs at once; if not given as many as cores, on a GPU one. They share this machine's
            cores between them. ``dask`` has as many as it has workers.
        progress: show one bar over the runs; with ``ray`` it moves at the end only.

    Returns:
        The names of the protocols that have no result now, each with the reason in a line.

    Raises:
        ValueError: the backend is not installed, or does not fit the other arguments.
        OSError: there is no cluster.
    """
    if jobs is not None and (jobs < 1 or backend == "dask"):
        expected = "none: dask's workers say how many" if backend == "dask" else "at least 1"
        raise ValueError(f"jobs is {jobs}, expected {expected}")
    folder = Path(output).absolute()
    files = {protocol.name: folder / f"{protocol.name}.json" for protocol in protocols}
    left = {p.name: p for p in protocols if not files[p.name].exists()}
    if backend == "loky":
        several = cpu_count() if find_device(device).type == "cpu" else 1
        jobs = min(jobs or several, len(left) or 1)  # no more, so that these share all cores
    how = {"output": folder, "device": device, "command": command_line()}
    failed = {}
    with (
        tqdm(total=len(files), unit="run", disable=not progress) as bar,
        _cluster(backend) as found,
    ):
        bar.update(len(files) - len(left))
        with parallel_config(backend=found, n_jobs=jobs or -1):
            for name, reason in _carried_out(left, how, as_list=backend == "ray"):
                bar.update()
                if not reason and not files[name].exists():
                    reason = f"{files[name]} is not here: the workers have to share this folder"
                if reason:
                    failed[name] = reason
    return failed


def _carried_out(
    left: dict[str, Protocol], how: dict[str, Any], *, as_list: bool
) -> Iterator[tuple[str, str | None]]:
    """The name of each run as it ends, and the reason if it has failed."""
    kind = "list" if as_list else "generator_unordered"
    left, before = dict(left), None
    while left and len(left) != before:  # loky ends all workers when one is killed
        before, runs = len(left), [delayed(_run)(protocol, how) for protocol in left.values()]
        try:
            # All at once, because a cluster may grow while it works.
            for name, reason in Parallel(batch_size=1, pre_dispatch="all", return_as=kind)(runs):
                del left[name]
                yield name, reason
        except BrokenProcessPool:
            logger.warning("a worker was killed, with %d runs left", len(left))
    for name in left:
        yield name, "a worker was killed; if for memory, try fewer at once"


def _run(protocol: Protocol, how: dict[str, Any]) -> tuple[str, str | None]:
    """Carry out a run in a worker."""
    datasets.disable_progress_bars()
    try:
        run(protocol, **how)
    except Exception as error:
        return protocol.name, " ".join(str(error).split()) or type(error).__name__
    return protocol.name, None


@contextmanager
def _cluster(backend: str) -> Iterator[Any]:
    """What joblib takes for the backend, connected with its cluster."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    try:
        module = import_module(BACKENDS[backend])
    except ImportError as error:
        raise ValueError(
            f"the backend {backend} is not installed: pip install {BACKENDS[backend]}"
        ) from error
    if backend == "dask":
        if not (address := os.environ.get("DASK_SCHEDULER_ADDRESS")):
            raise ValueError(
                "which Dask cluster? Set DASK_SCHEDULER_ADDRESS to its scheduler's address, such "
                "as tcp://10.0.0.1:8786 (started with: dask scheduler; dask worker ADDRESS)"
            )
        with module.Client(address) as client:
            if max(client.nthreads().values(), default=1) > 1:
                raise ValueError("a run needs a process: start workers with --nthreads 1")
            yield _dask(client)
    else:
        if backend == "ray":
            import_module("ray.util.joblib").register_ray()
        yield backend


def _dask(client: Any) -> Any:
    """joblib's backend, which by itself waits for ever for a task that Dask has given up."""
    from joblib._dask import DaskDistributedBackend  # loads Dask

    class Backend(DaskDistributedBackend):
        def submit(self, func: Any, callback: Any) -> Future:
            ((_, (protocol, _), _),) = func.items

            def end(future: Future) -> None:
                if error := future.exception():
                    why = f"{type(error).__name__}: Dask has given it up after killed workers"
                    callback([(protocol.name, why)])

            future = super().submit(func, callback)
            future.add_done_callback(end)
            return future

        def effective_n_jobs(self, n_jobs: int) -> int:
            return max(2, super().effective_n_jobs(n_jobs))  # with 1, joblib would do it all here

    return Backend(client=client)
