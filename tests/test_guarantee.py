"""The guarantee: locked entries keep their bits through any optimizer and training regime."""

import shutil
import sysconfig
import unittest
from functools import partial
from pathlib import Path

import tiny
import torch
from cases import ADAMW, LockedCase
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
from bitstack_nb.guard import LockedWeightsMoved

OPTIMIZERS = {
    "AdamW": ADAMW,
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

INDUCTOR = shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()


class Optimizers(LockedCase):
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
                with self.assertRaises(LockedWeightsMoved):
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

    def test_steps_while_a_backward_pass_still_needs_the_other_weights(self):
        """Only the weights of the optimizer that stepped are written: autograd checks it."""
        model = tiny.plain()
        stack = BitStack(model, 0.3)
        stack.update(tiny.batches(2, seed=0))
        before = tiny.snapshot(model)
        parts = [list(block.parameters()) for block in model.blocks]
        optimizers = [ADAMW(part) for part in parts]
        for optimizer in optimizers:
            stack.attach(optimizer)
        for batch in tiny.batches(3, seed=1):
            loss = model(**batch).loss
            for part, optimizer in zip(parts, optimizers, strict=True):
                optimizer.zero_grad()
                loss.backward(inputs=part, retain_graph=True)
                optimizer.step()
        self.assert_held(stack, model, before)

    def test_an_optimizer_per_parameter_that_steps_in_backward(self):
        model, _, stack = self.locked_model()
        before = tiny.snapshot(model)
        for name, parameter in model.named_parameters():
            optimizer = ADAMW([parameter])
            parameter.register_post_accumulate_grad_hook(lambda _, o=optimizer: o.step())
            if name in stack.masks:
                stack.attach(optimizer)
        for batch in tiny.batches(2, seed=1):
            model.zero_grad()
            model(**batch).loss.backward()
        self.assert_held(stack, model, before)

    def test_attached_before_the_first_update_and_between_tasks(self):
        model = tiny.plain()
        optimizer = ADAMW(model.parameters())
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


class Gradients(LockedCase):
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
        for (name, parameter), other in zip(
            model.named_parameters(), twin.parameters(), strict=True
        ):
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
        optimizer = ADAMW(model.parameters())
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

    def test_gradients_of_gradients(self):
        """A penalty on gradients is differentiated through what is free."""
        model, _, stack = self.locked_model()
        weights = [model.get_parameter(name) for name in stack.handles]
        loss = model(**tiny.batches(1, seed=1)[0]).loss
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        for name, gradient in zip(stack.handles, gradients, strict=True):
            self.assertFalse(gradient[stack.masks[name]].any())
        penalty = sum(gradient.square().sum() for gradient in gradients)
        self.assertTrue(any(g.any() for g in torch.autograd.grad(penalty, weights)))

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
        optimizer = ADAMW(model.parameters())
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


class Regimes(LockedCase):
    def test_autocast_with_a_scaler(self):
        for name in ("AdamW", "AdamW fused", "SGD Nesterov"):
            with self.subTest(name):
                model, optimizer, stack = self.locked_model(OPTIMIZERS[name])
                scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
                before = tiny.snapshot(model)
                factors = (1, float("inf"), 1, float("nan"), 1)
                for factor, batch in zip(factors, tiny.batches(5, seed=1), strict=True):
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

    def check_compiled(self, backend: str, *, over_the_wrapper=True, trained_before=True):
        torch.compiler.reset()
        model = tiny.plain(depth=1)
        compiled = torch.compile(model, backend=backend)
        optimizer = ADAMW(model.parameters())
        stack = BitStack(compiled if over_the_wrapper else model, 0.3)
        if trained_before:
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
        for over_the_wrapper in (True, False):
            with self.subTest(over_the_wrapper=over_the_wrapper):
                self.check_compiled("aot_eager", over_the_wrapper=over_the_wrapper)

    def test_compiled_optimizer_step(self):
        torch.compiler.reset()
        model, optimizer, stack = self.locked_model()
        before = tiny.snapshot(model)
        step = torch.compile(optimizer.step, backend="aot_eager")
        model.train()
        for batch in tiny.batches(3, seed=1):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            step()
        self.assert_held(stack, model, before)

    @unittest.skipUnless(INDUCTOR, "torch.compile needs a C++ compiler and Python's headers")
    def test_compiled_to_machine_code(self):
        self.check_compiled("inductor", trained_before=False)  # or all is compiled twice

    def test_compiled_as_well_as_measured(self):
        """Compiling changes no choice: the masks equal those of the plain model."""
        plain = BitStack(tiny.plain(), 0.1)
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
                optimizer = ADAMW(model.parameters())
                tiny.train(model, optimizer, tiny.batches(2, seed=0))
                stack = BitStack(model, 0.3)
                stack.update(tiny.batches(2, seed=0))
                stack.attach(optimizer)
                before = tiny.snapshot(model)
                tiny.train(model, optimizer, tiny.batches(3, seed=1))
                self.assert_held(stack, model, before)


if __name__ == "__main__":
    unittest.main()
