"""Costs that are measured in new processes: memory, and the time of the import."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bitstack_nb.cost import measure
from bitstack_nb.importance import kth_largest
from bitstack_nb.recall import ExactRecall
from bitstack_nb.stack import BitStack

# With a fixed threshold freed tensors go back to the system at once and do not count as used.
_RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def importing(*, rounds: int = 5) -> measure.Times:
    """The import of ``BitStack`` (``ours``), and ``base``: the import of torch."""
    code = {"base": "import torch", "ours": "from bitstack_nb import BitStack"}
    works = {name: measure.Work(lambda line=line: run_python(line)) for name, line in code.items()}
    return measure.take_turns(works, rounds=rounds, device="cpu")


def mask_bits(stack: BitStack) -> tuple[float, float]:
    """Bits per eligible weight that the masks of a stack take, in memory and in a file."""
    eligible = stack.stats()["eligible"]
    memory = sum(own.numel() for own in stack.state_dict()["bits"].values())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "masks.safetensors"
        stack.save(path, values=False)
        return 8 * memory / eligible, 8 * path.stat().st_size / eligible


def threshold_memory(weights: int, *, device: str = "cpu") -> float:
    """Peak memory of finding the threshold, in MiB beside the scores (on the CPU: Linux only)."""
    code = f"print(processes._threshold_peak({weights}, {device!r}))"
    return float(_python(code))


def _threshold_peak(weights: int, device: str) -> float:
    scores = measure.random_scores(weights, device=device)
    kth_largest(scores[:1], 1)  # the first call makes torch load libraries
    before = _start_peak(device)
    kth_largest(scores, round(measure.SPARSITY * weights))
    return _peak(device) - before


def training_memory(
    *, layers: int = 12, width: int = 768, tasks: int = 5, device: str = "cpu"
) -> float:
    """Memory that a stack adds to training, as a share of what it may add.

    It may add a bit per eligible weight, 4 bytes per locked weight, and 32 MiB.
    """
    code = "print(*processes._trained_memory({}, {}, {}, {!r}))"
    without, _ = map(float, _python(code.format(layers, width, 0, device)).split())
    with_stack, allowed = map(float, _python(code.format(layers, width, tasks, device)).split())
    return (with_stack - without) / allowed


def _trained_memory(layers: int, width: int, tasks: int, device: str) -> tuple[float, float]:
    """MiB that training has taken, and MiB that a stack may add."""
    model, allowed = measure.gpt2(layers, width).to(device), 32.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    if tasks:
        stack = measure.locked_stack(model, tasks=tasks)
        stack.attach(optimizer)
        stats = stack.stats()
        allowed += (stats["eligible"] / 8 + 4 * stats["locked"]) / 2**20
    for seed in range(2):
        model(**measure.random_batch(model, seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    gc.collect()
    return _used(device), allowed


def recall_memory(*, layers: int = 12, width: int = 768, device: str = "cpu") -> float:
    """Peak memory of training in exact recall, in MiB beside the model (on the CPU: Linux only)."""
    return float(_python(f"print(processes._recall_peak({layers}, {width}, {device!r}))"))


def _recall_peak(layers: int, width: int, device: str) -> float:
    model = measure.gpt2(layers, width).to(device).train()
    # A short batch, so that the peak is not that of the activations.
    batch = measure.random_batch(model, seed=0, rows=1, length=8)
    with torch.no_grad():
        model(**batch)  # the first call makes torch load libraries
    gc.collect()
    before = _start_peak(device)
    tasks = ExactRecall(model, measure.OWN)
    tasks.begin("task")
    optimizer = torch.optim.AdamW(tasks.parameters(lr=1e-5))
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return _peak(device) - before


def _start_peak(device: str) -> float:
    """Start a new peak; the memory used now, in MiB."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()
    return _used(device)


def _peak(device: str) -> float:
    """The peak since it was started, in MiB."""
    return _memory("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20


def _used(device: str) -> float:
    """MiB: the memory of this process, or on a GPU that of its tensors."""
    return _memory("VmRSS") if device == "cpu" else torch.cuda.memory_allocated() / 2**20


def _memory(field: str) -> float:
    """A field of Linux's ``/proc/self/status``, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def _python(code: str) -> str:
    return run_python(f"from bitstack_nb.cost import processes; {code}")


def run_python(code: str) -> str:
    """Run code in a new process that has this package; its output."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **_RETURN_FREED},
        cwd=Path(__file__).resolve().parents[2],
    )
    return done.stdout
