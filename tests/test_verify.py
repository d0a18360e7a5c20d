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
    def test_one_unit_in_the_last_place(self):
        """verify names the parameter and counts; it changes nothing, and restore puts back."""
        model, _, stack = self.locked_model()
        before = tiny.snapshot(model)
        for name in ("blocks.0.mix", "blocks.1.down.weight"):
            for toward in (float("inf"), -float("inf")):
                with self.subTest(name=name, toward=toward), torch.no_grad():
                    parameter = model.get_parameter(name)
                    index = tuple(stack.masks[name].nonzero()[-1])
                    parameter[index] = torch.nextafter(parameter[index], torch.tensor(toward))
                    moved, name_and_count = (
                        tiny.snapshot(model),
                        name.replace(".", r"\.") + r" \(1\)",
                    )
                    with self.assertRaisesRegex(LockedWeightsMoved, f"^1 .*{name_and_count}"):
                        stack.verify()
                    self.assertFalse(any(c.any() for c in tiny.changed(model, moved).values()))
                    stack.restore()
                    self.assertFalse(any(c.any() for c in tiny.changed(model, before).values()))

    def test_sign_of_zero_and_nan(self):
        model = tiny.plain()
        weight = model.blocks[0].up.weight
        with torch.no_grad():
            weight[0] = 0.0
        stack = BitStack(model, 1.0)
        stack.update(tiny.batches(2, seed=0))
        locked = stack.masks["blocks.0.up.weight"][0]
        self.assertTrue(locked.any())
        for value in (-0.0, float("nan")):
            with torch.no_grad():
                weight[0] = value
            with self.assertRaises(LockedWeightsMoved):
                stack.verify()
            stack.restore()
            self.assertFalse(tiny.as_bits(weight[0])[locked].any())

    def test_free_weights_may_move_and_restore_leaves_them(self):
        model, _, stack = self.locked_model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        after = tiny.snapshot(model)
        stack.restore()
        self.assertEqual(stack.verify(), 0)
        for name, back in tiny.changed(model, after).items():
            self.assertTrue(torch.equal(back, stack.masks.get(name, torch.zeros_like(back))), name)

    def test_an_update_does_not_accept_weights_that_moved(self):
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
            state = {name: value.clone() for name, value in model.state_dict().items()}
            model.load_state_dict(state, assign=True)

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

    def test_embeddings_resized_after_locking(self):
        """Any use of the stack names both shapes in a line; before locking it is no fault."""
        batches = [{**b, "input_ids": b["input_ids"] % 30} for b in tiny.batches(2, seed=0)]
        for rows in (32, 45):
            model = tiny.plain()
            stack = BitStack(model, 0.3, exclude=["classifier"])
            model.embed.weight.data = torch.ones(36, 16)
            stack.update(batches)
            optimizer = ADAMW(model.parameters())
            stack.attach(optimizer)
            model.embed.weight.data = torch.ones(rows, 16)
            for call in (
                stack.verify,
                stack.restore,
                partial(tiny.train, model, optimizer, batches),
                partial(stack.update, batches),
            ):
                shapes = rf"^embed\.weight has shape \({rows}, 16\).*\(36, 16\): resize"
                with self.assertRaisesRegex(RuntimeError, shapes):
                    call()

    def test_before_any_update(self):
        """There is nothing to restore, and a cast loses nothing yet."""
        model = tiny.plain()
        stack = BitStack(model, 0.3)
        self.assertEqual(stack.verify(), 0)
        stack.restore()
        model.to(torch.bfloat16)
        self.assertGreater(stack.update(tiny.batches(2, seed=0))["locked"], 0)
        self.assertEqual(stack.verify(), 0)
        model.to(torch.float32)
        with self.assertRaisesRegex(RuntimeError, "float32.*bfloat16"):
            stack.verify()


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
        for _ in range(2):  # the second time it is harmless
            stack.detach()
            self.assertEqual(len(stack.handles), 0)
            self.assertFalse(any(p._backward_hooks for p in model.parameters()))
            for each in (optimizer, other):
                self.assertFalse(each._optimizer_step_post_hooks or each._optimizer_step_pre_hooks)
        self.assertTrue(all(torch.equal(m, masks[name]) for name, m in stack.masks.items()))
        self.assertTrue(self.moves(model, optimizer, stack))
        stack.attach(optimizer)
        self.assertEqual(set(stack.handles), {n for n, m in masks.items() if m.any()})
        before = tiny.snapshot(model)
        tiny.train(model, optimizer, tiny.batches(2, seed=8))
        self.assert_held(stack, model, before)

    def test_attaching_twice_is_attaching_once(self):
        model, optimizer, stack = self.locked_model(partial(SGD, lr=0.1, weight_decay=0.1))
        handle, calls = stack.attach(optimizer), dict(stack.hook_calls)
        self.assertEqual(len(optimizer._optimizer_step_post_hooks), 1)
        self.assertFalse(self.moves(model, optimizer, stack))
        for name in stack.handles:
            self.assertEqual(stack.hook_calls[name] - calls.get(name, 0), 2)
        handle.remove()
        self.assertFalse(optimizer._optimizer_step_post_hooks)
        self.assertFalse(optimizer._optimizer_step_pre_hooks)
        self.assertTrue(self.moves(model, optimizer, stack))

    def test_an_optimizer_of_something_else(self):
        model, _, stack = self.locked_model()
        with self.assertRaisesRegex(ValueError, "no parameter of the stack's model"):
            stack.attach(SGD(tiny.plain().parameters(), lr=0.1))
        for wrong in (None, model, "adamw"):
            with self.assertRaises(TypeError):
                stack.attach(wrong)

    def test_part_of_the_model_in_the_optimizer(self):
        model, _, stack = self.locked_model()
        optimizer = ADAMW(model.blocks[1].parameters())
        stack.attach(optimizer)
        before = tiny.snapshot(model)
        tiny.train(model, optimizer, tiny.batches(2, seed=1))
        self.assert_held(stack, model, before, moving=0.2)

    def test_an_optimizer_of_the_head_alone(self):
        model, _, stack = self.locked_model()
        before = tiny.snapshot(model)
        optimizer = ADAMW(model.classifier.parameters())
        stack.attach(optimizer)
        tiny.train(model, optimizer, tiny.batches(2, seed=1))
        moved = [name for name, changed in tiny.changed(model, before).items() if changed.any()]
        self.assertEqual(moved, ["classifier.weight", "classifier.bias"])
        optimizer.add_param_group({"params": model.blocks[0].parameters()})
        tiny.train(model, optimizer, tiny.batches(2, seed=2))
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
