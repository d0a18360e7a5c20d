"""Tests of kernels.py in Triton's interpreter, on the CPU; `test_kernels` runs them in a process.

`TRITON_INTERPRET=1` has to be set before anything imports Triton. It also makes every stack use the
kernels, so `test_kernels` runs tests of the guarantee in the same process.
"""

import copy
import unittest
from collections import Counter
from unittest import mock

import test_stack
import tiny
import torch
from cases import ADAMW, LockedCase
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bitstack_nb import BitStack, bits, kernels
from bitstack_nb.importance import kth_largest

SIZES = (0, 1, 31, 32, 33, 257, kernels.BLOCK - 1, kernels.BLOCK, kernels.BLOCK + 1, 9000)
INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
# Everything eligible is contiguous: mix and the 0-dim gain would be handled tensor by tensor.
CONTIGUOUS = ["embed", "classifier", "mix"]


class AgainstMasks(unittest.TestCase):
    """Weights of random bits: NaNs with any payload, infinities, -0.0."""

    def setUp(self):
        self.random = torch.Generator().manual_seed(0)
        self.weights, self.masks = {}, {}
        for dtype, integer in INTEGERS.items():
            for size, share in zip(
                SIZES, (0.3, 1, 0.5, 0, 1, 0.1, 0.3, 0.5, 0.9, 0.3), strict=True
            ):
                name = f"{dtype} {size}"
                self.weights[name] = nn.Parameter(self.noise(size, integer).view(dtype))
                self.masks[name] = torch.rand(size, generator=self.random) < share
        special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1.0])
        self.weights["special"] = nn.Parameter(special)
        self.masks["special"] = torch.tensor([True] * 5 + [False])
        self.packed = {name: bits.pack(mask) for name, mask in self.masks.items()}
        self.before = self.patterns()

    def noise(self, size, integer):
        limits = torch.iinfo(integer)
        drawn = torch.randint(limits.min, limits.max, (size,), generator=self.random)
        return drawn.to(integer)

    def patterns(self):
        return {name: tiny.as_bits(weight).clone() for name, weight in self.weights.items()}

    def assert_weights(self, *, locked, free):
        for name, mask in self.masks.items():
            expected = torch.where(mask, locked[name], free[name])
            self.assertTrue(torch.equal(tiny.as_bits(self.weights[name]), expected), name)

    @torch.no_grad()
    def test_take_put_compare_and_zero(self):
        values = kernels.Fused(self.weights, self.packed).take(self.weights)
        for name, mask in self.masks.items():
            if name in values:
                taken = tiny.as_bits(values[name])
                self.assertTrue(torch.equal(taken, self.before[name][mask]), name)
        self.assertEqual({len(self.before[name]) for name in self.weights.keys() - values}, {0})
        fused = kernels.Fused(self.weights, self.packed, values)
        self.assertEqual(set(fused.compare(self.weights).values()), {0})

        for weight in self.weights.values():
            weight.copy_(self.noise(len(weight), INTEGERS[weight.dtype]).view(weight.dtype))
        moved = self.patterns()
        differ = {
            n: int((moved[n] != self.before[n])[mask].sum()) for n, mask in self.masks.items()
        }
        found = fused.compare(self.weights)
        self.assertEqual(found, {name: differ[name] for name in found})
        self.assertGreater(sum(found.values()), 1000)
        self.assertEqual(set(fused.put(self.weights)), self.weights.keys() - values)
        self.assert_weights(locked=self.before, free=moved)

        zeros = {name: torch.zeros_like(pattern) for name, pattern in moved.items()}
        fused.zero(self.weights)
        self.assert_weights(locked=zeros, free=moved)

    @torch.no_grad()
    def test_only_the_given_tensors_and_only_what_fits(self):
        some = dict(list(self.weights.items())[5:8])
        elsewhere = {"torch.float16 33": self.packed["torch.float16 33"].to("meta")}
        fused = kernels.Fused(self.weights, self.packed | elsewhere)
        self.assertEqual(fused.zero(some), [])
        changed = {n for n, b in self.patterns().items() if not torch.equal(b, self.before[n])}
        self.assertEqual(changed, set(some))
        strange = {
            "special": torch.ones(12)[::2],  # not contiguous
            "torch.float32 33": torch.ones(33, dtype=torch.float64),
            "torch.float16 33": torch.ones(33, dtype=torch.float16),
            "unknown": torch.ones(3),
        }
        self.assertEqual(fused.zero(strange), list(strange))
        self.assertTrue(all(tensor.all() for tensor in strange.values()))

    def test_threshold(self):
        scores = [torch.rand(size, generator=self.random).floor_divide(1e-4) for size in SIZES]
        ordered = torch.cat(scores).sort(descending=True).values
        for k in (1, 4096, len(ordered) // 2, len(ordered)):
            self.assertEqual(kth_largest(scores, k), ordered[k - 1])


class Count(TorchDispatchMode):
    """Counts torch's operations."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.total += 1
        return func(*args, **kwargs or {})


class Steps(LockedCase):
    def setUp(self):
        """Counts launches, by kernel."""
        self.launches, launch = Counter(), kernels._Tables.launch

        def counted(group, kernel, *arguments, **constants):
            self.launches[kernel.__name__] += 1
            launch(group, kernel, *arguments, **constants)

        self.enterContext(mock.patch.object(kernels._Tables, "launch", counted))

    def locked(self, depth=2):
        model = tiny.plain(depth=depth)
        optimizer = ADAMW(model.parameters())
        stack = BitStack(model, 0.3, CONTIGUOUS)
        stack.update(tiny.batches(2, seed=0))
        stack.attach(optimizer)
        return model, optimizer, stack

    def test_launches_do_not_grow_with_the_number_of_tensors(self):
        added = []
        for depth in (2, 6):
            operations = []
            model, optimizer, stack = self.locked(depth)
            tiny.train(model, optimizer, tiny.batches(1, seed=1))
            for _ in range(2):  # with the stack, then without
                self.launches.clear()
                with Count() as count:
                    tiny.train(model, optimizer, tiny.batches(1, seed=1))
                operations.append(count.total)
                self.assertEqual(self.launches.total(), 2 if stack.handles else 0)
                stack.detach()
            added.append(operations[0] - operations[1])
        self.assertEqual(added[0], added[1])

    def test_every_step_as_the_reference(self):
        test_stack.AgainstReference().compare("gpt2", "union", sparsity=0.12)
        self.assertGreater(self.launches["put_kernel"], 0)

    def test_an_update_and_verify(self):
        model, _, stack = self.locked()
        self.launches.clear()
        stack.verify()
        self.assertEqual(self.launches, {"count_kernel": 1, "compare_kernel": 1})
        self.launches.clear()
        stack.update(tiny.batches(2, seed=1))
        self.assertEqual(
            self.launches, {"histogram_kernel": 2, "count_kernel": 1, "take_kernel": 1}
        )
        self.assertEqual(stack.verify(), 0)
        with torch.no_grad():
            model.blocks[0].up.weight += 1
        self.assertEqual(set(stack._locks.moved()), {"blocks.0.up.weight"})

    def test_hooks_are_counted_and_gradients_zeroed_at_the_end(self):
        model, _, stack = self.locked()
        name = "blocks.0.up.weight"
        seen = []
        model.get_parameter(name).register_hook(lambda gradient: seen.append(gradient.clone()))
        model(**tiny.batches(1, seed=1)[0]).loss.backward()
        self.assertEqual(self.launches["zero_kernel"], 1)
        self.assertTrue(seen[0][stack.masks[name]].any())  # as documented in docs/cost.md
        for name, mask in stack.masks.items():
            gradient = model.get_parameter(name).grad
            self.assertFalse(gradient[mask].any())
            self.assertEqual(stack.hook_calls[name], 1)

    def test_gradients_that_go_to_the_caller(self):
        model, _, stack = self.locked()
        weights = [model.get_parameter(name) for name in stack.handles]
        loss = model(**tiny.batches(1, seed=1)[0]).loss
        gradients = torch.autograd.grad(loss, weights)
        for name, gradient in zip(stack.handles, gradients, strict=True):
            self.assertFalse(gradient[stack.masks[name]].any())

    def test_an_interrupted_backward(self):
        model, optimizer, stack = self.locked()
        model.embed.weight.register_hook(lambda _: 1 / 0)  # the last of all
        before = tiny.snapshot(model)
        with self.assertRaises(ZeroDivisionError):
            model(**tiny.batches(1, seed=1)[0]).loss.backward()
        optimizer.step()
        self.assert_held(stack, model, before, moving=0.1)
        for name, mask in stack.masks.items():
            self.assertFalse(model.get_parameter(name).grad[mask].any())

    def test_a_copy_has_tables_of_its_own(self):
        model, optimizer, stack = self.locked()
        tiny.train(model, optimizer, tiny.batches(1, seed=1))
        other, others = copy.deepcopy((model, stack))
        before = tiny.snapshot(model)
        optimizer = ADAMW(other.parameters())
        others.attach(optimizer)
        start = tiny.snapshot(other)
        tiny.train(other, optimizer, tiny.batches(2, seed=1))
        self.assert_held(others, other, start)
        self.assertFalse(any(c.any() for c in tiny.changed(model, before).values()))


if __name__ == "__main__":
    unittest.main()
