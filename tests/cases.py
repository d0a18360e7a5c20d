"""What several test files of the method start from and check."""

import tempfile
import unittest
from functools import partial
from pathlib import Path

import tiny
import torch

from bitstack_nb import BitStack

ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)


class LockedCase(unittest.TestCase):
    def locked_model(self, make_optimizer=ADAMW, *, build=tiny.plain, sparsity=0.3):
        """A model trained a little, locked and attached: the optimizer's state is live."""
        model = build()
        optimizer = make_optimizer(model.parameters())
        tiny.train(model, optimizer, tiny.batches(3, seed=0))
        stack = BitStack(model, sparsity)
        stack.update(tiny.batches(2, seed=0))
        stack.attach(optimizer)
        return model, optimizer, stack

    def assert_held(self, stack, model, before, *, moving: float = 0.5):
        """No locked entry changed a bit; of the free ones at least the share `moving` did."""
        changed = tiny.changed(model, before)
        free = moved = locked = 0
        for name, mask in stack.masks.items():
            self.assertFalse(changed[name][mask].any(), f"locked entries of {name} moved")
            locked += int(mask.sum())
            free += int((~mask).sum())
            moved += int(changed[name].sum())
        self.assertGreater(locked, 0)
        self.assertGreaterEqual(moved, moving * free)
        self.assertEqual(stack.verify(), 0)


class FileCase(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.path = self.folder / "stack.safetensors"

    def locked(self, model=None, *, sparsity=0.1, tasks=2, **settings) -> BitStack:
        stack = BitStack(tiny.plain() if model is None else model, sparsity, **settings)
        for task in range(tasks):
            stack.update(tiny.batches(2, seed=task))
        return stack

    def assert_same(self, found: BitStack, expected: BitStack):
        self.assertEqual(list(found.masks), list(expected.masks))
        for name, mask in expected.masks.items():
            self.assertTrue(torch.equal(found.masks[name], mask), name)
        self.assertEqual(found.stats(), expected.stats())
        self.assertTrue(found.layer_table().equals(expected.layer_table()))
        self.assertEqual(set(found.handles), set(expected.handles))
