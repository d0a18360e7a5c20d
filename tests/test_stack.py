"""stack.py: the weights that the reference chooses, the numbers told, and updates that fail."""

import random
import unittest
from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import tiny
import torch
from cases import ADAMW
from torch import nn

from bitstack_nb import BitStack
from bitstack_nb.benchmark.curves import CurveRecorder
from bitstack_nb.figures.locks import shares
from bitstack_nb.importance import choose, random_scores
from bitstack_nb.reference import PlainBitStack

COLUMNS = ["layer", "module", "task", "eligible", "selected", "added", "locked", "lock_fraction"]


def reference(model: nn.Module, architecture: str = "plain", sparsity=0.2, **settings):
    """The plain method on a model of this architecture."""
    names = tiny.expected_eligible(architecture, model)
    parameters = {name: model.get_parameter(name) for name in names}
    return PlainBitStack(model, parameters, sparsity=sparsity, **settings)


class Case(unittest.TestCase):
    def assert_same_masks(self, found: Mapping, expected: Mapping):
        self.assertEqual(list(found), list(expected))
        for name in expected:
            self.assertEqual(found[name].dtype, torch.bool)
            self.assertTrue(torch.equal(found[name], expected[name]), name)


class AgainstReference(Case):
    def test_every_step_of_several_tasks(self):
        """Training between updates, live AdamW state, dropout on: every bit the same."""
        for architecture in tiny.ARCHITECTURES:
            for budget in ("union", "fresh"):
                with self.subTest(architecture=architecture, budget=budget):
                    self.compare(architecture, budget, sparsity=0.12)
        for budget, sparsity in (("union", 0.5), ("fresh", 0.45), ("union", 1.0), ("fresh", 1.0)):
            with self.subTest(budget=budget, sparsity=sparsity):
                self.compare("plain", budget, sparsity=sparsity)

    def compare(self, architecture, budget, *, sparsity):
        build, _ = tiny.ARCHITECTURES[architecture]
        model, plain_model = build(), build()
        stack = BitStack(model, sparsity, budget=budget)
        plain = reference(plain_model, architecture, sparsity, budget=budget)
        optimizer, plain_optimizer = ADAMW(model.parameters()), ADAMW(plain_model.parameters())
        stack.attach(optimizer)
        plain.attach(plain_optimizer)
        for task in range(3):
            loader = tiny.batches(3, seed=task)
            tiny.train(model, optimizer, loader, seed=task)
            tiny.train(plain_model, plain_optimizer, loader, seed=task)
            stack.update(loader)
            plain.update(loader)
            self.assert_same_masks(stack.masks, plain.masks)
            for name, different in tiny.changed(model, tiny.snapshot(plain_model)).items():
                self.assertFalse(different.any(), name)
        self.assertTrue(any(mask.any() for mask in plain.masks.values()))

    def test_measuring_whatever_the_surroundings(self):
        """n_batches of a stream, dropout off, no autocast, other dtypes, keys of other columns."""

        def stream(loader):
            yield from loader[:3]
            raise AssertionError("a fourth batch was asked for")

        extra = {"task": torch.zeros(6), "text": ["a"] * 6}
        for name, (dtype, change) in {
            "a stream": (torch.float32, stream),
            "other columns": (torch.float32, lambda loader: [{**b, **extra} for b in loader]),
            "bfloat16": (torch.bfloat16, list),
            "float64": (torch.float64, list),
        }.items():
            with self.subTest(name):
                model, loader = tiny.plain().to(dtype), tiny.batches(5, seed=1)
                plain = reference(model)
                plain.update(loader[:3])
                stack = BitStack(model.train(), 0.2)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    stack.update(change(loader), n_batches=3)
                self.assert_same_masks(stack.masks, plain.masks)

    def test_tied_parameters_count_once(self):
        def tied():
            model = tiny.plain()
            model.blocks[1].up.weight = model.blocks[0].up.weight
            return model

        model = tied()
        stack, plain = BitStack(model, 0.2), reference(tied())
        self.assertNotIn("blocks.1.up.weight", stack.masks)
        numbers = stack.update(tiny.batches(2, seed=0))
        plain.update(tiny.batches(2, seed=0))
        self.assert_same_masks(stack.masks, plain.masks)
        self.assertEqual(numbers["total"], sum(p.numel() for p in model.parameters()))
        optimizer, before = ADAMW(model.parameters()), tiny.snapshot(model)
        stack.attach(optimizer)
        tiny.train(model, optimizer, tiny.batches(3, seed=1))
        moved = tiny.changed(model, before)["blocks.1.up.weight"]
        self.assertFalse(moved[stack.masks["blocks.0.up.weight"]].any())
        self.assertTrue(moved.any())
        for name in ("blocks.0.up.weight", "blocks.1.up.weight"):  # either name excludes it
            self.assertNotIn("blocks.0.up.weight", BitStack(tied(), exclude=[name]).masks)


class Numbers(Case):
    def test_stats_and_layer_table(self):
        model = tiny.plain()
        stack = BitStack(model, 0.12)
        table, total = stack.layer_table(), sum(p.numel() for p in model.parameters())
        self.assertEqual((list(table.columns), len(table)), (COLUMNS, 0))
        eligible, locked = sum(mask.numel() for mask in stack.masks.values()), [0]
        for task in range(3):
            numbers = stack.update(tiny.batches(2, seed=task))
            locked.append(sum(int(mask.sum()) for mask in stack.masks.values()))
            share, of_all = 100 * locked[-1] / eligible, 100 * locked[-1] / total
            expected = {"locked": locked[-1], "total": total, "eligible": eligible}
            expected |= {"locked_pct": of_all, "frozen_pct": share}
            self.assertEqual(numbers, expected)
            self.assertEqual(stack.stats(), expected)
        table = stack.layer_table()
        self.assertGreater(locked[2], locked[1])
        by_task = table.groupby("task")
        self.assertEqual(list(by_task["locked"].sum()), locked[1:])
        self.assertEqual(list(by_task["eligible"].sum()), [eligible] * 3)
        self.assertFalse(table.duplicated(["layer", "module", "task"]).any())
        self.assertTrue((table["added"] <= table["selected"]).all())
        self.assertTrue((table["added"] < table["selected"]).any())
        self.assertTrue((table["lock_fraction"] == table["locked"] / table["eligible"]).all())
        self.assertEqual(table["layer"].nunique(), 2)
        for _, rows in table.groupby(["layer", "module"]):
            self.assertEqual(list(rows["added"].cumsum()), list(rows["locked"]))

    def test_a_row_for_each_module_of_several_stacks(self):
        """An encoder and a decoder have layers of the same number and modules of the same name."""
        stack = BitStack(tiny.t5(), 0.2)
        recorder = CurveRecorder(stack.masks)
        scores = random_scores(stack.masks, seed=0)
        recorder.add(scores)
        stack.lock(choose(scores, round(0.2 * stack.stats()["eligible"])))
        table = stack.layer_table()
        modules = {name.rpartition(".")[0] for name in stack.masks}
        self.assertEqual(len(table), len(modules))
        self.assertTrue(table["module"].str.contains("encoder|decoder").all())
        self.assertEqual(shares(table, "locked").notna().sum().sum(), len(modules))
        curves = recorder.curves().layer_table(0.2, "union")
        for column in ("layer", "module", "eligible", "locked"):
            self.assertEqual(list(curves[column]), list(table[column]))

    def test_layers_thawed_or_frozen_later(self):
        """A thawed layer joins at the next update; a frozen one keeps its locks and gets none."""
        for budget in ("union", "fresh"):
            model = tiny.plain()
            model.blocks[0].requires_grad_(False)
            stack = BitStack(model, 0.3, budget=budget)
            few = stack.update(tiny.batches(2, seed=0))
            self.assertFalse(any("blocks.0" in name for name in stack.masks))
            model.blocks[0].requires_grad_(True)
            model.blocks[1].requires_grad_(False)
            locked = dict(stack.masks)
            all_of_it = stack.update(tiny.batches(2, seed=1))
            self.assertEqual(all_of_it["eligible"], 2 * few["eligible"])
            self.assertEqual(set(stack.masks), set(BitStack(tiny.plain()).masks))
            for name, mask in stack.masks.items():
                if name in locked:
                    self.assertTrue(torch.equal(mask, locked[name]), name)
            self.assertTrue(stack.masks["blocks.0.up.weight"].any())
            optimizer, before = ADAMW(model.parameters()), tiny.snapshot(model)
            stack.attach(optimizer)
            tiny.train(model, optimizer, tiny.batches(2, seed=2))
            moved = tiny.changed(model, before)["blocks.0.up.weight"]
            self.assertFalse(moved[stack.masks["blocks.0.up.weight"]].any())
            rows = stack.layer_table().query("layer == 0")
            self.assertEqual(set(rows["task"]), {1, 2})
            self.assertFalse(rows.query("task == 1")["selected"].any())
            model.requires_grad_(True)
            twin = tiny.plain()
            twin.load_state_dict(model.state_dict())
            again = BitStack(twin)
            again.load_state_dict(stack.state_dict())
            self.assert_same_masks(again.masks, {n: stack.masks[n] for n in again.masks})

    def test_budgets_on_the_same_data(self):
        for budget, growth in (("union", 1), ("fresh", 2)):
            stack = BitStack(tiny.plain(), 0.1, budget=budget)
            first = stack.update(tiny.batches(2, seed=0))["locked"]
            before = dict(stack.masks)
            self.assertEqual(stack.update(tiny.batches(2, seed=0))["locked"], growth * first)
            self.assertTrue(all(mask[before[name]].all() for name, mask in stack.masks.items()))

    def test_ties_zeros_and_no_sparsity(self):
        """All weights equal to the threshold are locked, none without a gradient."""
        loader = [{"x": torch.ones(1), "labels": torch.ones(1)}]
        ties = tiny.Body(lambda m: SimpleNamespace(loss=m.body.weight.sum()))
        self.assertEqual(BitStack(ties, 0.05).update(loader)["locked"], 200)
        stack = BitStack(tiny.Body(lambda m: SimpleNamespace(loss=m.body.weight[:2].sum())), 1.0)
        stack.update(loader)
        self.assertEqual(stack.masks["body.weight"].sum(1).tolist(), [10, 10] + [0] * 18)
        stack = BitStack(tiny.plain(), 0)
        self.assertEqual(stack.update(tiny.batches(1, seed=0))["locked"], 0)
        self.assertEqual((dict(stack.handles), stack.verify()), ({}, 0))

    def test_one_hook_per_masked_parameter(self):
        model = tiny.plain()
        stack = BitStack(model, 0.01)
        stack.update(tiny.batches(2, seed=0))
        masked = {name for name, mask in stack.masks.items() if mask.any()}
        self.assertLess(len(masked), len(stack.masks))
        self.assertEqual(set(stack.handles), masked)
        counts = dict(stack.hook_calls)
        for _ in range(2):
            model(**tiny.batches(1, seed=0)[0]).loss.backward()
        for name in masked:
            self.assertEqual(stack.hook_calls[name] - counts.get(name, 0), 2)

    def test_masks_are_read_only(self):
        stack, name = BitStack(tiny.plain(), 0.2), "blocks.0.up.weight"
        stack.update(tiny.batches(1, seed=0))
        before = stack.masks[name].clone()
        with self.assertRaises(TypeError):
            stack.masks[name] = ~before
        stack.masks[name].fill_(True)
        self.assertTrue(torch.equal(stack.masks[name], before))
        with self.assertRaises(KeyError):
            stack.masks["classifier.weight"]

    def test_masks_chosen_by_the_user_add_up(self):
        model, name = tiny.plain(), "blocks.0.up.weight"
        stack = BitStack(model)
        chosen = {n: torch.zeros_like(mask) for n, mask in stack.masks.items()}
        width = chosen[name].shape[1]
        for rows in (1, 2):
            chosen[name][:rows] = True
            self.assertEqual(stack.lock(chosen)["locked"], rows * width)
        self.assert_same_masks(stack.masks, chosen)
        for wrong in (
            {**chosen, name: torch.zeros(3, dtype=torch.bool)},
            {**chosen, name: chosen[name].float()},
            {n: mask for n, mask in chosen.items() if n != name},
        ):
            with self.assertRaisesRegex(ValueError, name):
                stack.lock(wrong)
        self.assertEqual(stack.stats()["locked"], 2 * width)


def plain_bytes(tensor) -> bytes | None:
    return None if tensor is None else tiny.as_bits(tensor).numpy().tobytes()


def everything(model: nn.Module, stack: BitStack) -> dict:
    """All that a failed update must leave alone, in comparable form."""
    named = list(model.named_parameters())
    return {
        "values": {n: plain_bytes(t) for n, t in model.state_dict().items()},
        "gradients": {n: (id(p.grad), plain_bytes(p.grad), p.requires_grad) for n, p in named},
        "training": {n: m.training for n, m in model.named_modules()},
        "rng": (plain_bytes(torch.get_rng_state()), random.getstate(), str(np.random.get_state())),
        "grad mode": torch.is_grad_enabled(),
        "masks": {n: plain_bytes(m) for n, m in stack.masks.items()},
        "hooks": (sorted(stack.handles), dict(stack.hook_calls)),
        "told": (stack.stats(), stack.layer_table().to_csv()),
    }


class Failures(unittest.TestCase):
    """Each bad update raises an error that says why, and everything is as it was."""

    def check(self, error, pattern, loader, *, update=True, **arguments):
        model = tiny.plain()
        model.blocks[0].norm.bias.requires_grad_(False)
        optimizer, stack = ADAMW(model.parameters()), BitStack(model, 0.1)
        stack.attach(optimizer)
        if update:
            stack.update(tiny.batches(2, seed=0))
        tiny.train(model, optimizer, tiny.batches(1, seed=3))
        model.blocks[1].eval()
        before = everything(model, stack)
        with self.assertRaisesRegex(error, pattern):
            stack.update(loader, **arguments)
        self.assertEqual(everything(model, stack), before)
        # The guarantee still works, and so does the next good update.
        moved_from = tiny.snapshot(model)
        tiny.train(model, optimizer, tiny.batches(2, seed=4))
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
            "empty": (ValueError, "no batch.*empty", []),
            "empty stream": (ValueError, "no batch", map(len, ())),
            "not iterable": (usual, "loader is 3", 3),
            "none": (usual, "loader is None", None),
            "tuple batches": (usual, "tuple.*mapping", [tuple(bad.values())]),
            "no labels": (ValueError, "labels", [good, unlabelled]),
            "loader fails": (OSError, "disk gone", Failing()),
            "model fails": (Exception, "", [good, {**bad, "input_ids": bad["input_ids"] + 999}]),
            "nan": (ValueError, r"NaN.*blocks\.\d\.", [good, {**bad, "loss_scale": float("nan")}]),
            "infinite": (ValueError, r"blocks\.\d\.", [good, {**bad, "loss_scale": -float("inf")}]),
        }.items():
            for update in (True, False):
                with self.subTest(name, after_an_update=update):
                    self.check(error, pattern, loader, update=update)
        for n_batches in (0, -3, 1.5, "4", None):
            with self.subTest(n_batches):
                self.check(usual, f"n_batches is {n_batches!r}", [good], n_batches=n_batches)

    def test_models_without_loss_or_gradient(self):
        x = torch.ones(1)
        for name, (function, pattern) in {
            "no loss": (lambda m: SimpleNamespace(logits=x), "loss"),
            "loss is None": (lambda m: SimpleNamespace(loss=None), "loss"),
            "a tensor": (lambda m: m.body.weight.sum(), "loss"),
            "detached": (lambda m: SimpleNamespace(loss=m.body.weight.sum().detach()), "gradient"),
            "head only": (lambda m: SimpleNamespace(loss=m.classifier.weight.sum()), "gradient"),
            "zero": (lambda m: SimpleNamespace(loss=0 * m.body.weight.sum()), "gradient"),
            "frozen later": (lambda m: SimpleNamespace(loss=m.body.weight.sum()), "frozen"),
        }.items():
            with self.subTest(name):
                model = tiny.Body(function).train()
                stack = BitStack(model, 0.5)
                model.body.requires_grad_(name != "frozen later")
                before = everything(model, stack)
                with self.assertRaisesRegex((TypeError, ValueError), pattern):
                    stack.update([{"x": x, "labels": x}])
                self.assertEqual(before, everything(model, stack))

    def test_a_good_update_changes_nothing_but_the_locks(self):
        model = tiny.plain()
        model(**tiny.batches(1, seed=9)[0]).loss.backward()
        stack, loader = BitStack(model, 0.1), tiny.batches(8, seed=0)
        before = everything(model, stack)
        stack.update(torch.utils.data.DataLoader(loader, batch_size=None, shuffle=True), 4)
        after = everything(model, stack)
        for part in before.keys() - {"masks", "hooks", "told"}:
            self.assertEqual(before[part], after[part], part)

    def test_settings(self):
        for sparsity in (-0.01, 1.01, float("nan"), float("inf"), "0.12", None):
            with self.assertRaisesRegex(ValueError, f"sparsity is {sparsity!r}"):
                BitStack(tiny.plain(), sparsity)
        for settings in ({"budget": "sideways"}, {"importance": "random"}, {"exclude": "score"}):
            with self.assertRaisesRegex(ValueError, next(iter(settings.values()))):
                BitStack(tiny.plain(), **settings)
        with self.assertRaisesRegex(TypeError, "gpt2"):
            BitStack("gpt2")
        for model, exclude in (
            (tiny.plain().requires_grad_(False), None),
            (tiny.plain(), ["blocks", "embed", "norm", "classifier"]),
            (nn.Identity(), None),
        ):
            with self.assertRaisesRegex(ValueError, "no eligible weights"):
                BitStack(model, exclude=exclude)


if __name__ == "__main__":
    unittest.main()
