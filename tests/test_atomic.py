"""update: it leaves everything but the masks alone, and a failed one leaves those too."""

import random
import unittest
from types import SimpleNamespace

import numpy as np
import tiny
import torch
from torch import nn

from bitstack_nb import BitStack


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def plain_bytes(tensor) -> bytes | None:
    return None if tensor is None else tiny.as_bits(tensor).numpy().tobytes()


def everything(model: nn.Module, stack: BitStack) -> dict:
    """All that a failed update must leave alone, in comparable form."""
    named = list(model.named_parameters())
    return {
        "values": {n: plain_bytes(t) for n, t in model.state_dict().items()},
        "gradients": {n: plain_bytes(p.grad) for n, p in named},
        "gradient objects": {n: id(p.grad) for n, p in named},
        "requires_grad": {n: p.requires_grad for n, p in named},
        "training": {n: m.training for n, m in model.named_modules()},
        "rng": (plain_bytes(torch.get_rng_state()), random.getstate(), str(np.random.get_state())),
        "grad mode": torch.is_grad_enabled(),
        "masks": {n: plain_bytes(m) for n, m in stack.masks.items()},
        "handles": sorted(stack.handles),
        "calls": dict(stack.hook_calls),
        "stats": stack.stats(),
        "table": stack.layer_table().to_csv(),
    }


class Atomicity(unittest.TestCase):
    """Each bad update raises an error that says why, and everything is as it was."""

    def check(self, error, pattern, loader, *, update=True, **arguments):
        model = tiny.plain()
        model.blocks[0].norm.bias.requires_grad_(False)
        optimizer = adamw(model)
        stack = BitStack(model, 0.1)
        stack.attach(optimizer)
        if update:
            stack.update(tiny.batches(2, seed=0))
        tiny.train(model, optimizer, tiny.batches(1, seed=3))
        model.train()
        model.blocks[1].eval()
        before = everything(model, stack)
        with self.assertRaisesRegex(error, pattern):
            stack.update(loader, **arguments)
        after = everything(model, stack)
        for part, value in before.items():
            self.assertEqual(value, after[part], part)
        # The guarantee still works, and so does the next good update.
        moved_from = tiny.snapshot(model)
        tiny.train(model, optimizer, tiny.batches(2, seed=4))
        self.assertEqual(stack.verify(), 0)
        for name, mask in stack.masks.items():
            self.assertFalse(tiny.changed(model, moved_from)[name][mask].any())
        self.assertGreater(stack.update(tiny.batches(2, seed=5))["locked"], 0)

    def test_bad_loaders(self):
        good, bad = tiny.batches(2, seed=1)
        unlabelled = {key: value for key, value in bad.items() if key != "labels"}

        class Failing:
            def __iter__(self):
                yield good
                raise OSError("disk gone")

        usual = (TypeError, ValueError)
        for name, (error, pattern, loader) in {
            "empty": (ValueError, "(?i)empty|no batch", []),
            "empty stream": (ValueError, "(?i)empty|no batch", map(len, ())),
            "not iterable": (usual, "(?i)loader", 3),
            "none": (usual, "(?i)loader", None),
            "tuple batches": (usual, "(?i)mapping.*tuple|tuple.*mapping", [tuple(bad.values())]),
            "no labels": (ValueError, "labels", [unlabelled]),
            "second has none": (ValueError, "labels", [good, unlabelled]),
            "loader fails": (OSError, "disk gone", Failing()),
            "model fails": (Exception, "", [good, {**bad, "input_ids": bad["input_ids"] + 999}]),
        }.items():
            for update in (True, False):
                with self.subTest(name, after_an_update=update):
                    self.check(error, pattern, loader, update=update)

    def test_importance_that_is_not_finite(self):
        good, bad = tiny.batches(2, seed=1)
        for scale in (float("nan"), float("inf"), -float("inf")):
            with self.subTest(scale):
                loader = [good, {**bad, "loss_scale": scale}]
                self.check(ValueError, r"blocks\.\d\.", loader)

    def test_n_batches(self):
        for n_batches in (0, -3, 1.5, "4", None):
            with self.subTest(n_batches):
                loader = tiny.batches(1, seed=1)
                pattern = str(n_batches).replace(".", r"\.")
                self.check((TypeError, ValueError), pattern, loader, n_batches=n_batches)

    def test_models_without_loss_or_gradient(self):
        x = torch.ones(1)
        for name, (function, pattern) in {
            "no loss": (lambda m: SimpleNamespace(logits=x), "loss"),
            "loss is None": (lambda m: SimpleNamespace(loss=None), "loss"),
            "a tensor": (lambda m: m.body.weight.sum(), "loss"),
            "detached": (lambda m: SimpleNamespace(loss=m.body.weight.sum().detach()), "(?i)grad"),
            "head only": (lambda m: SimpleNamespace(loss=m.classifier.weight.sum()), "(?i)grad"),
            "zero": (lambda m: SimpleNamespace(loss=0 * m.body.weight.sum()), "(?i)grad"),
        }.items():
            with self.subTest(name):
                model = tiny.Body(function).train()
                stack = BitStack(model, 0.5)
                before = everything(model, stack)
                with self.assertRaisesRegex((TypeError, ValueError), pattern):
                    stack.update([{"x": x, "labels": x}])
                self.assertEqual(before, everything(model, stack))

    def test_a_backbone_frozen_after_the_stack_was_made(self):
        model = tiny.plain()
        stack = BitStack(model, 0.1)
        model.blocks.requires_grad_(False)
        before = everything(model, stack)
        with self.assertRaisesRegex(ValueError, "(?i)grad|frozen"):
            stack.update(tiny.batches(2, seed=0))
        self.assertEqual(before, everything(model, stack))

    def test_sparsity_out_of_range(self):
        for sparsity in (-0.01, 1.01, float("nan"), float("inf"), "0.12", None):
            with (
                self.subTest(sparsity),
                self.assertRaisesRegex((TypeError, ValueError), str(sparsity).replace(".", r"\.")),
            ):
                BitStack(tiny.plain(), sparsity)

    def test_no_eligible_entries(self):
        for name, (model, exclude) in {
            "frozen": (tiny.plain().requires_grad_(False), None),
            "all excluded": (tiny.plain(), ["blocks", "embed", "norm", "classifier"]),
            "no parameters": (nn.Identity(), None),
        }.items():
            with self.subTest(name), self.assertRaisesRegex(ValueError, "(?i)eligible"):
                BitStack(model, exclude=exclude)

    def test_unknown_settings(self):
        for setting in ("budget", "importance"):
            with self.subTest(setting), self.assertRaisesRegex(ValueError, "sideways"):
                BitStack(tiny.plain(), **{setting: "sideways"})
        with self.assertRaises((TypeError, ValueError)):
            BitStack(tiny.plain(), exclude="score")  # a string is a list of letters
        with self.assertRaises((TypeError, ValueError)):
            BitStack("gpt2")

    def test_nothing_else_is_left_behind(self):
        model = tiny.plain()
        model(**tiny.batches(1, seed=9)[0]).loss.backward()
        stack = BitStack(model, 0.1)
        before = everything(model, stack)
        shuffled = torch.utils.data.DataLoader(
            tiny.batches(8, seed=0), batch_size=None, shuffle=True
        )
        stack.update(shuffled, n_batches=4)
        after = everything(model, stack)
        for part in set(before) - {"masks", "handles", "calls", "table", "stats"}:
            self.assertEqual(before[part], after[part], part)


if __name__ == "__main__":
    unittest.main()
