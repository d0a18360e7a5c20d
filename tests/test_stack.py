"""stack.py: what is eligible, which entries are chosen, and that a failed update changes nothing."""

import random
import unittest
from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import reference
import tiny
import torch
from torch import nn

from bitstack_nb import BitStack

COLUMNS = ["layer", "module", "task", "eligible", "selected", "added", "locked", "lock_fraction"]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


class Body(nn.Module):
    """`function(self)` is the loss; one eligible 20x10 weight, one head."""

    def __init__(self, function):
        super().__init__()
        self.body = nn.Linear(10, 20, bias=False)
        self.classifier = nn.Linear(20, 3)
        self.function = function

    def forward(self, x, labels):
        return self.function(self)


class Case(unittest.TestCase):
    def assert_same_masks(self, found: Mapping, expected: Mapping):
        self.assertEqual(list(found), list(expected))
        for name in expected:
            self.assertEqual(found[name].dtype, torch.bool)
            self.assertTrue(torch.equal(found[name], expected[name]), name)


class Eligibility(Case):
    def test_heads_embeddings_and_final_norm_stay_free(self):
        for name, (build, _) in tiny.ARCHITECTURES.items():
            with self.subTest(name):
                model = build()
                expected = tiny.expected_eligible(name, model)
                self.assertGreater(len(expected), 8)
                masks = BitStack(model).masks
                self.assertEqual(list(masks), expected)
                for key, parameter in model.named_parameters():
                    if key in masks:
                        self.assertEqual(masks[key].shape, parameter.shape)
                        self.assertFalse(masks[key].any())

    def test_gpt2_default_is_the_published_list(self):
        published = BitStack(tiny.gpt2(), exclude=["score", "wte", "wpe", "ln_f"])
        self.assertEqual(list(BitStack(tiny.gpt2()).masks), list(published.masks))

    def test_exclude_is_by_part_of_the_name(self):
        stack = BitStack(tiny.plain(), exclude=["blocks.1", "norm", "classifier"])
        names = [n for n, _ in tiny.plain().named_parameters()]
        kept = [n for n in names if not any(x in n for x in ("blocks.1", "norm", "classifier"))]
        self.assertEqual(list(stack.masks), kept)
        self.assertIn("embed.weight", kept)
        self.assertEqual(list(BitStack(tiny.plain(), exclude=[]).masks), names)

    def test_frozen_and_integer_parameters_are_not_eligible(self):
        model = tiny.plain()
        model.blocks[0].up.weight.requires_grad_(False)
        model.blocks[0].steps = nn.Parameter(torch.arange(4), requires_grad=False)
        names = list(BitStack(model).masks)
        self.assertNotIn("blocks.0.up.weight", names)
        self.assertNotIn("blocks.0.steps", names)
        self.assertIn("blocks.0.down.weight", names)

    def test_names_are_canonical(self):
        expected = list(BitStack(tiny.plain()).masks)
        parallel = nn.DataParallel(tiny.plain())
        for name, wrapped in {
            "compiled": torch.compile(tiny.plain(), backend="eager"),
            "parallel": parallel,
            "both": torch.compile(parallel, backend="eager"),
        }.items():
            with self.subTest(name):
                self.assertEqual(list(BitStack(wrapped).masks), expected)

    def test_a_language_model_tied_to_its_embedding(self):
        masks = BitStack(tiny.gpt2(model_class="GPT2LMHeadModel")).masks
        self.assertTrue(all(name.startswith("transformer.h.") for name in masks))


class AgainstReference(Case):
    def test_masks_and_weights_over_several_tasks(self):
        """Training between updates, live AdamW state, dropout on: every bit the same."""
        for architecture, (build, _) in tiny.ARCHITECTURES.items():
            for budget in ("union", "fresh"):
                with self.subTest(architecture=architecture, budget=budget):
                    self.compare(architecture, build, budget, sparsity=0.12)

    def test_large_sparsity(self):
        for budget, sparsity in (("union", 0.5), ("fresh", 0.45), ("union", 1.0), ("fresh", 1.0)):
            with self.subTest(budget=budget, sparsity=sparsity):
                self.compare("plain", tiny.plain, budget, sparsity=sparsity)

    def compare(self, architecture, build, budget, *, sparsity):
        model, plain_model = build(), build()
        names = tiny.expected_eligible(architecture, model)
        stack = BitStack(model, sparsity, budget=budget)
        plain = reference.Reference(plain_model, names, sparsity=sparsity, budget=budget)
        optimizer, plain_optimizer = adamw(model), adamw(plain_model)
        stack.attach(optimizer)
        for task in range(3):
            loader = tiny.batches(3, seed=task)
            tiny.train(model, optimizer, loader, seed=task)
            plain.train(plain_optimizer, loader, seed=task)
            stack.update(loader)
            plain.update(loader)
            self.assert_same_masks(stack.masks, plain.masks)
            for name, different in tiny.changed(model, tiny.snapshot(plain_model)).items():
                self.assertFalse(different.any(), name)
        self.assertTrue(any(mask.any() for mask in plain.masks.values()))

    def test_only_n_batches_are_read(self):
        loader = tiny.batches(5, seed=0)

        def stream():
            yield from loader[:3]
            raise AssertionError("a fourth batch was asked for")

        model = tiny.plain()
        stack = BitStack(model, 0.2)
        stack.update(stream(), n_batches=3)
        plain = self.reference(model, 0.2)
        plain.update(loader[:3])
        self.assert_same_masks(stack.masks, plain.masks)
        shorter = self.reference(model, 0.2)
        shorter.update(loader[:2])
        self.assertFalse(all(torch.equal(shorter.masks[n], m) for n, m in stack.masks.items()))

    def reference(self, model, sparsity):
        copy = tiny.unhooked_copy(model)
        names = tiny.expected_eligible("plain", copy)
        return reference.Reference(copy, names, sparsity=sparsity, budget="union")

    def test_dropout_off_and_float32_whatever_the_surroundings(self):
        loader = tiny.batches(2, seed=1)
        model = tiny.plain()
        plain = self.reference(model, 0.2)
        plain.update(loader)
        stack = BitStack(model.train(), 0.2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            stack.update(loader)
        self.assert_same_masks(stack.masks, plain.masks)

    def test_low_and_double_precision_parameters(self):
        for dtype in (torch.bfloat16, torch.float64):
            with self.subTest(dtype=dtype):
                model = tiny.plain().to(dtype)
                plain = self.reference(model, 0.2)
                plain.update(tiny.batches(2, seed=1))
                stack = BitStack(model, 0.2)
                stack.update(tiny.batches(2, seed=1))
                self.assert_same_masks(stack.masks, plain.masks)

    def test_keys_the_model_does_not_take_are_dropped(self):
        loader = tiny.batches(2, seed=1)
        model = tiny.plain()
        plain = self.reference(model, 0.2)
        plain.update(loader)
        stack = BitStack(model, 0.2)
        stack.update([{**b, "task": torch.zeros(6), "text": ["a"] * 6} for b in loader])
        self.assert_same_masks(stack.masks, plain.masks)


class Selection(Case):
    def test_numbers_returned(self):
        model = tiny.plain()
        stack = BitStack(model, 0.12)
        eligible = sum(mask.numel() for mask in stack.masks.values())
        total = sum(p.numel() for p in model.parameters())
        self.assertEqual(stack.stats()["locked"], 0)
        for task in range(2):
            numbers = stack.update(tiny.batches(2, seed=task))
            locked = sum(int(mask.sum()) for mask in stack.masks.values())
            self.assertEqual(numbers, stack.stats())
            self.assertEqual(
                (numbers["locked"], numbers["eligible"], numbers["total"]),
                (locked, eligible, total),
            )
            self.assertAlmostEqual(numbers["frozen_pct"], 100 * locked / eligible)
            self.assertAlmostEqual(numbers["locked_pct"], 100 * locked / total)
        self.assertGreater(locked, 0.12 * eligible)

    def test_budgets_on_the_same_data(self):
        loader = tiny.batches(2, seed=0)
        for budget in ("union", "fresh"):
            stack = BitStack(tiny.plain(), 0.1, budget=budget)
            first = stack.update(loader)["locked"]
            before = dict(stack.masks)
            second = stack.update(loader)["locked"]
            with self.subTest(budget):
                self.assertGreaterEqual(first, round(0.1 * stack.stats()["eligible"]))
                self.assertEqual(second, first if budget == "union" else 2 * first)
                for name, mask in stack.masks.items():
                    self.assertTrue(mask[before[name]].all())

    def test_entries_equal_to_the_threshold_are_locked(self):
        model = Body(lambda m: SimpleNamespace(loss=m.body.weight.sum()))
        stack = BitStack(model, 0.05)
        self.assertEqual(
            stack.update([{"x": torch.ones(1), "labels": torch.ones(1)}])["locked"], 200
        )

    def test_entries_without_gradient_are_not_locked(self):
        model = Body(lambda m: SimpleNamespace(loss=m.body.weight[:2].sum()))
        stack = BitStack(model, 1.0)
        stack.update([{"x": torch.ones(1), "labels": torch.ones(1)}])
        self.assertEqual(stack.masks["body.weight"].sum(1).tolist(), [10, 10] + [0] * 18)

    def test_sparsity_zero_locks_nothing(self):
        stack = BitStack(tiny.plain(), 0)
        self.assertEqual(stack.update(tiny.batches(1, seed=0))["locked"], 0)
        self.assertEqual(dict(stack.handles), {})
        self.assertEqual(stack.verify(), 0)

    def test_tied_parameters_count_once(self):
        def tied():
            model = tiny.plain()
            model.blocks[1].up.weight = model.blocks[0].up.weight
            return model

        model = tied()
        names = [n for n, _ in model.named_parameters() if n.startswith("blocks.")]
        self.assertNotIn("blocks.1.up.weight", names)
        stack = BitStack(model, 0.2)
        self.assertEqual(list(stack.masks), names)
        plain_model = tied()
        plain = reference.Reference(plain_model, names, sparsity=0.2, budget="union")
        numbers = stack.update(tiny.batches(2, seed=0))
        plain.update(tiny.batches(2, seed=0))
        self.assert_same_masks(stack.masks, plain.masks)
        self.assertTrue(stack.masks["blocks.0.up.weight"].any())
        self.assertEqual(numbers["total"], sum(p.numel() for p in model.parameters()))
        self.assertEqual(numbers["eligible"], sum(m.numel() for m in plain.masks.values()))
        optimizer, before = adamw(model), tiny.snapshot(model)
        stack.attach(optimizer)
        tiny.train(model, optimizer, tiny.batches(3, seed=1))
        moved = tiny.changed(model, before)["blocks.1.up.weight"]
        self.assertFalse(moved[stack.masks["blocks.0.up.weight"]].any())
        self.assertTrue(moved.any())
        for name in ("blocks.0.up.weight", "blocks.1.up.weight"):  # either name excludes it
            self.assertNotIn("blocks.0.up.weight", BitStack(tied(), exclude=[name]).masks)

    def test_one_hook_per_masked_parameter(self):
        model = tiny.plain()
        stack = BitStack(model, 0.01)
        self.assertEqual(len(stack.handles), 0)
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
        stack = BitStack(tiny.plain(), 0.2)
        stack.update(tiny.batches(1, seed=0))
        name = "blocks.0.up.weight"
        before = stack.masks[name].clone()
        self.assertIsInstance(stack.masks, Mapping)
        with self.assertRaises(TypeError):
            stack.masks[name] = ~before
        stack.masks[name].fill_(True)
        self.assertTrue(torch.equal(stack.masks[name], before))
        self.assertNotIn("classifier.weight", stack.masks)
        with self.assertRaises(KeyError):
            stack.masks["classifier.weight"]

    def test_layer_table(self):
        stack = BitStack(tiny.plain(), 0.1)
        empty = stack.layer_table()
        self.assertEqual((list(empty.columns), len(empty)), (COLUMNS, 0))
        locked = []
        for task in range(3):
            locked.append(stack.update(tiny.batches(2, seed=task))["locked"])
        table = stack.layer_table()
        self.assertEqual(list(table.columns), COLUMNS)
        self.assertEqual(sorted(table["task"].unique()), [1, 2, 3])
        self.assertEqual(list(table.groupby("task")["locked"].sum()), locked)
        self.assertTrue(
            (table.groupby("task")["eligible"].sum() == stack.stats()["eligible"]).all()
        )
        self.assertFalse(table.duplicated(["layer", "module", "task"]).any())
        self.assertTrue((table["added"] <= table["selected"]).all())
        self.assertTrue((table["added"] < table["selected"]).any())
        self.assertTrue((table["lock_fraction"] == table["locked"] / table["eligible"]).all())
        self.assertEqual(table["layer"].nunique(), 2)
        for _, rows in table.groupby(["layer", "module"]):
            rows = rows.sort_values("task")
            self.assertEqual(list(rows["added"].cumsum()), list(rows["locked"]))

    def test_state_dict_round_trip(self):
        model = tiny.plain()
        stack = BitStack(model, 0.1, budget="fresh")
        stack.update(tiny.batches(2, seed=0))
        twin_model = tiny.unhooked_copy(model)
        twin = BitStack(twin_model, 0.1, budget="fresh")
        twin.load_state_dict(stack.state_dict())
        self.assert_same_masks(twin.masks, stack.masks)
        self.assertEqual(twin.stats(), stack.stats())
        self.assertTrue(twin.layer_table().equals(stack.layer_table()))
        self.assertEqual(set(twin.handles), set(stack.handles))
        for each in (stack, twin):
            each.update(tiny.batches(2, seed=1))
        self.assert_same_masks(twin.masks, stack.masks)
        self.assertTrue(twin.layer_table().equals(stack.layer_table()))
        self.assertEqual(twin.verify(), 0)

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


class Atomicity(Case):
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

        def failing():
            yield good
            raise OSError("disk gone")

        usual = (TypeError, ValueError)
        for name, (error, pattern, loader) in {
            "empty": (ValueError, "(?i)empty|no batch", []),
            "empty stream": (ValueError, "(?i)empty|no batch", iter(())),
            "not iterable": (usual, "(?i)loader", 3),
            "none": (usual, "(?i)loader", None),
            "tuple batches": (usual, "(?i)mapping.*tuple|tuple.*mapping", [tuple(bad.values())]),
            "no labels": (ValueError, "labels", [unlabelled]),
            "second has none": (ValueError, "labels", [good, unlabelled]),
            "loader fails": (OSError, "disk gone", failing()),
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
                model = Body(function).train()
                stack = BitStack(model, 0.5)
                before = everything(model, stack)
                with self.assertRaisesRegex((TypeError, ValueError), pattern):
                    stack.update([{"x": x, "labels": x}])
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
        for setting in ("mode", "budget", "importance"):
            with self.subTest(setting), self.assertRaisesRegex(ValueError, "sideways"):
                BitStack(tiny.plain(), **{setting: "sideways"})
        with self.assertRaises((TypeError, ValueError)):
            BitStack(tiny.plain(), exclude="score")  # a string is a list of letters
        with self.assertRaises((TypeError, ValueError)):
            BitStack("gpt2")


if __name__ == "__main__":
    unittest.main()
