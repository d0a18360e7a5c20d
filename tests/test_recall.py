"""Exact recall: any task's model comes back bit for bit, and a task moves its own entries only."""

import copy
import random
import unittest
from functools import partial
from types import SimpleNamespace

import numpy as np
import reference
import tiny
import torch
from cases import ADAMW, RecallCase, backbone
from torch import nn
from torch.optim import SGD

from bitstack_nb import BitStack, ExactRecall
from bitstack_nb.guard import LockedWeightsMoved
from bitstack_nb.settings import IMPORTANCES, RANDOM


def recall_stack(model=None, sparsity=0.2, **settings) -> ExactRecall:
    model = tiny.plain() if model is None else model
    return ExactRecall(model, sparsity, **{"importance": "gradient"} | settings)


class AgainstReference(RecallCase):
    def test_every_step_of_several_tasks(self):
        """Head, choice, training with live AdamW state and dropout: every bit the same."""
        for architecture, (build, _) in tiny.ARCHITECTURES.items():
            with self.subTest(architecture):
                self.compare(architecture, build)

    def test_random_entries(self):
        build, _ = tiny.ARCHITECTURES["bert"]
        self.compare("bert", build, importance="random")

    def compare(self, architecture, build, **settings):
        model, plain_model = build(), build()
        names = tiny.expected_eligible(architecture, model)
        outside = ("classifier.", "score.", "pre_classifier.", "head.")
        heads = [n for n, _ in model.named_parameters() if n.startswith(outside)]
        stack = recall_stack(model, 0.25, **settings)
        plain = reference.RecallReference(
            plain_model, names, sparsity=0.25, heads=heads, **settings
        )
        optimizer, plain_optimizer = ADAMW(model.parameters()), ADAMW(plain_model.parameters())
        stack.attach(optimizer)
        for task in range(3):
            loader = tiny.batches(3, seed=task)
            stack.begin(str(task), loader=loader, head_steps=4, head_learning_rate=0.01)
            plain.begin(loader, steps=4, learning_rate=0.01)
            self.assert_equal(model, plain_model)
            for name, owned in plain.owned.items():
                self.assertTrue(torch.equal(stack.masks[name], owned), name)
            tiny.train(model, optimizer, loader, seed=task)
            plain.train(plain_optimizer, loader, seed=task)
            stack.close()
            plain.update()
            self.assert_equal(model, plain_model)
        for task, expected in enumerate(plain.models):
            with stack.using(None if task is None else str(task)):
                for name, value in expected.items():
                    own = model.get_parameter(name)
                    self.assertTrue(torch.equal(tiny.as_bits(own), tiny.as_bits(value)), name)

    def assert_equal(self, model, other):
        for name, different in tiny.changed(model, tiny.snapshot(other)).items():
            self.assertFalse(different.any(), name)


class Exactness(RecallCase):
    def test_optimizers(self):
        for name, make in {
            "AdamW": ADAMW,
            "AdamW fused": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, fused=True),
            "SGD momentum": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
            "Adafactor": partial(torch.optim.Adafactor, lr=1e-2, weight_decay=0.1),
        }.items():
            with self.subTest(name):
                model, stack = self.trained(make_optimizer=make)
                self.assert_bits(model, self.after[-1])
                self.assert_recalls(model, stack)

    def test_dtypes(self):
        for dtype in (torch.bfloat16, torch.float64):
            with self.subTest(dtype):
                sgd = partial(SGD, lr=0.5, momentum=0.9)
                model, stack = self.trained(tiny.plain().to(dtype), make_optimizer=sgd)
                self.assert_recalls(model, stack)

    def test_architectures(self):
        for name in ("gpt2", "bert"):
            with self.subTest(name):
                model, stack = self.trained(tiny.ARCHITECTURES[name][0](), sparsity=0.3)
                self.assert_recalls(model, stack)

    def test_tasks_differ_in_their_own_entries_only(self):
        model = tiny.plain()
        base, stack = backbone(model), recall_stack(model)
        optimizer = ADAMW(model.parameters())
        stack.attach(optimizer)
        eligible = stack.stats()["eligible"]
        before = dict(stack.masks)
        for task in range(3):
            numbers = stack.begin(str(task), loader=tiny.batches(3, seed=task))
            self.assertEqual(numbers["locked"], (task + 1) * round(0.2 * eligible))
            own = {name: mask & ~before[name] for name, mask in stack.masks.items()}
            self.assertEqual(sum(int(m.sum()) for m in own.values()), round(0.2 * eligible))
            tiny.train(model, optimizer, tiny.batches(4, seed=task))
            self.assertEqual(stack.verify(), 0)
            stack.close()
            for name, value in backbone(model).items():
                different = tiny.as_bits(value) != tiny.as_bits(base[name])
                mine = own.get(name, torch.zeros_like(different))
                self.assertFalse(different[~mine].any(), name)
            moved = sum(
                int((tiny.as_bits(model.get_parameter(n)) != tiny.as_bits(base[n])).sum())
                for n in own
            )
            self.assertGreater(moved, 0.9 * round(0.2 * eligible))
            for name, mask in before.items():
                self.assertTrue((stack.masks[name] >= mask).all())
            before = dict(stack.masks)

    def test_begin_puts_the_base_back_and_fits_the_head_alone(self):
        model, stack = self.trained(tasks=1)
        with torch.no_grad():
            model.embed.weight.add_(1.0)
            model.blocks[0].up.weight.add_(1.0)
        head = model.classifier.weight.detach().clone()
        stack.begin("1", loader=tiny.batches(3, seed=1), head_steps=0)
        self.assert_bits(model, self.base)
        self.assertTrue(torch.equal(model.classifier.weight, head))
        stack.close()
        stack.begin("2", loader=tiny.batches(3, seed=1), head_steps=5)
        self.assert_bits(model, self.base)
        self.assertFalse(torch.equal(model.classifier.weight, head))

    def test_the_head_is_fitted_round_and_round_a_short_loader(self):
        """A stream that can be read once serves the head's steps and the importance."""
        losses = []
        for steps in (0, 40):
            model = tiny.plain()
            loader = tiny.batches(2, seed=0)
            recall_stack(model).begin("a", loader=iter(loader), head_steps=steps)
            model.eval()
            losses.append(sum(float(model(**batch).loss) for batch in loader))
        self.assertLess(losses[1], 0.9 * losses[0])

    def test_heads_are_free_and_can_be_swapped(self):
        model, stack = self.trained(tasks=1)
        model.classifier = tiny.seeded(lambda: nn.Linear(tiny.WIDTH, 5), 3)
        optimizer = ADAMW(model.parameters())
        stack.attach(optimizer)
        self.train_task(model, stack, optimizer, 1)
        self.assert_recalls(model, stack)

    def test_what_no_task_may_own_stays_at_the_base(self):
        model = tiny.plain()
        model.blocks[1].register_buffer("scale", torch.ones(3))
        model.blocks[1].norm.weight.requires_grad_(False)
        model, stack = self.trained(model, exclude=["embed", "blocks.0", "norm"])
        self.assertEqual({n.split(".")[0] for n in stack.masks}, {"blocks"})
        self.assertNotIn("classifier.weight", recall_stack(exclude=[]).masks)
        for after in self.after:
            for name, value in after.items():
                if name not in stack.masks:
                    self.assertTrue(torch.equal(value, self.base[name]), name)
        self.assert_recalls(model, stack)
        for change in (model.blocks[1].scale, model.embed.weight, model.blocks[1].norm.weight):
            with torch.no_grad():
                change[0] += 1.0
            with self.assertRaises(LockedWeightsMoved):
                stack.verify()
            stack.restore()
            self.assertEqual(stack.verify(), 0)

    def test_buffers_stay_at_the_base(self):
        model = tiny.plain()
        model.blocks[0].norm = nn.BatchNorm1d(tiny.LENGTH)
        model, _ = self.trained(model)
        self.assert_bits(model, self.after[-1])
        norm = model.blocks[0].norm
        self.assertTrue(torch.equal(norm.running_mean, torch.zeros(tiny.LENGTH)))
        self.assertEqual(norm.num_batches_tracked, 0)  # an integer, for a fixed base all the same

    def test_running_statistics_of_a_forward_pass_without_a_step(self):
        """The last accumulated batch, or one whose step a GradScaler skipped."""
        model = tiny.plain()
        model.blocks[0].norm = nn.BatchNorm1d(tiny.LENGTH)
        model, stack = self.trained(model, tasks=2)
        (batch,) = tiny.batches(1, seed=9)
        for task in (1, 0, None):
            model.train()(**batch)
            with self.assertRaisesRegex(LockedWeightsMoved, "running_mean"):
                stack.verify()
            with stack.using(None if task is None else str(task)):
                self.assertEqual(stack.verify(), 0)
            self.assertEqual(stack.verify(), 0)
        stack.begin("2", loader=tiny.batches(2, seed=2))
        model.train()(**batch)
        stack.close()
        self.assertEqual(stack.verify(), 0)

    def test_a_step_without_an_open_task_moves_the_head_only(self):
        model, stack = self.trained(tasks=2)
        optimizer = ADAMW(model.parameters())
        stack.attach(optimizer)
        head = model.classifier.weight.detach().clone()
        tiny.train(model, optimizer, tiny.batches(2, seed=5))
        self.assert_bits(model, self.after[-1])
        self.assertFalse(torch.equal(model.classifier.weight, head))
        with stack.using("0"):
            tiny.train(model, optimizer, tiny.batches(2, seed=5))
            self.assert_bits(model, self.after[0])
        self.assert_bits(model, self.after[-1])

    def test_gradients_are_zero_but_for_the_tasks_own_entries(self):
        model, stack = self.trained(tasks=1)
        before = dict(stack.masks)
        stack.begin("1", loader=tiny.batches(2, seed=1))
        model.zero_grad()
        model(**tiny.batches(1, seed=1)[0], loss_scale=float("inf")).loss.backward()
        own = {name: mask & ~before[name] for name, mask in stack.masks.items()}
        for name, parameter in model.named_parameters():
            if not name.startswith("classifier"):
                mine = own.get(name, torch.zeros_like(parameter, dtype=torch.bool))
                self.assertFalse(parameter.grad[~mine].any(), name)
        live = sum(int((model.get_parameter(n).grad != 0).sum()) for n in own)
        self.assertEqual(live, sum(int(mask.sum()) for mask in own.values()))

    def test_without_the_guarantee_a_task_is_not_closed(self):
        model = tiny.plain()
        stack = recall_stack(model)
        stack.begin("0", loader=tiny.batches(2, seed=0))
        tiny.train(model, ADAMW(model.parameters()), tiny.batches(2, seed=0))
        with self.assertRaisesRegex(LockedWeightsMoved, r"embed\.weight.*attach"):
            stack.close()
        stack.restore()
        stack.close()
        self.assertEqual(stack.verify(), 0)

    def test_verify_counts(self):
        model, stack = self.trained(tasks=2)
        name = "blocks.0.mix"
        own = tiny.as_bits(self.after[1][name]) != tiny.as_bits(self.base[name])
        foreign = tiny.as_bits(self.after[0][name]) != tiny.as_bits(self.base[name])
        for entries in (own, foreign, ~own & ~foreign):
            at = tuple(entries.nonzero()[0])
            with torch.no_grad():
                value = model.get_parameter(name)[at]
                value.copy_(torch.nextafter(value, torch.tensor(9.0)))
            with self.assertRaisesRegex(LockedWeightsMoved, r"^1 .*blocks\.0\.mix \(1\)"):
                stack.verify()
            stack.restore()
            self.assertEqual(stack.verify(), 0)

    def test_training_free_of_gradient_hooks_after_detach(self):
        model, stack = self.trained(tasks=1)
        stack.detach()
        self.assertFalse(any(p._backward_hooks for p in model.parameters()))
        self.assert_recalls(model, stack)

    def test_a_compiled_model(self):
        torch.compiler.reset()
        model = tiny.plain(depth=1)
        compiled = torch.compile(model, backend="aot_eager")
        self.base, self.after = backbone(model), []
        stack = recall_stack(compiled)
        optimizer = ADAMW(model.parameters())
        stack.attach(optimizer)
        outputs, batch = [], tiny.batches(1, seed=9)[0]
        for task in range(2):
            stack.begin(str(task), loader=tiny.batches(2, seed=task))
            tiny.train(compiled, optimizer, tiny.batches(3, seed=task))
            stack.close()
            self.after.append(backbone(model))
            compiled.eval()
            head = copy.deepcopy(model.classifier.state_dict())
            outputs.append((head, compiled(**batch).logits))
        self.assert_recalls(model, stack)
        for task, (head, logits) in enumerate(outputs):
            model.classifier.load_state_dict(head)
            with stack.using(None if task is None else str(task)):
                self.assertTrue(torch.equal(compiled(**batch).logits, logits))


class Blocks(RecallCase):
    """The context manager."""

    def test_nesting(self):
        model, stack = self.trained()
        with stack.using("0"):
            with stack.using("1"):
                with stack.using(None):
                    with stack.using("1"):
                        self.assert_bits(model, self.after[1])
                    self.assert_bits(model, self.base)
                self.assert_bits(model, self.after[1])
            self.assert_bits(model, self.after[0])
        self.assert_bits(model, self.after[2])

    def test_an_exception(self):
        model, stack = self.trained()
        with self.assertRaisesRegex(KeyError, "mine"), stack.using("0"), stack.using(None):
            raise KeyError("mine")
        self.assert_bits(model, self.after[2])
        self.assertEqual(stack.verify(), 0)

    def test_while_a_task_is_open(self):
        """Its entries come back as they stood, and train on."""
        model, stack = self.trained(tasks=2)
        optimizer = ADAMW(model.parameters())
        stack.attach(optimizer)
        stack.begin("2", loader=tiny.batches(2, seed=2))
        tiny.train(model, optimizer, tiny.batches(2, seed=2))
        present = backbone(model)
        self.assert_recalls(model, stack)
        with stack.using("0"), stack.using(None):
            tiny.train(model, optimizer, tiny.batches(2, seed=3))
            self.assert_bits(model, self.base)
        self.assert_bits(model, present)
        tiny.train(model, optimizer, tiny.batches(2, seed=2))
        stack.close()
        self.after.append(backbone(model))
        self.assertFalse(torch.equal(model.blocks[0].up.weight, present["blocks.0.up.weight"]))
        self.assert_recalls(model, stack)

    def test_the_model_it_gives(self):
        model, stack = self.trained(tasks=1)
        with stack.using("0") as shown:
            self.assertIs(shown, model)

    def test_within_autocast_and_inference_mode(self):
        model, stack = self.trained()
        batch = tiny.batches(1, seed=9)[0]
        model.eval()
        expected = []
        for task in range(3):
            with (
                stack.using(None if task is None else str(task)),
                torch.autocast("cpu", dtype=torch.bfloat16),
            ):
                expected.append(model(**batch).logits.detach())
        self.assertFalse(torch.equal(expected[0], expected[1]))
        for mode in (torch.enable_grad, torch.inference_mode):
            with mode(), torch.autocast("cpu", dtype=torch.bfloat16):
                for task in (1, 0, 2):
                    with stack.using(None if task is None else str(task)):
                        self.assertTrue(torch.equal(model(**batch).logits, expected[task]))
        self.assert_recalls(model, stack)

    def test_the_order_of_things(self):
        model, stack = self.trained(tasks=1)
        for task in (1, -1, 0, "1", 0.5):
            with self.subTest(task), self.assertRaisesRegex(ValueError, f"task is {task!r}"):
                with stack.using(task):
                    self.fail("there is no such task")
        with stack.using("0"):
            for call in (
                lambda: stack.begin("a", loader=tiny.batches(1, seed=0)),
                stack.close,
                lambda: stack.load_state_dict(stack.state_dict()),
            ):
                with self.assertRaisesRegex(RuntimeError, "leave the block first"):
                    call()
        self.assert_bits(model, self.after[0])


class Order(RecallCase):
    """Methods at the wrong time."""

    def test_update_without_begin(self):
        stack = recall_stack()
        with self.assertRaisesRegex(RuntimeError, "no task is open.*begin"):
            stack.close()
        stack.begin("0", loader=tiny.batches(2, seed=0))
        stack.close()
        with self.assertRaisesRegex(RuntimeError, "no task is open"):
            stack.close()

    def test_begin_twice(self):
        stack = recall_stack()
        stack.begin("0", loader=tiny.batches(2, seed=0))
        masks = dict(stack.masks)
        with self.assertRaisesRegex(RuntimeError, r"task '0' is still open.*close"):
            stack.begin("1", loader=tiny.batches(2, seed=1))
        for name, mask in masks.items():
            self.assertTrue(torch.equal(stack.masks[name], mask))

    def test_no_head(self):
        class Headless(tiny.Plain):
            def __init__(self):
                super().__init__()
                self.out = self.classifier
                del self.classifier

        with self.assertRaisesRegex(ValueError, "Headless has no trainable head.*classifier"):
            recall_stack(Headless())

    def test_a_cast(self):
        model, stack = self.trained(tasks=1)
        model.to(torch.bfloat16)
        for call in (stack.verify, stack.restore, lambda: stack.using(None).__enter__()):
            with self.assertRaisesRegex(RuntimeError, "bfloat16.*float32"):
                call()

    def test_a_replaced_module(self):
        model, stack = self.trained(tasks=1)
        model.embed = nn.Embedding(tiny.VOCABULARY, tiny.WIDTH)
        for call in (
            stack.verify,
            stack.restore,
            lambda: stack.begin("a", loader=tiny.batches(1, seed=0)),
            lambda: stack.using("0").__enter__(),
            lambda: stack.export("0"),
        ):
            with self.assertRaisesRegex(RuntimeError, r"embed\.weight"):
                call()


class Budget(RecallCase):
    def test_tasks_fit_as_often_as_the_sparsity_says(self):
        for sparsity, fit in ((0.5, 2), (1 / 3, 3), (0.4, 2), (0.2, 5), (1.0, 1)):
            with self.subTest(sparsity):
                model = tiny.plain()
                stack = recall_stack(model, sparsity)
                budget = round(sparsity * stack.stats()["eligible"])
                owned = 0
                for task in range(fit):
                    now = stack.begin(str(task), loader=tiny.batches(3, seed=task), head_steps=0)[
                        "locked"
                    ]
                    # Entries without a gradient are nobody's; rounding may cost the last task.
                    self.assertLessEqual(now - owned, budget)
                    self.assertGreaterEqual(now - owned, budget - 3)
                    owned = now
                    stack.close()
                masks, values = dict(stack.masks), backbone(model)
                with self.assertRaisesRegex(ValueError, rf"^{fit} tasks? fitted.*smaller"):
                    stack.begin("9", loader=tiny.batches(3, seed=9))
                self.assert_bits(model, values)
                for name, mask in masks.items():
                    self.assertTrue(torch.equal(stack.masks[name], mask))

    def test_ties_do_not_exceed_the_budget(self):
        model = tiny.Body(lambda m: SimpleNamespace(loss=m.body.weight.sum()))
        stack = recall_stack(model, 0.05)
        loader = [{"x": torch.ones(1), "labels": torch.ones(1)}]
        for task in range(3):
            self.assertEqual(
                stack.begin(str(task), loader=loader, head_steps=0)["locked"], 10 * (task + 1)
            )
            stack.close()

    def test_sparsity_zero_trains_the_head_only(self):
        model, stack = self.trained(sparsity=0)
        self.assertEqual(stack.stats()["locked"], 0)
        for after in self.after:
            for name, value in after.items():
                self.assertTrue(torch.equal(value, self.base[name]))
        self.assert_recalls(model, stack)

    def test_importance_chooses(self):
        chosen = []
        for importance in (*IMPORTANCES, RANDOM):
            model = tiny.plain()
            stack = recall_stack(model, 0.1, importance=importance)
            stack.begin("0", loader=tiny.batches(3, seed=0), head_steps=0)
            chosen.append(torch.cat([mask.flatten() for mask in stack.masks.values()]))
        for other in chosen[1:]:
            self.assertFalse(torch.equal(chosen[0], other))
        self.assertEqual(len({int(mask.sum()) for mask in chosen}), 1)

    def test_random_entries_are_alike_for_every_task(self):
        """Each task gets the same share of every parameter, but for chance."""
        _, stack = self.trained(sparsity=0.25, importance="random")
        stack.begin("3", loader=tiny.batches(2, seed=3), head_steps=0)
        table, stats = stack.layer_table(), stack.stats()
        everything = min(stats["eligible"], 4 * round(0.25 * stats["eligible"]))
        self.assertEqual(stats["locked"], everything)
        large = table[table["eligible"] > 500]
        self.assertGreater(len(large), 0)
        for share in large["added"] / large["eligible"]:
            self.assertAlmostEqual(share, 0.25, delta=0.1)

    def test_random_entries_do_not_depend_on_generators_or_data(self):
        chosen = []
        for seed in range(2):
            stack = recall_stack(importance="random")
            torch.manual_seed(seed)
            stack.begin("a", loader=tiny.batches(2, seed=seed), n_batches=1 + seed)
            chosen.append(stack.masks)
        for name, mask in chosen[0].items():
            self.assertTrue(torch.equal(mask, chosen[1][name]), name)
        scores = stack.measure(tiny.batches(1, seed=0))
        self.assertTrue(all((score > 0).all() for score in scores.values()))

    def test_random_entries_cannot_be_protected(self):
        with self.assertRaisesRegex(ValueError, "importance is 'random', expected.*fisher"):
            BitStack(tiny.plain(), importance="random")

    def test_layer_table(self):
        _, stack = self.trained()
        stack.begin("3", loader=tiny.batches(2, seed=3))
        table = stack.layer_table()
        per_task = round(0.2 * stack.stats()["eligible"])
        self.assertEqual(list(table.groupby("task")["added"].sum()), [per_task] * 4)
        self.assertTrue((table["added"] == table["selected"]).all())
        self.assertTrue((table["lock_fraction"] <= 1).all())


class Undisturbed(RecallCase):
    """begin leaves everything but base, head and choice alone; a failed one leaves those too."""

    def state(self, model):
        return {
            "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in self.named},
            "training": {n: m.training for n, m in model.named_modules()},
            "rng": (
                torch.get_rng_state().tolist(),
                random.getstate(),
                str(np.random.get_state()),
            ),
        }

    def assert_same(self, found, expected):
        for name, gradient in expected["gradients"].items():
            other = found["gradients"][name]
            self.assertTrue(gradient is other is None or torch.equal(gradient, other), name)
        for part in ("training", "rng"):
            self.assertEqual(found[part], expected[part])

    def test_gradients_modes_and_rng(self):
        model, stack = self.trained(tasks=1)
        self.named = list(model.named_parameters())
        model.train()
        model.blocks[1].eval()
        data = torch.utils.data.TensorDataset(torch.arange(3))
        loader = torch.utils.data.DataLoader(
            data, shuffle=True, collate_fn=lambda rows: tiny.batches(1, seed=int(rows[0][0]))[0]
        )
        before = self.state(model)
        self.assertIsNotNone(before["gradients"]["classifier.weight"])
        stack.begin("later", loader=loader)
        self.assert_same(self.state(model), before)

    def test_a_head_that_becomes_nan(self):
        """Nothing is measured for random entries, so nothing else would tell."""
        (batch,) = tiny.batches(1, seed=1)
        model = tiny.plain()
        stack = recall_stack(model, importance="random")
        before = tiny.snapshot(model)
        with self.assertRaisesRegex(ValueError, "head.*NaN.*float32"):
            stack.begin("a", loader=[{**batch, "loss_scale": float("nan")}])
        self.assertFalse(any(c.any() for c in tiny.changed(model, before).values()))
        stack.begin("a", loader=[batch])  # no task is open

    def test_a_head_in_half_precision_is_fitted(self):
        (batch,) = tiny.batches(1, seed=1)
        for dtype in (torch.float16, torch.bfloat16):
            with self.subTest(dtype):
                model = tiny.plain().to(dtype).eval()
                before = model(**batch).loss.item()
                recall_stack(model, importance="random").begin("a", loader=[batch], head_steps=64)
                self.assertEqual(model.classifier.weight.dtype, dtype)
                self.assertLess(model(**batch).loss.item(), before - 0.05)

    def test_failures(self):
        good, bad = tiny.batches(2, seed=1)
        unlabelled = {key: value for key, value in bad.items() if key != "labels"}
        nan = {**bad, "loss_scale": float("nan")}
        for name, (loader, settings, pattern) in {
            "empty": ([], {}, "no batch"),
            "none": (None, {}, "loader"),
            "no labels": ([good, unlabelled], {}, "labels"),
            "not finite": ([good, nan], {}, "NaN"),
            "n_batches": ([good], {"n_batches": 0}, "n_batches is 0"),
            "head_steps": ([good], {"head_steps": -1}, "head_steps is -1"),
            "half a step": ([good], {"head_steps": 0.5}, "head_steps is 0.5"),
            "rate": ([good], {"head_learning_rate": 0.0}, "head_learning_rate is 0"),
        }.items():
            with self.subTest(name):
                model, stack = self.trained(tasks=2)
                self.named = list(model.named_parameters())
                values, masks = tiny.snapshot(model), dict(stack.masks)
                before = self.state(model)
                with self.assertRaisesRegex((TypeError, ValueError), pattern):
                    stack.begin("2", loader=loader, **settings)
                self.assert_same(self.state(model), before)
                self.assertFalse(any(c.any() for c in tiny.changed(model, values).values()))
                for parameter, mask in masks.items():
                    self.assertTrue(torch.equal(stack.masks[parameter], mask))
                self.assert_recalls(model, stack)
                optimizer = ADAMW(model.parameters())
                stack.attach(optimizer)
                self.train_task(model, stack, optimizer, 2)
                self.assert_recalls(model, stack)


if __name__ == "__main__":
    unittest.main()
