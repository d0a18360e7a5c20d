"""Time that locking costs beside plain training.

Pieces of work that are compared take turns in one process, so that a busy machine slows all of
them. The result is the median over rounds of their ratio.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from bitstack_nb.eligible import eligible_parameters
from bitstack_nb.importance import kth_largest
from bitstack_nb.recall import ExactRecall
from bitstack_nb.reference import PlainBitStack
from bitstack_nb.stack import BitStack

SPARSITY, ROWS, LENGTH = 0.12, 8, 128
OWN = 0.05  # the share of a task's own weights in exact recall


@dataclass(frozen=True)
class Work:
    """A piece of work: ``run`` is timed, entering and leaving ``around`` is not."""

    run: Callable[[], Any]
    around: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class Times:
    """Seconds per round of each piece of work, by name."""

    seconds: dict[str, list[float]]

    def ratio(self, name: str) -> float:
        """The median over rounds of a work's time over that of ``base``."""
        pairs = zip(self.seconds[name], self.seconds["base"], strict=True)
        return statistics.median(own / base for own, base in pairs)


def take_turns(works: Mapping[str, Work], *, rounds: int, device: torch.device | str) -> Times:
    """Run all works in turn, ``rounds`` times after a first round that is not counted.

    Every other round has the reverse order, so that no work always runs first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name in list(works) if number % 2 else reversed(works):
            with works[name].around():
                _wait(device)
                start = time.perf_counter()
                works[name].run()
                _wait(device)
                took = time.perf_counter() - start
            if number:
                seconds[name].append(took)
    return Times(seconds)


def _wait(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


# A model, batches, a stack and scores to measure with --------------------------------------------


def gpt2(layers: int = 12, width: int = 768, *, seed: int = 0) -> nn.Module:
    """A GPT-2 classifier with random weights; the defaults are the 124 M parameters of ``gpt2``."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=max(1, width // 64), num_labels=4, pad_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2ForSequenceClassification(config)


def minilm(*, seed: int = 0) -> nn.Module:
    """A classifier of MiniLM-L6's architecture (22.7 M parameters) with random weights."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536, num_labels=4)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertForSequenceClassification(config)


def random_batch(
    model: nn.Module, *, seed: int, rows: int = ROWS, length: int = LENGTH
) -> dict[str, torch.Tensor]:
    """Random tokens with labels, on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, model.config.vocab_size, (rows, length), generator=generator)
    labels = torch.randint(0, model.config.num_labels, (rows,), generator=generator)
    return {"input_ids": ids.to(model.device), "labels": labels.to(model.device)}


def locked_stack(model: nn.Module, *, tasks: int) -> BitStack:
    """A stack that has locked ``tasks`` tasks, each measured on one random batch."""
    stack = BitStack(model, SPARSITY)
    for task in range(tasks):
        stack.update([random_batch(model, seed=task)], n_batches=1)
    return stack


def random_scores(weights: int, *, device: str = "cpu") -> list[torch.Tensor]:
    """Random scores in tensors as large as GPT-2's largest, spread as widely as gradients."""
    generator = torch.Generator(device).manual_seed(0)
    size = 768 * 3072
    sizes = [min(size, weights - start) for start in range(0, weights, size)]
    return [torch.randn(n, generator=generator, device=device).exp_() for n in sizes]


# Works --------------------------------------------------------------------------------------------


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

    works = {"base": Work(step), "ours": Work(step, lambda: _attached(stack, optimizer))}
    if plainly:
        plain = PlainBitStack(model, eligible_parameters(model, None), sparsity=SPARSITY)
        plain.masks = dict(stack.masks)
        plain.values = {n: p.detach().clone() for n, p in plain.parameters.items()}
        works["plain"] = Work(step, lambda: _attached(plain, optimizer))
    return take_turns(works, rounds=rounds, device=model.device)


@contextmanager
def _attached(masks: BitStack | PlainBitStack, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    masks.attach(optimizer)
    yield
    masks.detach()


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
        stack = BitStack(model, SPARSITY)
        stack.update(batches, n_batches=n_batches)
        stack.detach()  # or its hooks would slow the other works down

    def plain() -> None:
        PlainBitStack(model, eligible_parameters(model, None), sparsity=SPARSITY).update(batches)

    works = {"base": Work(passes), "ours": Work(ours)}
    if plainly:
        works["plain"] = Work(plain)
    return take_turns(works, rounds=rounds, device=model.device)


def recall_step(model: nn.Module, *, rounds: int = 21) -> Times:
    """A step of AdamW in a task of exact recall (``ours``), and of plain training (``base``)."""
    twin = copy.deepcopy(model).train()
    tasks = ExactRecall(model.train(), OWN)
    tasks.begin("task")
    batch = random_batch(model, seed=100)

    def step(trained: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        trained(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    plain = torch.optim.AdamW(twin.parameters(), lr=1e-5)
    own = torch.optim.AdamW(tasks.parameters(lr=1e-5))
    works = {"base": Work(partial(step, twin, plain)), "ours": Work(partial(step, model, own))}
    return take_turns(works, rounds=rounds, device=model.device)


def optimizer_state(model: nn.Module) -> float:
    """Bytes that AdamW keeps for each own weight of a task of exact recall, without the head's."""
    tasks = ExactRecall(model, OWN)
    tasks.begin("task")
    own, head = tasks.parameters(lr=1e-5)
    optimizer = torch.optim.AdamW([own, head])
    model(**random_batch(model, seed=100, rows=1, length=8)).loss.backward()
    optimizer.step()
    state = [t for weight in own["params"] for t in optimizer.state[weight].values()]
    weights = sum(weight.numel() for weight in own["params"])
    return sum(t.numel() * t.element_size() for t in state) / weights


def recall_switch(
    model: nn.Module,
    *,
    tasks: int = 5,
    rounds: int = 9,
    sparsity: float = SPARSITY,
    rows: int = ROWS,
    length: int = LENGTH,
) -> Times:
    """One switch of the model to another task (``ours``), and ``base``: a forward pass."""
    recall = ExactRecall(model.eval(), sparsity)
    for task in range(tasks):
        recall.begin(str(task))
        recall.close()
    batch = random_batch(model, seed=100, rows=rows, length=length)

    @torch.no_grad()
    def forward() -> None:
        model(**batch)

    def there_and_back() -> None:
        recall.switch("0")
        recall.switch("1")

    works = {"base": Work(forward), "ours": Work(there_and_back)}
    seconds = take_turns(works, rounds=rounds, device=model.device).seconds
    return Times(seconds | {"ours": [both / 2 for both in seconds["ours"]]})


def threshold(weights: int, *, rounds: int = 3, device: str = "cpu") -> Times:
    """The exact threshold of random scores, and ``base``: one call of ``torch.sort``."""
    scores = random_scores(weights, device=device)
    k = round(SPARSITY * weights)
    works = {
        "base": Work(lambda: torch.sort(torch.cat(scores))),
        "ours": Work(lambda: kth_largest(scores, k)),
        "plain": Work(lambda: torch.cat(scores).cpu().kthvalue(weights - k + 1)),
    }
    return take_turns(works, rounds=rounds, device=device)
