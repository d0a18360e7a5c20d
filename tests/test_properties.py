"""Any module, any order of calls: what is locked keeps its bits, counts are exact, free is free.

Hypothesis draws module trees (dtypes, shapes from empty to odd primes, ties), settings and
sequences of calls; plain bool masks and copies of values say what must hold.
"""

import copy
import tempfile
import unittest
from math import prod
from pathlib import Path
from types import SimpleNamespace

import tiny
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from bitstack_nb import BitStack, ExactRecall, bits
from bitstack_nb.guard import LockedWeightsMoved

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = st.sampled_from([0, 1, 2, 3, 5, 7, 8, 13, 17, 31])
SHAPES = st.lists(SIZES, max_size=3).filter(lambda shape: prod(shape) < 600)
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9, weight_decay=0.1),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.5, weight_decay=0.1),
}
# The same draws each time, so that a failure is one for everybody.
settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
settings.load_profile("fixed")

CHECK = unittest.TestCase()


class Tree(nn.Module):
    """Parameters of any shapes, some in submodules, one tied; a loss that is linear in each."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype, tied: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Module() for _ in range(2))
        for number, shape in enumerate(shapes):
            axes = tuple(range(len(shape)))[::-1]
            made = torch.randn(shape[::-1]).permute(axes)  # not contiguous
            setattr(self.blocks[number % 2], f"p{number}", nn.Parameter(made.to(dtype)))
        if tied:
            self.blocks[1].again = self.blocks[0].p0
        self.classifier = nn.Linear(2, 2).to(dtype)

    def forward(self, seed, labels):
        generator, loss = torch.Generator().manual_seed(int(seed)), 0.0
        for parameter in self.parameters():
            factors = torch.randn(parameter.shape, generator=generator)
            factors[torch.rand(parameter.shape, generator=generator) < 0.2] = 0  # does not matter
            loss = loss + (parameter.float() * factors).sum() * labels
        return SimpleNamespace(loss=loss)


def batches(seed: int) -> list[dict[str, torch.Tensor]]:
    return [{"seed": torch.tensor(seed + n), "labels": torch.tensor(1.0)} for n in range(2)]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return tiny.as_bits(one) == tiny.as_bits(other)


class Machine(RuleBasedStateMachine):
    """What both methods share: a tree, one optimizer, and files."""

    method: type = BitStack

    @initialize(
        shapes=st.lists(SHAPES, min_size=1, max_size=4),
        dtype=st.sampled_from(DTYPES),
        sparsity=st.sampled_from([0.0, 0.05, 0.12, 0.3, 0.5, 1.0]),
        tied=st.booleans(),
        optimizer=st.sampled_from(sorted(OPTIMIZERS)),
        budget=st.sampled_from(["union", "fresh"]),
    )
    def make(self, shapes, dtype, sparsity, tied, optimizer, budget):
        shapes = [(3, 5), *map(tuple, shapes)]  # never without an entry
        self.fresh = tiny.seeded(lambda: Tree(shapes, dtype, tied), len(shapes))
        self.make_optimizer = OPTIMIZERS[optimizer]
        protect = self.method is BitStack
        self.settings = {"budget": budget} if protect else {"importance": "gradient"}
        self.sparsity = sparsity if protect else max(sparsity, 0.05)
        model = copy.deepcopy(self.fresh)
        self.names = [n for n, _ in model.named_parameters() if n.startswith("blocks.")]
        self.use(model, self.method(model, self.sparsity, **self.settings))
        self.eligible = sum(p.numel() for p in self.values().values())
        self.prepare()

    def use(self, model, stack):
        self.model, self.stack = model, stack
        self.optimizer, self.attached = self.make_optimizer(model.parameters()), False

    def values(self):
        return {name: self.model.get_parameter(name) for name in self.names}

    def steps(self, seed):
        for batch in batches(seed):
            self.optimizer.zero_grad()
            self.model(**batch).loss.backward()
            self.optimizer.step()

    def chosen(self, scores, budget, *, ties):
        """The largest scores over all tensors together, by sorting them."""
        everything = torch.cat([score.flatten() for score in scores.values()])
        order = torch.sort(everything, descending=True, stable=True)
        if ties and budget:
            taken = everything >= order.values[budget - 1]
        else:
            taken = torch.zeros_like(everything, dtype=torch.bool)
            taken[order.indices[:budget]] = True
        parts = (taken & (everything > 0)).split([s.numel() for s in scores.values()])
        return {n: part.view(s.shape) for (n, s), part in zip(scores.items(), parts, strict=True)}

    def saved(self) -> Path:
        with tempfile.TemporaryDirectory() as folder:
            self.stack.save(path := Path(folder) / "stack.safetensors")
            self.use(model := self.to_load_onto(), self.method.load(path, model))


class Protect(Machine):
    """``BitStack``."""

    def prepare(self):
        assert list(self.stack.masks) == self.names
        self.masks = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in self.values().items()}
        self.locked = {n: p.detach().clone() for n, p in self.values().items()}

    def to_load_onto(self):
        return copy.deepcopy(self.fresh)

    @rule()
    def attach(self):
        self.stack.attach(self.optimizer)
        self.attached = True

    @rule()
    def detach(self):
        self.stack.detach()
        assert not any(p._backward_hooks for p in self.model.parameters())
        self.attached = False

    @rule(seed=st.integers(0, 99))
    def update(self, seed):
        scores = self.stack.measure(batches(seed))
        if self.settings["budget"] == "fresh":
            scores = {n: s.masked_fill(self.masks[n], 0) for n, s in scores.items()}
        chosen = self.chosen(scores, round(self.sparsity * self.eligible), ties=True)
        before = tiny.snapshot(self.model)
        self.stack.update(batches(seed))
        assert not any(c.any() for c in tiny.changed(self.model, before).values())
        for name, value in self.values().items():
            new = chosen[name] & ~self.masks[name]
            self.locked[name][new] = value.detach()[new]
            self.masks[name] |= chosen[name]

    @rule(seed=st.integers(0, 99))
    def train(self, seed):
        self.steps(seed)
        if self.attached:
            assert self.moved() == 0
            assert not any(p.grad[self.masks[n]].any() for n, p in self.values().items())

    @rule()
    def move(self):
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(1.0)

    @rule()
    def restore(self):
        before = tiny.snapshot(self.model)
        self.stack.restore()
        assert self.moved() == 0
        for name, changed in tiny.changed(self.model, before).items():
            free = ~self.masks[name] if name in self.masks else torch.ones_like(changed)
            if name in dict(self.model.named_parameters()):  # a tied one has two names
                assert not changed[free].any()

    @rule()
    def save_and_load(self):
        self.saved()
        assert self.moved() == 0

    def moved(self):
        return sum(
            int((~same_bits(value, self.locked[name]))[self.masks[name]].sum())
            for name, value in self.values().items()
        )

    @invariant()
    def the_books_are_right(self):
        locked = sum(int(mask.sum()) for mask in self.masks.values())
        assert self.stack.stats()["locked"] == locked
        table = self.stack.layer_table()
        assert table["added"].sum() == locked
        for name, mask in self.stack.masks.items():
            assert torch.equal(mask, self.masks[name])
            assert self.stack.state_dict()["bits"][name].numel() == bits.packed_size(mask.shape)
        if moved := self.moved():
            with CHECK.assertRaisesRegex(LockedWeightsMoved, f"^{moved:,} "):
                self.stack.verify()
        else:
            assert self.stack.verify() == 0


class Recall(Machine):
    """``ExactRecall``."""

    method = ExactRecall

    def prepare(self):
        self.base = {n: p.detach().clone() for n, p in self.values().items()}
        self.tasks = []  # the whole of each closed task's model
        self.is_open, self.shown = False, None

    def to_load_onto(self):
        return copy.deepcopy(self.fresh)

    @precondition(lambda self: not self.is_open)
    @rule(seed=st.integers(0, 99))
    def begin(self, seed):
        self.stack.begin(str(len(self.tasks)), loader=batches(seed), head_steps=1, seed=seed)
        assert all(same_bits(p, self.base[n]).all() for n, p in self.values().items())
        self.is_open, self.shown = True, len(self.tasks)

    @precondition(lambda self: self.is_open)
    @rule(keep=st.booleans())
    def end(self, keep):
        self.stack.switch(str(len(self.tasks)))
        if keep:
            self.stack.close()
            self.tasks.append({n: p.detach().clone() for n, p in self.values().items()})
        else:
            self.stack.abandon()
        self.is_open, self.shown = False, len(self.tasks) - 1 if keep else None

    @precondition(lambda self: self.is_open)
    @rule(seed=st.integers(0, 99))
    def train(self, seed):
        self.optimizer = self.make_optimizer(self.stack.parameters())
        before = {n: p.detach().clone() for n, p in self.values().items()}
        self.steps(seed)
        own = self.stack.mask(str(len(self.tasks)))
        for name, value in self.values().items():
            fixed = ~own[name] if self.shown == len(self.tasks) else torch.ones_like(own[name])
            assert same_bits(value, before[name])[fixed].all()

    @precondition(lambda self: not self.is_open)
    @rule()
    def save_and_load(self):
        self.stack.switch(None)
        self.saved()
        self.shown = None

    @rule(data=st.data())
    def switch(self, data):
        tasks = [None, *range(len(self.tasks) + self.is_open)]
        self.shown = data.draw(st.sampled_from(tasks))
        self.stack.switch(None if self.shown is None else str(self.shown))

    @invariant()
    def the_model_is_the_shown_tasks(self):
        assert self.stack.verify() == 0
        if self.shown is None or self.shown < len(self.tasks):
            expected = self.base if self.shown is None else self.tasks[self.shown]
            assert all(same_bits(p, expected[n]).all() for n, p in self.values().items())
        union = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in self.values().items()}
        for number, values in enumerate(self.tasks):
            for name, own in self.stack.mask(str(number)).items():
                assert same_bits(values[name], self.base[name])[~own].all()
                union[name] |= own
        if not self.is_open:
            assert self.stack.stats()["locked"] == sum(int(m.sum()) for m in union.values())


FEW = settings(max_examples=20, stateful_step_count=15, suppress_health_check=list(HealthCheck))
TestProtect, TestRecall = Protect.TestCase, Recall.TestCase
TestProtect.settings = TestRecall.settings = FEW
