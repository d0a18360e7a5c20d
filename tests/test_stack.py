"""stack.py: which entries are chosen, as the reference does, and what is told about them."""

import unittest
from collections.abc import Mapping
from types import SimpleNamespace

import tiny
import torch
from torch import nn

from bitstack_nb import BitStack
from bitstack_nb.reference import PlainBitStack

COLUMNS = ["layer", "module", "task", "eligible", "selected", "added", "locked", "lock_fraction"]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def eligible(model: nn.Module, names: list[str]) -> dict[str, nn.Parameter]:
    return {name: model.get_parameter(name) for name in names}


class Case(unittest.TestCase):
    def assert_same_masks(self, found: Mapping, expected: Mapping):
        self.assertEqual(list(found), list(expected))
        for name in expected:
            self.assertEqual(found[name].dtype, torch.bool)
            self.assertTrue(torch.equal(found[name], expected[name]), name)


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
        plain = PlainBitStack(
            plain_model, eligible(plain_model, names), sparsity=sparsity, budget=budget
        )
        optimizer, plain_optimizer = adamw(model), adamw(plain_model)
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
        return PlainBitStack(copy, eligible(copy, names), sparsity=sparsity)

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
        model = tiny.Body(lambda m: SimpleNamespace(loss=m.body.weight.sum()))
        stack = BitStack(model, 0.05)
        self.assertEqual(
            stack.update([{"x": torch.ones(1), "labels": torch.ones(1)}])["locked"], 200
        )

    def test_entries_without_gradient_are_not_locked(self):
        model = tiny.Body(lambda m: SimpleNamespace(loss=m.body.weight[:2].sum()))
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
        plain = PlainBitStack(plain_model, eligible(plain_model, names), sparsity=0.2)
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


class Chosen(Case):
    """lock(): entries that were chosen in another way."""

    def test_what_is_chosen_is_locked_and_adds_up(self):
        model = tiny.plain()
        stack = BitStack(model)
        none = {name: torch.zeros_like(mask) for name, mask in stack.masks.items()}
        first, second = ({**none} for _ in range(2))
        first["blocks.0.up.weight"] = none["blocks.0.up.weight"].clone()
        first["blocks.0.up.weight"][0] = True
        second["blocks.0.up.weight"] = none["blocks.0.up.weight"].clone()
        second["blocks.0.up.weight"][:2] = True
        width = first["blocks.0.up.weight"].shape[1]
        self.assertEqual(stack.lock(first)["locked"], width)
        self.assertEqual(stack.lock(second)["locked"], 2 * width)
        self.assert_same_masks(stack.masks, second)
        optimizer = adamw(model)
        stack.attach(optimizer)
        before = model.blocks[0].up.weight.detach().clone()
        tiny.train(model, optimizer, tiny.batches(3, seed=0))
        self.assertTrue(torch.equal(before[:2], model.blocks[0].up.weight[:2]))
        self.assertFalse(torch.equal(before[2:], model.blocks[0].up.weight[2:]))

    def test_masks_that_do_not_fit_are_named(self):
        stack = BitStack(tiny.plain())
        masks = {name: mask.clone() for name, mask in stack.masks.items()}
        wrong = [
            {**masks, "blocks.0.up.bias": torch.zeros(3, dtype=torch.bool)},
            {**masks, "blocks.0.up.bias": masks["blocks.0.up.bias"].float()},
            {name: mask for name, mask in masks.items() if name != "blocks.0.up.bias"},
        ]
        for chosen in wrong:
            with self.assertRaisesRegex(ValueError, "blocks.0.up.bias"):
                stack.lock(chosen)
        self.assertEqual(stack.stats()["locked"], 0)


if __name__ == "__main__":
    unittest.main()
