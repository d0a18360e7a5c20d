"""verify, restore, attach and detach: a moved bit is found, and undoing leaves no trace."""

import unittest
from functools import partial

import tiny
import torch
from cases import ADAMW, LockedCase
from torch import nn
from torch.optim import SGD

from bitstack_nb import BitStack
from bitstack_nb.guard import LockedWeightsMoved


class Verify(LockedCase):
    def nudge(self, model, stack, name, toward=float("inf")):
        parameter = model.get_parameter(name)
        index = tuple(stack.masks[name].nonzero()[-1])
        with torch.no_grad():
            parameter[index] = torch.nextafter(parameter[index], torch.tensor(toward))

    def test_one_unit_in_the_last_place(self):
        model, _, stack = self.locked_model()
        self.assertEqual(stack.verify(), 0)
        for name in ("blocks.0.mix", "blocks.1.down.weight"):
            for toward in (float("inf"), -float("inf")):
                with self.subTest(name=name, toward=toward):
                    self.nudge(model, stack, name, toward)
                    moved = tiny.snapshot(model)
                    with self.assertRaisesRegex(
                        LockedWeightsMoved, name.replace(".", r"\.")
                    ) as raised:
                        stack.verify()
                    self.assertRegex(str(raised.exception), r"\b1\b")
                    self.assertFalse(any(c.any() for c in tiny.changed(model, moved).values()))
                    stack.restore()
                    self.assertEqual(stack.verify(), 0)

    def test_names_every_parameter_that_moved(self):
        model, _, stack = self.locked_model()
        before = tiny.snapshot(model)
        for name in ("blocks.0.up.weight", "blocks.1.mix"):
            self.nudge(model, stack, name)
        with self.assertRaises(LockedWeightsMoved) as raised:
            stack.verify()
        for part in (r"\b2\b", r"blocks\.0\.up\.weight", r"blocks\.1\.mix"):
            self.assertRegex(str(raised.exception), part)
        self.assertIsInstance(raised.exception, RuntimeError)
        stack.restore()
        self.assertFalse(any(c.any() for c in tiny.changed(model, before).values()))

    def test_sign_of_zero_and_nan(self):
        model = tiny.plain()
        weight = model.blocks[0].up.weight
        with torch.no_grad():
            weight[0] = 0.0
        stack = BitStack(model, 1.0)
        stack.update(tiny.batches(2, seed=0))
        self.assertTrue(stack.masks["blocks.0.up.weight"][0].any())
        for value in (-0.0, float("nan")):
            with self.subTest(value):
                with torch.no_grad():
                    weight[0] = value
                with self.assertRaises(LockedWeightsMoved):
                    stack.verify()
                stack.restore()
                self.assertFalse(
                    tiny.as_bits(weight[0])[stack.masks["blocks.0.up.weight"][0]].any()
                )

    def test_free_entries_may_move_and_restore_leaves_them(self):
        model, _, stack = self.locked_model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        after = tiny.snapshot(model)
        stack.restore()
        self.assertEqual(stack.verify(), 0)
        for name, back in tiny.changed(model, after).items():
            expected = stack.masks.get(name, torch.zeros_like(back))
            self.assertTrue(torch.equal(back, expected), name)

    def test_an_update_does_not_accept_entries_that_moved(self):
        """They keep the value they were first locked with, though the update saw another one."""
        model, _, stack = self.locked_model()
        before, masks = tiny.snapshot(model), dict(stack.masks)
        with torch.no_grad():
            model.blocks[0].up.weight.add_(1e-3)
        stack.update(tiny.batches(2, seed=1))
        with self.assertRaises(LockedWeightsMoved):
            stack.verify()
        stack.restore()
        for name, mask in masks.items():
            self.assertFalse(tiny.changed(model, before)[name][mask].any(), name)

    def test_a_replaced_parameter_is_not_guarded_in_silence(self):
        def assign(model):
            model.load_state_dict(
                {k: v.clone() for k, v in model.state_dict().items()}, assign=True
            )

        def replace(model):
            model.blocks[0].up = nn.Linear(*reversed(model.blocks[0].up.weight.shape))

        for change in (assign, replace):
            with self.subTest(change.__name__):
                model, _, stack = self.locked_model()
                change(model)
                optimizer = SGD(model.parameters(), lr=0.1)
                for call in (
                    stack.verify,
                    lambda s=stack, o=optimizer: s.attach(o),
                    lambda s=stack: s.update(tiny.batches(1, seed=0)),
                ):
                    with self.assertRaisesRegex(RuntimeError, r"blocks\.0.*load it"):
                        call()

    def test_a_cast_before_the_first_lock(self):
        model = tiny.plain()
        stack = BitStack(model, 0.3)
        model.to(torch.bfloat16)
        stack.update(tiny.batches(2, seed=0))
        self.assertEqual(stack.verify(), 0)
        self.assertGreater(stack.stats()["locked"], 0)
        model.to(torch.float32)  # afterwards the exact values are gone
        with self.assertRaisesRegex(RuntimeError, "float32.*bfloat16"):
            stack.verify()

    def test_before_any_update(self):
        stack = BitStack(tiny.plain())
        self.assertEqual(stack.verify(), 0)
        stack.restore()


class Attaching(LockedCase):
    def moves(self, model, optimizer, stack) -> bool:
        tiny.train(model, optimizer, tiny.batches(2, seed=7))
        try:
            stack.verify()
        except LockedWeightsMoved:
            stack.restore()
            return True
        return False

    def test_detach_undoes_everything(self):
        model, optimizer, stack = self.locked_model()
        other = SGD(model.parameters(), lr=0.1)
        stack.attach(other)
        masks = dict(stack.masks)
        stack.detach()
        self.assertEqual(len(stack.handles), 0)
        for name, parameter in model.named_parameters():
            self.assertFalse(parameter._backward_hooks, name)
        for each in (optimizer, other):
            self.assertFalse(each._optimizer_step_post_hooks)
            self.assertFalse(each._optimizer_step_pre_hooks)
        for name, mask in stack.masks.items():
            self.assertTrue(torch.equal(mask, masks[name]))
        self.assertTrue(self.moves(model, optimizer, stack))
        stack.detach()  # again, harmless
        stack.attach(optimizer)
        self.assertEqual(set(stack.handles), {n for n, m in masks.items() if m.any()})
        before = tiny.snapshot(model)
        tiny.train(model, optimizer, tiny.batches(2, seed=8))
        self.assert_held(stack, model, before)

    def test_the_handle_removes(self):
        model, optimizer, stack = self.locked_model(partial(SGD, lr=0.1, weight_decay=0.1))
        handle = stack.attach(optimizer)
        self.assertFalse(self.moves(model, optimizer, stack))
        handle.remove()
        self.assertTrue(self.moves(model, optimizer, stack))

    def test_attaching_twice_is_attaching_once(self):
        model, optimizer, stack = self.locked_model()
        stack.attach(optimizer)
        self.assertEqual(len(optimizer._optimizer_step_post_hooks), 1)
        calls = dict(stack.hook_calls)
        tiny.train(model, optimizer, tiny.batches(1, seed=1))
        for name in stack.handles:
            self.assertEqual(stack.hook_calls[name] - calls.get(name, 0), 1)
        stack.attach(optimizer).remove()
        self.assertFalse(optimizer._optimizer_step_post_hooks)

    def test_an_optimizer_of_something_else(self):
        model, _, stack = self.locked_model()
        for name, parameters in {
            "another model": tiny.plain().parameters(),
            "only the head": model.classifier.parameters(),
        }.items():
            with self.subTest(name), self.assertRaises(ValueError):
                stack.attach(SGD(parameters, lr=0.1))
        for wrong in (None, model, "adamw"):
            with self.subTest(type(wrong)), self.assertRaises((TypeError, ValueError)):
                stack.attach(wrong)

    def test_part_of_the_model_in_the_optimizer(self):
        model, _, stack = self.locked_model()
        optimizer = ADAMW(model.blocks[1].parameters())
        stack.attach(optimizer)
        before = tiny.snapshot(model)
        tiny.train(model, optimizer, tiny.batches(2, seed=1))
        self.assert_held(stack, model, before, moving=0.2)

    def test_a_swapped_head_trains_freely(self):
        model, _, stack = self.locked_model()
        model.classifier = tiny.seeded(lambda: nn.Linear(tiny.WIDTH, 5), 3)
        optimizer = ADAMW(model.parameters())
        stack.attach(optimizer)
        before = tiny.snapshot(model)
        tiny.train(model, optimizer, tiny.batches(2, seed=1))
        self.assertTrue(tiny.changed(model, before)["classifier.weight"].all())
        self.assert_held(stack, model, before)


if __name__ == "__main__":
    unittest.main()
