"""Functions run in several connected processes, as torchrun starts them: gloo, on the CPU."""

import os
import socket
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Its default arguments keep the process group that stands when it is first imported, which torch
# would do at the first optimizer. A group that outlives its rank can abort the interpreter.
import torch.distributed.nn.functional


def in_processes(work: Callable[..., Any], *arguments: Any, count: int = 2) -> list[Any]:
    """What ``work(*arguments)``, a function of a module, returns on each rank, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        given = (count, _free_port(), Path(folder), work, arguments)
        torch.multiprocessing.spawn(_run, given, nprocs=count)
        return [torch.load(Path(folder) / str(r), weights_only=False) for r in range(count)]


def _run(rank, count, port, folder, work, arguments):
    torch.set_num_threads(1)
    # What torchrun sets, but for its own mark: accelerate looks for them.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "HF_HUB_OFFLINE": "1"}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    # Hanging ranks must fail the test, but slowly: the machine may be busy.
    dist.init_process_group("gloo", timeout=timedelta(minutes=3))
    torch.save(work(*arguments), folder / str(rank))
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
