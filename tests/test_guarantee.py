"""The guarantee: locked entries keep their bits through any optimizer and training regime."""

import unittest
from functools import partial

import tiny
import torch
from torch import nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    AdamW,
    NAdam,
    RMSprop,
    Rprop,
)

from bitstack_nb import BitStack
from bitstack_nb.stack import LockedEntriesMoved

OPTIMIZERS = {
    "AdamW": partial(AdamW, lr=1e-2, weight_decay=0.1),
    "AdamW foreach": partial(AdamW, lr=1e-2, weight_decay=0.1, foreach=True),
    "AdamW fused": partial(AdamW, lr=1e-2, weight_decay=0.1, fused=True),
    "Adam amsgrad": partial(Adam, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "NAdam": partial(NAdam, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "SGD": partial(SGD, lr=0.1, weight_decay=0.01),
    "SGD momentum": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "SGD Nesterov": partial(SGD, lr=0.1, momentum=0.9, nesterov=True),
    "SGD foreach": partial(SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "SGD fused": partial(SGD, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "Adagrad": partial(Adagrad, lr=1e-2, weight_decay=0.1),
    "Adagrad foreach": partial(Adagrad, lr=1e-2, weight_decay=0.1, foreach=True),
    "Adagrad fused": partial(Adagrad, lr=1e-2, weight_decay=0.1, fused=True),
    "RMSprop": partial(RMSprop, lr=1e-2, momentum=0.9, centered=True, weight_decay=0.1),
    "RMSprop foreach": partial(RMSprop, lr=1e-2, momentum=0.9, foreach=True),
    "Adafactor": partial(Adafactor, lr=1e-2, weight_decay=0.1),
    "Adafactor foreach": partial(Adafactor, lr=1e-2, weight_decay=0.1, foreach=True),
    "Adadelta": partial(Adadelta, lr=1.0, weight_decay=0.1),
    "ASGD": partial(ASGD, lr=0.1),
    "Rprop": Rprop,
}
adamw = OPTIMIZERS["AdamW"]


class Case(unittest.TestCase):
    def locked_model(self, make_optimizer=adamw, *, build=tiny.plain, sparsity=0.3):
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


class Optimizers(Case):
    def test_every_optimizer(self):
        for name, make in OPTIMIZERS.items():
            with self.subTest(name):
                model, optimizer, stack = self.locked_model(make)
                before = tiny.snapshot(model)
                tiny.train(model, optimizer, tiny.batches(4, seed=1))
                self.assert_held(stack, model, before)

    def test_without_the_guarantee_they_move(self):
        """The control: zero gradients alone do not hold an entry with live state or decay."""
        for name in ("AdamW", "SGD momentum", "SGD Nesterov", "Adafactor", "RMSprop"):
            with self.subTest(name):
                model = tiny.plain()
                optimizer = OPTIMIZERS[name](model.parameters())
                tiny.train(model, optimizer, tiny.batches(3, seed=0))
                stack = BitStack(model, 0.3)
                stack.update(tiny.batches(2, seed=0))
                tiny.train(model, optimizer, tiny.batches(1, seed=1))
                with self.assertRaises(LockedEntriesMoved):
                    stack.verify()

    def test_lbfgs_closure(self):
        model, _, stack = self.locked_model(partial(SGD, lr=0.1), build=tiny.llama)
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
        batch = tiny.batches(1, seed=1)[0]
        model.eval()

        def closure():
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            return loss

        stack.attach(optimizer)
        before = tiny.snapshot(model)
        for _ in range(2):
            optimizer.step(closure)
        self.assert_held(stack, model, before)

    def test_low_and_double_precision(self):
        for dtype in (torch.bfloat16, torch.float64):
            with self.subTest(dtype=dtype):
                model, optimizer, stack = self.locked_model(
                    partial(SGD, lr=1.0, momentum=0.9), build=lambda d=dtype: tiny.plain().to(d)
                )
                before = tiny.snapshot(model)
                tiny.train(model, optimizer, tiny.batches(3, seed=1))
                self.assert_held(stack, model, before)

    def test_two_optimizers_and_groups(self):
        model = tiny.plain()
        first, second = model.blocks[0].parameters(), model.blocks[1].parameters()
        optimizers = [
            AdamW([{"params": [p], "weight_decay": 0.1 * i} for i, p in enumerate(first)], lr=0.01),
            SGD(second, lr=0.1, momentum=0.9),
        ]
        stack = BitStack(model, 0.3)
        for optimizer in optimizers:
            stack.attach(optimizer)
        stack.update(tiny.batches(2, seed=0))
        before = tiny.snapshot(model)
        for batch in tiny.batches(3, seed=1):
            model.zero_grad()
            model(**batch).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
        self.assert_held(stack, model, before)

    def test_attached_before_the_first_update_and_between_tasks(self):
        model = tiny.plain()
        optimizer = adamw(model.parameters())
        stack = BitStack(model, 0.1, budget="fresh")
        stack.attach(optimizer)
        for task in range(3):
            before, masks = tiny.snapshot(model), dict(stack.masks)
            tiny.train(model, optimizer, tiny.batches(3, seed=task))
            for name, mask in masks.items():
                self.assertFalse(tiny.changed(model, before)[name][mask].any())
            stack.update(tiny.batches(2, seed=task))
        before = tiny.snapshot(model)
        tiny.train(model, optimizer, tiny.batches(3, seed=5))
        self.assert_held(stack, model, before)


class Gradients(Case):
    def test_locked_gradients_are_zero_before_clipping(self):
        model, optimizer, stack = self.locked_model()
        twin = tiny.unhooked_copy(model)
        batch = tiny.batches(1, seed=1)[0]
        for each in (model, twin):
            each.zero_grad()
            each.eval()
            each(**batch).loss.backward()
        masks = stack.masks
        removed = 0.0
        for (name, parameter), other in zip(model.named_parameters(), twin.parameters()):
            expected = other.grad
            if name in masks:
                removed += float(expected[masks[name]].abs().sum())
                expected = expected.masked_fill(masks[name], 0)
            self.assertTrue(torch.equal(parameter.grad, expected), name)
            other.grad = expected
        self.assertGreater(removed, 0)
        clip = torch.nn.utils.clip_grad_norm_
        norms = [float(clip(each.parameters(), 0.01)) for each in (model, twin)]
        self.assertEqual(*norms)
        before = tiny.snapshot(model)
        optimizer.step()
        self.assert_held(stack, model, before)

    def test_moments_stay_clean(self):
        model, _, stack = self.locked_model()
        optimizer = adamw(model.parameters())
        stack.attach(optimizer)
        tiny.train(model, optimizer, tiny.batches(3, seed=1))
        for name, parameter in model.named_parameters():
            if name in stack.masks:
                mask = stack.masks[name]
                for moment in ("exp_avg", "exp_avg_sq"):
                    self.assertFalse(optimizer.state[parameter][moment][mask].any())

    def test_accumulation(self):
        model, optimizer, stack = self.locked_model()
        before, calls = tiny.snapshot(model), dict(stack.hook_calls)
        for _ in range(2):
            optimizer.zero_grad()
            for batch in tiny.batches(3, seed=1):
                (model(**batch).loss / 3).backward()
            for name, parameter in model.named_parameters():
                if name in stack.masks:
                    self.assertFalse(parameter.grad[stack.masks[name]].any())
            optimizer.step()
        self.assert_held(stack, model, before)
        for name in stack.handles:
            self.assertEqual(stack.hook_calls[name] - calls.get(name, 0), 6)

    def test_infinite_and_nan_gradients(self):
        for value in (float("inf"), -float("inf"), float("nan")):
            for clipped in (False, True):
                with self.subTest(value=value, clipped=clipped):
                    model, optimizer, stack = self.locked_model()
                    before = tiny.snapshot(model)
                    optimizer.zero_grad()
                    model(**tiny.batches(1, seed=1)[0], loss_scale=value).loss.backward()
                    for name in stack.masks:
                        gradient = model.get_parameter(name).grad
                        self.assertFalse(gradient[stack.masks[name]].any())
                        self.assertFalse(gradient.isfinite().all() and (gradient != 0).any())
                    if clipped:
                        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    self.assert_held(stack, model, before)

    def test_a_bad_gradient_in_a_locked_entry_never_reaches_the_scaler(self):
        model = tiny.plain()
        weight = model.blocks[0].up.weight
        poisoned = torch.zeros_like(weight, dtype=torch.bool)
        live = []  # filled after the update
        weight.register_hook(lambda g: g.masked_fill(poisoned, float("inf")) if live else g)
        optimizer = adamw(model.parameters())
        stack = BitStack(model, 0.3)
        stack.update(tiny.batches(2, seed=0))
        stack.attach(optimizer)
        poisoned |= stack.masks["blocks.0.up.weight"]
        live.append(True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        before = tiny.snapshot(model)
        for batch in tiny.batches(2, seed=1):
            optimizer.zero_grad()
            scaler.scale(model(**batch).loss).backward()
            scaler.step(optimizer)
            scaler.update()
        self.assertEqual(scaler.get_scale(), 1024.0)
        self.assert_held(stack, model, before)


class Regimes(Case):
    def test_autocast_with_a_scaler(self):
        for name in ("AdamW", "AdamW fused", "SGD Nesterov"):
            with self.subTest(name):
                model, optimizer, stack = self.locked_model(OPTIMIZERS[name])
                scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
                before = tiny.snapshot(model)
                for factor, batch in zip(
                    (1, float("inf"), 1, float("nan"), 1), tiny.batches(5, seed=1)
                ):
                    optimizer.zero_grad()
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        loss = model(**batch, loss_scale=factor).loss
                    scaler.scale(loss).backward()
                    scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    scaler.step(optimizer)
                    scaler.update()
                    self.assertEqual(stack.verify(), 0)
                self.assertEqual(scaler.get_scale(), 256.0)  # both bad steps were skipped
                self.assertTrue(all(p.isfinite().all() for p in model.parameters()))
                self.assert_held(stack, model, before)

    def check_compiled(self, backend: str):
        for over_the_wrapper in (True, False):
            with self.subTest(backend=backend, over_the_wrapper=over_the_wrapper):
                torch.compiler.reset()
                model = tiny.plain(depth=1)
                compiled = torch.compile(model, backend=backend)
                optimizer = adamw(model.parameters())
                stack = BitStack(compiled if over_the_wrapper else model, 0.3)
                tiny.train(compiled, optimizer, tiny.batches(2, seed=0))
                stack.attach(optimizer)
                for task in range(2):
                    stack.update(tiny.batches(2, seed=task))
                    before, calls = tiny.snapshot(model), dict(stack.hook_calls)
                    tiny.train(compiled, optimizer, tiny.batches(3, seed=task + 1))
                    self.assert_held(stack, model, before)
                    for name in stack.handles:
                        self.assertEqual(stack.hook_calls[name] - calls.get(name, 0), 3)
                        gradient = model.get_parameter(name).grad
                        self.assertFalse(gradient[stack.masks[name]].any())

    def test_compiled(self):
        self.check_compiled("aot_eager")

    def test_compiled_as_well_as_measured(self):
        """Compiling changes no choice: the masks equal those of the plain model."""
        plain, compiled = (BitStack(tiny.plain(), 0.1) for _ in range(2))
        compiled = BitStack(torch.compile(tiny.plain(), backend="aot_eager"), 0.1)
        for stack in (plain, compiled):
            stack.update(tiny.batches(2, seed=0))
        agree = sum(int((compiled.masks[n] == m).sum()) for n, m in plain.masks.items())
        self.assertGreater(agree, 0.999 * plain.stats()["eligible"])

    def test_gradient_checkpointing(self):
        for reentrant in (False, True):
            with self.subTest(reentrant=reentrant):
                model = tiny.gpt2()
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                optimizer = adamw(model.parameters())
                tiny.train(model, optimizer, tiny.batches(2, seed=0))
                stack = BitStack(model, 0.3)
                stack.update(tiny.batches(2, seed=0))
                stack.attach(optimizer)
                before = tiny.snapshot(model)
                tiny.train(model, optimizer, tiny.batches(3, seed=1))
                self.assert_held(stack, model, before)


class Verify(Case):
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
                        LockedEntriesMoved, name.replace(".", r"\.")
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
        with self.assertRaises(LockedEntriesMoved) as raised:
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
                with self.assertRaises(LockedEntriesMoved):
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

    def test_before_any_update(self):
        stack = BitStack(tiny.plain())
        self.assertEqual(stack.verify(), 0)
        stack.restore()


class Attaching(Case):
    def moves(self, model, optimizer, stack) -> bool:
        tiny.train(model, optimizer, tiny.batches(2, seed=7))
        try:
            stack.verify()
        except LockedEntriesMoved:
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
        optimizer = adamw(model.blocks[1].parameters())
        stack.attach(optimizer)
        before = tiny.snapshot(model)
        tiny.train(model, optimizer, tiny.batches(2, seed=1))
        self.assert_held(stack, model, before, moving=0.2)

    def test_a_swapped_head_trains_freely(self):
        model, _, stack = self.locked_model()
        model.classifier = tiny.seeded(lambda: nn.Linear(tiny.WIDTH, 5), 3)
        optimizer = adamw(model.parameters())
        stack.attach(optimizer)
        before = tiny.snapshot(model)
        tiny.train(model, optimizer, tiny.batches(2, seed=1))
        self.assertTrue(tiny.changed(model, before)["classifier.weight"].all())
        self.assert_held(stack, model, before)


if __name__ == "__main__":
    unittest.main()
