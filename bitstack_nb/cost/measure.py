"""What locking costs beside plain training, in time and memory, measured in one process.

Works that are compared take turns, so that a busy machine slows all of them, and what is reported
is the median over rounds of their ratio. Memory is that of processes of their own (Linux).
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from bitstack_nb.cost.plain_masks import PlainMasks
from bitstack_nb.eligible import eligible_parameters
from bitstack_nb.select import kth_largest
from bitstack_nb.stack import BitStack

SPARSITY, ROWS, LENGTH = 0.12, 8, 128
# A fixed threshold, so that freed tensors go back to the system and do not count as used.
_HONEST = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Work:
    """Something that is timed: ``run``, within a context that is not."""

    run: Callable[[], Any]
    around: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class Times:
    """Seconds of works that took turns, by name, a number per round."""

    seconds: dict[str, list[float]]

    def ratio(self, name: str, base: str = "base") -> float:
        """The median over rounds of one work's time over another's."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return statistics.median(own / other for own, other in pairs)


def take_turns(
    works: Mapping[str, Work],
    *,
    rounds: int,
    device: torch.device,
    uncounted: int = 1,
    progress: bool = False,
) -> Times:
    """Run all works ``rounds`` times in turn, after some rounds that are not counted.

    Every other round is run backwards, so that what grows with time favours none.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in tqdm(range(uncounted + rounds), disable=not progress, unit="round"):
        order = list(works) if number % 2 else list(reversed(works))
        for name in order:
            with works[name].around():
                _wait(device)
                start = time.perf_counter()
                works[name].run()
                _wait(device)
                took = time.perf_counter() - start
            if number >= uncounted:
                seconds[name].append(took)
    return Times(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# The works ----------------------------------------------------------------------------------------


def gpt2(layers: int = 12, width: int = 768, *, seed: int = 0) -> nn.Module:
    """A GPT-2 classifier with random weights; the defaults are the 124 M parameters of ``gpt2``."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=max(1, width // 64), num_labels=4, pad_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2ForSequenceClassification(config)


def random_batch(model: nn.Module, *, seed: int) -> dict[str, torch.Tensor]:
    """ROWS x LENGTH random tokens with labels, on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, model.config.vocab_size, (ROWS, LENGTH), generator=generator)
    labels = torch.randint(0, model.config.num_labels, (ROWS,), generator=generator)
    return {"input_ids": ids.to(model.device), "labels": labels.to(model.device)}


def training_step(
    model: nn.Module, *, tasks: int = 5, rounds: int = 21, plainly: bool = True
) -> Times:
    """A step of AdamW with ``tasks`` tasks locked (``ours``, ``plain``) and without (``base``)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    stack = locked_stack(model, tasks=tasks)
    batch = random_batch(model.train(), seed=100)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    works = {
        "base": Work(step),
        "ours": Work(step, lambda: _attached(stack, optimizer)),
    }
    if plainly:
        plain = PlainMasks(model, eligible_parameters(model, None), sparsity=SPARSITY)
        plain.masks = dict(stack.masks)
        plain.saved = {n: p.detach().clone() for n, p in plain.parameters.items()}
        works["plain"] = Work(step, lambda: _attached(plain, optimizer))
    return take_turns(works, rounds=rounds, device=model.device)


@contextmanager
def _attached(masks: BitStack | PlainMasks, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    masks.attach(optimizer)
    yield
    masks.detach()


def locked_stack(model: nn.Module, *, tasks: int) -> BitStack:
    """A stack that has locked ``tasks`` tasks of random batches."""
    stack = BitStack(model, SPARSITY)
    for task in range(tasks):
        stack.update([random_batch(model, seed=task)], n_batches=1)
    return stack


def update(model: nn.Module, *, n_batches: int = 4, rounds: int = 7, plainly: bool = True) -> Times:
    """``update`` on some batches, and ``base``: forward and backward of the same batches."""
    batches = [random_batch(model, seed=seed) for seed in range(n_batches)]
    model.eval()

    def passes() -> None:
        for batch in batches:
            model.zero_grad()
            model(**batch).loss.backward()
        model.zero_grad()

    def ours() -> None:
        BitStack(model, SPARSITY).update(batches, n_batches=n_batches)

    def plain() -> None:
        PlainMasks(model, eligible_parameters(model, None), sparsity=SPARSITY).update(batches)

    works = {"base": Work(passes), "ours": Work(ours)}
    if plainly:
        works["plain"] = Work(plain)
    return take_turns(works, rounds=rounds, device=model.device)


def threshold(entries: int, *, rounds: int = 3, device: str = "cpu") -> Times:
    """The threshold over random scores, and ``base``: one pass of ``torch.sort``."""
    scores = random_scores(entries, device=device)
    k = round(SPARSITY * entries)

    def plain() -> None:
        torch.cat(scores).cpu().kthvalue(entries - k + 1)

    works = {
        "base": Work(lambda: torch.sort(torch.cat(scores))),
        "ours": Work(lambda: kth_largest(scores, k)),
        "plain": Work(plain),
    }
    return take_turns(works, rounds=rounds, device=torch.device(device))


def random_scores(entries: int, *, device: str = "cpu") -> list[torch.Tensor]:
    """Scores in tensors of the size of GPT-2's largest, as far apart as those of gradients."""
    generator = torch.Generator(device).manual_seed(0)
    size = 768 * 3072
    sizes = [min(size, entries - start) for start in range(0, entries, size)]
    return [torch.randn(n, generator=generator, device=device).exp_() for n in sizes]


def recall_switch(model: nn.Module, *, tasks: int = 5, rounds: int = 9) -> Times:
    """Two switches between tasks, halved (``ours``), and ``base``: a forward pass."""
    stack = BitStack(model.eval(), SPARSITY, mode="recall")
    for task in range(tasks):
        stack.begin([random_batch(model, seed=task)], n_batches=1, head_steps=0)
        stack.update()
    batch = random_batch(model, seed=100)

    @torch.no_grad()
    def forward() -> None:
        model(**batch)

    def there_and_back() -> None:
        with stack.recall(0):
            pass

    works = {"base": Work(forward), "ours": Work(there_and_back)}
    seconds = take_turns(works, rounds=rounds, device=model.device).seconds
    return Times(seconds | {"ours": [both / 2 for both in seconds["ours"]]})


def importing(*, rounds: int = 5) -> Times:
    """``import bitstack_nb`` (``ours``) and ``import torch`` (``base``), in new processes."""
    works = {
        name: Work(lambda module=module: _python(f"import {module}"))
        for name, module in {"base": "torch", "ours": "bitstack_nb"}.items()
    }
    return take_turns(works, rounds=rounds, device=torch.device("cpu"))


# Memory -------------------------------------------------------------------------------------------


def mask_bits(stack: BitStack) -> tuple[float, float]:
    """Bits per eligible entry that the masks of a stack take, in memory and in a file."""
    eligible = stack.stats()["eligible"]
    memory = sum(own.numel() for own in stack.state_dict()["bits"].values())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "masks.safetensors"
        stack.save(path, values=False)
        return 8 * memory / eligible, 8 * path.stat().st_size / eligible


def threshold_memory(entries: int, *, device: str = "cpu") -> float:
    """MiB that finding the threshold takes beside the scores, at its peak."""
    code = (
        "from bitstack_nb.cost import measure; "
        f"print(measure._threshold_peak({entries}, {device!r}))"
    )
    return float(_python(code))


def _threshold_peak(entries: int, device: str) -> float:
    scores = random_scores(entries, device=device)
    kth_largest(scores[:1], 1)  # what torch loads at the first call is not the method's
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
    else:
        torch.cuda.reset_peak_memory_stats()
    before = _used(device)
    kth_largest(scores, round(SPARSITY * entries))
    if device == "cpu":
        return _memory("VmHWM") - before
    return torch.cuda.max_memory_allocated() / 2**20 - before


def training_memory(
    *, layers: int = 12, width: int = 768, tasks: int = 5, device: str = "cpu"
) -> float:
    """Memory that training takes with a stack beyond that without, over what it may take.

    That is a bit per eligible entry, 4 bytes per locked one, and 32 MiB.
    """
    code = "from bitstack_nb.cost import measure; print(*measure._trained_memory({}, {}, {}, {!r}))"
    without, _ = map(float, _python(code.format(layers, width, 0, device)).split())
    with_stack, allowed = map(float, _python(code.format(layers, width, tasks, device)).split())
    return (with_stack - without) / allowed


def _trained_memory(layers: int, width: int, tasks: int, device: str) -> tuple[float, float]:
    """MiB resident after training, and what a stack may add to it."""
    model, allowed = gpt2(layers, width).to(device), 32.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    if tasks:
        stack = locked_stack(model, tasks=tasks)
        stack.attach(optimizer)
        stats = stack.stats()
        allowed += (stats["eligible"] / 8 + 4 * stats["locked"]) / 2**20
    for seed in range(2):
        model(**random_batch(model, seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    gc.collect()
    return _used(device), allowed


def _used(device: str) -> float:
    """MiB: resident memory of this process, or what its tensors take of the GPU's."""
    return _memory("VmRSS") if device == "cpu" else torch.cuda.memory_allocated() / 2**20


def _memory(field: str) -> float:
    """MiB of this process, from Linux's /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def _python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **_HONEST},
        cwd=Path(__file__).resolve().parents[2],
    )
    return done.stdout
