"""ExactRecall: a task's own weights and its head are all that trains, and its model comes back."""

import asyncio
import copy
import threading
import unittest
from functools import partial

import tiny
import torch
from cases import ADAMW, RecallCase
from test_guarantee import OPTIMIZERS
from torch import nn

from bitstack_nb import ExactRecall
from bitstack_nb.guard import LockedWeightsMoved
from bitstack_nb.importance import choose, random_scores
from bitstack_nb.reference import PlainRecall, measure
from bitstack_nb.settings import IMPORTANCES

BATCHES = tiny.batches(4, seed=1)


def own_masks(recall, name) -> dict[str, torch.Tensor]:
    return dict(recall.mask(name))


class AgainstReference(unittest.TestCase):
    def compare(self, build, make, *, train=tiny.train, batches=BATCHES):
        """A task trained here and in plain PyTorch, from one choice: every bit the same."""
        model, twin = build(), build()
        recall = ExactRecall(model, 0.25)
        recall.begin("task")
        masks = own_masks(recall, "task")
        head = [name for name, p in model.named_parameters() if p.requires_grad]
        head = [name for name in head if "own_weights" not in name]
        parameters = {name: twin.get_parameter(name) for name in masks}
        plain = PlainRecall(twin, parameters, map(twin.get_parameter, head), sparsity=0.25)
        vector, *heads = plain.begin({n: m.float() for n, m in masks.items()})
        optimizer = make([{"params": [vector]}, {"params": heads}])
        plain.attach(optimizer)
        train(twin, optimizer, batches)
        train(model, make(recall.parameters()), batches)
        recall.close()
        moved = tiny.changed(model, tiny.snapshot(twin))
        self.assertFalse([name for name, changed in moved.items() if changed.any()])

    def test_every_optimizer(self):
        for name, make in OPTIMIZERS.items():
            with self.subTest(name):
                self.compare(tiny.plain, make)

    def test_every_architecture(self):
        for name, (build, _) in tiny.ARCHITECTURES.items():
            with self.subTest(name):
                self.compare(build, ADAMW)

    def test_dtypes(self):
        sgd = partial(torch.optim.SGD, lr=0.5, momentum=0.9)
        for dtype in (torch.bfloat16, torch.float64):
            with self.subTest(dtype):
                self.compare(lambda d=dtype: tiny.plain().to(d), sgd)
        model = tiny.gpt2()
        model.transformer.h[0].ln_1.double()
        recall = ExactRecall(model, 0.25)
        recall.begin("task")
        names = [n for n, _ in model.named_parameters() if "own_weights" in n]
        self.assertEqual(
            names, ["transformer.own_weights_float64", "transformer.own_weights_float32"]
        )

    def test_infinite_gradients_and_a_scaler(self):
        def train(model, optimizer, batches):
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            factors = (1, float("inf"), 1, float("nan"))
            for factor, batch in zip(factors, batches, strict=True):
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = model(**batch, loss_scale=factor).loss
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            self.assertEqual(scaler.get_scale(), 256.0)

        model = tiny.plain()
        recall = ExactRecall(model, 0.25)
        base = tiny.snapshot(model)
        recall.begin("task")
        train(model, ADAMW(recall.parameters()), BATCHES)
        recall.close()
        self.assertTrue(all(p.isfinite().all() for p in model.parameters()))
        self.assertTrue(tiny.changed(model, base)["blocks.0.up.weight"].any())


class Choice(RecallCase):
    def test_random_weights_are_those_of_recorded_runs(self):
        """The largest of random scores, the first task's with seed 0."""
        for sparsity in (1.0, 0.2, 0.001):
            model = tiny.plain()
            recall = ExactRecall(model, sparsity)
            masks = {}
            for task, seed in (("first", 0), ("second", 1)):
                recall.begin(task)
                recall.close()
                masks[task] = own_masks(recall, task)
                scores = random_scores(masks[task], seed=seed)
                expected = choose(scores, round(sparsity * 2722), ties=False)
                for name, mask in expected.items():
                    self.assertTrue(torch.equal(masks[task][name], mask), name)

    def test_importance_chooses_on_the_base_with_the_fitted_head(self):
        chosen = []
        for importance in IMPORTANCES:
            model, loader = tiny.bert(), tiny.batches(3, seed=0)
            recall = ExactRecall(model, 0.25, importance=importance)
            recall.begin("task", loader=loader, head_steps=4)
            chosen.append(own_masks(recall, "task"))
            if importance == "gradient":
                recall.switch(None)
                twin = tiny.bert()
                twin.classifier.load_state_dict(
                    recall._open[0].head.parts["classifier"].state_dict()
                )
                parameters = {name: twin.get_parameter(name) for name in chosen[0]}
                scores = measure(twin, parameters, loader)
                expected = choose(scores, round(0.25 * recall.stats()["eligible"]))
                self.assertTrue(all(chosen[0][n].equal(m) for n, m in expected.items()))
        for other in chosen[1:]:
            self.assertFalse(all(other[name].equal(mask) for name, mask in chosen[0].items()))

    def test_a_share_that_is_no_weight(self):
        for sparsity in (0.0, 1e-4):
            with self.assertRaisesRegex(ValueError, "no weight"):
                ExactRecall(tiny.plain(), sparsity)
        recall = ExactRecall(tiny.plain(width=256, depth=1), 1e-5)
        recall.begin("task")
        self.assertEqual(recall.stats()["locked"], round(1e-5 * recall.stats()["eligible"]))

    def test_stats_and_layer_table(self):
        _, recall = self.trained(sparsity=0.5)
        table, stats = recall.layer_table(), recall.stats()
        self.assertEqual(list(table.groupby("task")["selected"].sum()), [1361] * 3)
        union = {n: sum(recall.mask(t)[n] for t in recall.names) > 0 for n in recall.mask("0")}
        self.assertEqual(stats["locked"], sum(int(m.sum()) for m in union.values()))
        self.assertEqual(stats["locked"], table["added"].sum())
        self.assertTrue((table["lock_fraction"] <= 1).all())
        self.assertGreater(stats["frozen_pct"], 80)


class Independent(RecallCase):
    def test_a_task_is_the_same_whatever_came_before(self):
        model, recall = self.trained(tiny.bert(), sparsity=0.4)
        self.assert_recalls(model, recall)
        labels = ["a", "b", "c"]
        alone = tiny.bert()
        for on, each in ((model, recall), (alone, ExactRecall(alone, 0.4))):
            self.train_task(on, each, 7, labels=labels, seed=7)
        for name, value in self.after[-1].items():
            self.assertTrue(torch.equal(value, self.after[-2][name]), name)
        masks = [recall.mask(name) for name in ("0", "1")]
        overlap = sum(int((mask & masks[1][n]).sum()) for n, mask in masks[0].items())
        self.assertGreater(overlap, 0.1 * recall.stats()["eligible"])

    def test_only_own_weights_and_the_head_move(self):
        _, recall = self.trained(tiny.gpt2())
        for task, after in enumerate(self.after):
            own, moved = own_masks(recall, str(task)), 0
            for name, value in after.items():
                changed = tiny.as_bits(value) != tiny.as_bits(self.base[name])
                if name in own:
                    self.assertFalse(changed[~own[name]].any(), name)
                    moved += int(changed.sum())
                elif not name.startswith("score"):
                    self.assertFalse(changed.any(), name)
            self.assertGreater(moved, 0.9 * round(0.2 * recall.stats()["eligible"]))

    def test_removed_and_abandoned_tasks_leave_nothing(self):
        model, recall = self.trained()
        recall.begin("given up")
        tiny.train(model, ADAMW(recall.parameters()), BATCHES)
        recall.abandon()
        self.assert_bits(model, self.base)
        self.assertFalse([n for n, _ in model.named_parameters() if "own_weights" in n])
        recall.switch("1")
        recall.remove("1")
        self.assert_bits(model, self.base)
        self.assertEqual(recall.names, ["0", "2"])
        for task in ("0", "2"):
            self.assert_bits(recall.switch(task), self.after[int(task)])
        for name in ("1", "given up", 0):
            with self.assertRaisesRegex(ValueError, f"no task {name!r}, only '0', '2'"):
                recall.switch(name)

    def test_buffers_stay_at_the_base(self):
        model = tiny.plain()
        model.blocks[0].norm = nn.BatchNorm1d(tiny.LENGTH)
        model, recall = self.trained(model)
        self.assertEqual(model.blocks[0].norm.num_batches_tracked, 0)
        model.train()(**BATCHES[0])
        with self.assertRaisesRegex(LockedWeightsMoved, "running_mean"):
            recall.verify()
        self.assert_bits(recall.switch("1"), self.after[1])


class Gradients(RecallCase):
    def begun(self, model=None, **settings):
        model = tiny.plain() if model is None else model
        recall = ExactRecall(model, 0.2, **settings)
        recall.begin("task")
        return model, recall, ADAMW(recall.parameters())

    def test_nothing_else_has_a_gradient(self):
        model, recall, optimizer = self.begun()
        for batch in BATCHES[:2]:
            model(**batch).loss.backward()
        with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
        self.assertEqual(
            with_gradient, {"own_weights_float32", "classifier.weight", "classifier.bias"}
        )
        clipped = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in held])
        self.assertGreater(clipped, 0.1)
        self.assertAlmostEqual(float(norm), 0.1, places=5)
        optimizer.step()
        self.assertEqual({id(p) for p in held}, {id(p) for p in optimizer.state})
        self.assertEqual(recall.verify(), 0)

    def test_the_state_dict_does_not_show_the_vector(self):
        model, recall, optimizer = self.begun()
        tiny.train(model, optimizer, BATCHES)
        state = tiny.snapshot(model)
        self.assertEqual(state.keys(), tiny.plain().state_dict().keys())
        tiny.train(model, optimizer, BATCHES)
        model.load_state_dict(state)
        recall.close()
        self.assert_bits(model, state)

    def test_resuming_with_other_own_weights_is_refused(self):
        model, recall, optimizer = self.begun()
        tiny.train(model, optimizer, BATCHES)
        state = tiny.snapshot(model)
        other = tiny.plain()
        recall = ExactRecall(other, 0.2)
        recall.begin("task", seed=7)
        with self.assertRaisesRegex(LockedWeightsMoved, "blocks"):
            other.load_state_dict(state)

    def test_regimes(self):
        """Compiled, checkpointed and accumulated training moves own weights and the head only."""

        def accumulate(model, optimizer, batches):
            for batch in batches:
                model(**batch).loss.backward()
            optimizer.step()

        def compiled(model, optimizer, batches):
            torch.compiler.reset()
            step = torch.compile(optimizer.step, backend="aot_eager")
            model = torch.compile(model, backend="aot_eager")
            for batch in batches:
                optimizer.zero_grad()
                model(**batch).loss.backward()
                step()

        for name, (build, train) in {
            "accumulated": (tiny.plain, accumulate),
            "compiled": (partial(tiny.plain, depth=1), compiled),
            "checkpointed": (partial(_checkpointed, use_reentrant=False), tiny.train),
            "reentrant": (partial(_checkpointed, use_reentrant=True), tiny.train),
        }.items():
            with self.subTest(name):
                model, recall, optimizer = self.begun(build())
                base = tiny.snapshot(model)
                train(model, optimizer, BATCHES)
                recall.close()
                own = recall.mask("task")
                for parameter, changed in tiny.changed(model, base).items():
                    if parameter in own:
                        self.assertTrue(torch.equal(changed, own[parameter]), parameter)

    def test_an_optimizer_that_cannot_train_it(self):
        model = tiny.plain()
        early = ADAMW(model.parameters())
        recall = ExactRecall(model, 0.2)
        recall.begin("task")
        late = ADAMW(model.parameters())
        for optimizer, pattern in ((early, "before begin"), (late, r"tasks\.parameters")):
            with self.assertRaisesRegex(RuntimeError, pattern):
                tiny.train(model, optimizer, BATCHES)
        self.assertEqual(recall.verify(), 0)
        lbfgs = torch.optim.LBFGS([p for g in recall.parameters() for p in g["params"]])
        with self.assertRaisesRegex(RuntimeError, "LBFGS"):
            lbfgs.step(lambda: model(**BATCHES[0]).loss)

    def test_rates(self):
        _, recall, _ = self.begun()
        rates = [g["lr"] for g in recall.parameters(lr=0.1, head_lr=0.2)]
        self.assertEqual(rates, [0.1, 0.2])
        self.assertEqual([g["lr"] for g in recall.parameters(lr=0.1)], [0.1, 0.1])


def _checkpointed(**settings):
    model = tiny.gpt2()
    model.gradient_checkpointing_enable(settings)
    return model


class Heads(RecallCase):
    def test_every_architecture(self):
        """A head of the right size with its label names, all of it the task's own."""
        builders = {name: build for name, (build, _) in tiny.ARCHITECTURES.items()} | {
            "in a wrapper": lambda: tiny.Wrapper(tiny.distilbert()),
            "compiled in a wrapper": lambda: tiny.Wrapper(torch.compile(tiny.bert())),
            "no usual name": lambda: tiny.renamed("classify"),
            "deep, no usual name": self.sequential_head,
        }
        for name, build in builders.items():
            with self.subTest(name):
                model = build()
                present = tiny.snapshot(model)
                recall, logits, labels = ExactRecall(model, 0.2), {}, {}
                for task, count in (("two", 2), ("five", 5)):
                    labels[task] = [f"{task} {i}" for i in range(count)]
                    recall.begin(task, labels[task])
                    for p in (p for g in recall.parameters() for p in g["params"]):
                        p.grad = torch.randn_like(p)
                    ADAMW(recall.parameters()).step()
                    recall.close()
                    logits[task] = model.eval()(**_batch(2)).logits
                    self.assertEqual(logits[task].shape[1], count)
                recall.switch(None)
                self.assert_bits(model, present)
                for task in ("two", "five"):
                    exported = recall.export(task)
                    for each in (recall.switch(task), exported):
                        self.assertTrue(torch.equal(each(**_batch(2)).logits, logits[task]))
                        each = getattr(each, "inner", each)
                        if hasattr(each, "config"):
                            self.assertEqual([*each.config.id2label.values()], labels[task])
                            self.assertEqual(each.num_labels, len(labels[task]))
                    self.assertTrue(all(p.requires_grad for p in exported.parameters()))

    @staticmethod
    def sequential_head():
        model = tiny.plain()
        model.classify, model.head = nn.Sequential(nn.Tanh(), model.classifier), "classify"
        del model.classifier
        return model

    def test_tasks_share_no_part_of_a_head(self):
        """The user replaces a part of the head for each task; the other part is each task's too."""
        for build in (tiny.distilbert, tiny.modernbert):
            model = build()
            recall, answers = ExactRecall(model, 0.2), []
            base = tiny.snapshot(model)
            for task in range(3):
                model.classifier = nn.Linear(16, 3)
                recall.begin(str(task))
                tiny.train(model, ADAMW(recall.parameters()), BATCHES)
                recall.close()
                answers.append(model.eval()(**BATCHES[0]).logits)
            for task, answer in enumerate(answers):
                with recall.using(str(task)):
                    self.assertTrue(torch.equal(model(**BATCHES[0]).logits, answer))
                    self.assertEqual(recall.verify(), 0)
            self.assert_bits(recall.switch(None), base)

    def test_the_head_in_the_model_stays_the_same_object(self):
        model, recall = self.trained(tiny.bert(), tasks=1)
        head = model.classifier
        recall.begin("labels left out")
        self.assertIs(model.classifier, head)
        tiny.train(model, ADAMW(recall.parameters()), BATCHES)
        recall.close()
        self.assert_bits(recall.switch("0"), self.after[0])
        model.classifier = nn.Linear(16, 7)
        with recall.using("0"):
            self.assert_bits(model, self.after[0])
        self.assertEqual(model.classifier.out_features, 7)
        recall.begin("of the user's")
        self.assertEqual(model.classifier.out_features, 7)

    def test_a_head_that_moved_after_closing(self):
        model, recall = self.trained()
        with torch.no_grad():
            model.classifier.bias[0] += 1
        with self.assertRaisesRegex(LockedWeightsMoved, r"classifier\.bias \(head\)"):
            recall.verify()
        with self.assertRaises(LockedWeightsMoved):
            recall.begin("next")

    def test_labels_that_are_none(self):
        recall = ExactRecall(tiny.plain(), 0.2)
        for labels in ("ab", ["a"], ["a", "a"], [1, 2]):
            with self.assertRaisesRegex(ValueError, "two or more different names"):
                recall.begin("task", labels)


def _batch(classes):
    (batch,) = tiny.batches(1, seed=9)
    return {**batch, "labels": batch["labels"] % classes}


class Blocks(RecallCase):
    def test_nesting_and_exceptions(self):
        model, recall = self.trained()
        with self.assertRaisesRegex(KeyError, "mine"), recall.using("0"):
            with recall.using("1"), recall.using(None), recall.using("1"):
                self.assert_bits(model, self.after[1])
            self.assert_bits(model, self.after[0])
            with recall.using("2") as shown:
                self.assertIs(shown, model)
                raise KeyError("mine")
        self.assert_bits(model, self.after[2])

    def test_while_a_task_is_open(self):
        model, recall = self.trained(tasks=2)
        recall.begin("2")
        optimizer = ADAMW(recall.parameters())
        tiny.train(model, optimizer, BATCHES)
        present = tiny.snapshot(model)
        self.assert_recalls(model, recall)
        with recall.using("0"):
            self.assert_bits(recall.export("0"), self.after[0])
        self.assert_bits(recall.export("2"), present)
        recall.switch("1")
        recall.switch("2")
        self.assert_bits(model, present)
        tiny.train(model, optimizer, BATCHES)
        recall.close()
        self.after.append(tiny.snapshot(model))
        self.assert_recalls(model, recall)

    def test_threads_wait_for_each_other(self):
        model, recall = self.trained(tiny.gpt2(), sparsity=0.3)
        model.eval()
        expected = {}
        for task in recall.names:
            expected[task] = recall.switch(task)(**BATCHES[0]).logits
        wrong = []

        def serve(first):
            for number in range(20):
                task = str((first + number) % 3)
                with recall.using(task), torch.no_grad():
                    if not model(**BATCHES[0]).logits.equal(expected[task]):
                        wrong.append(task)
                if not number % 5 and not recall.export(task)(**BATCHES[0]).logits.equal(
                    expected[task]
                ):
                    wrong.append(f"export {task}")

        threads = [threading.Thread(target=serve, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])
        self.assert_recalls(model, recall)

    def test_coroutines_and_generators_get_an_error(self):
        model, recall = self.trained()

        async def request(task):
            with recall.using(task):
                await asyncio.sleep(0)
                self.assert_bits(model, self.after[int(task)])

        async def both():
            return await asyncio.gather(request("0"), request("1"), return_exceptions=True)

        def texts(task):
            with recall.using(task):
                yield
                self.assert_bits(model, self.after[int(task)])
                yield

        first, second = asyncio.run(both())
        self.assertIsNone(first)
        self.assertRegex(str(second), "coroutine or generator")
        one, other = texts("0"), texts("1")
        next(one)
        with self.assertRaisesRegex(RuntimeError, "coroutine or generator"):
            next(other)
        next(one)
        one.close()
        self.assert_bits(model, self.after[2])

    def test_within_autocast_and_inference_mode(self):
        model, recall = self.trained()
        model.eval()
        expected = {}
        for task in recall.names:
            with recall.using(task), torch.autocast("cpu", dtype=torch.bfloat16):
                expected[task] = model(**BATCHES[0]).logits.detach()
        for mode in (torch.enable_grad, torch.inference_mode):
            with mode(), torch.autocast("cpu", dtype=torch.bfloat16):
                for task in ("1", "0", "2"):
                    with recall.using(task):
                        self.assertTrue(torch.equal(model(**BATCHES[0]).logits, expected[task]))
        self.assert_recalls(model, recall)


class Order(RecallCase):
    def test_a_task_is_open(self):
        _, recall = self.trained(tasks=1)
        recall.begin("open")
        for call in (lambda: recall.begin("next"), lambda: copy.deepcopy(recall)):
            with self.assertRaisesRegex(RuntimeError, r"'open' is open: close\(\).*abandon\(\)"):
                call()
        with recall.using("0"):
            for method in (recall.close, recall.abandon, lambda: recall.switch(None)):
                with self.assertRaisesRegex(RuntimeError, "leave the block first"):
                    method()
        recall.close()
        with self.assertRaisesRegex(ValueError, "a task 'open' already"):
            recall.begin("open")

    def test_no_task_is_open(self):
        recall = ExactRecall(tiny.plain(), 0.2)
        for method in (recall.close, recall.abandon, recall.parameters):
            with self.assertRaisesRegex(RuntimeError, r"needs an open task: begin\(name\)"):
                method()

    def test_a_diverged_task(self):
        model = tiny.plain()
        recall = ExactRecall(model, 0.2)
        recall.begin("task")
        tiny.train(model, torch.optim.SGD(recall.parameters(), lr=float("inf")), BATCHES)
        with self.assertRaisesRegex(RuntimeError, r"diverged. abandon\(\)"):
            recall.close()
        recall.abandon()
        self.assert_bits(model, tiny.snapshot(tiny.plain()))
        recall.begin("task")

    def test_begin_fails_and_nothing_has_changed(self):
        good, bad = tiny.batches(2, seed=1)
        unlabelled = {key: value for key, value in bad.items() if key != "labels"}
        nan = {**good, "loss_scale": float("nan")}
        model, recall = self.trained(tasks=2, importance="gradient")
        before = tiny.snapshot(model)
        for pattern, arguments in {
            "loader": {},
            "no batch": {"loader": []},
            "no 'labels'": {"loader": [good, unlabelled]},
            "NaN": {"loader": [nan]},
            "n_batches is 0": {"loader": [good], "n_batches": 0},
            "head_steps is -1": {"loader": [good], "head_steps": -1},
            "head_learning_rate is 0": {"loader": [good], "head_learning_rate": 0.0},
        }.items():
            with self.subTest(pattern):
                with self.assertRaisesRegex((TypeError, ValueError), pattern):
                    recall.begin("2", **arguments)
                self.assert_bits(model, before)
                self.assert_recalls(model, recall)
        self.train_task(model, recall, 2)
        self.assert_recalls(model, recall)

    def test_a_base_that_moved(self):
        model, recall = self.trained()
        for call in (recall.verify, lambda: recall.begin("next")):
            with torch.no_grad():
                model.embed.weight[0, 0] += 1
            with self.assertRaisesRegex(LockedWeightsMoved, r"embed\.weight.*load the base anew"):
                call()

    def test_two_on_one_model(self):
        model, recall = self.trained(tasks=1)
        with self.assertRaisesRegex(RuntimeError, r"another ExactRecall shows its task '0'"):
            ExactRecall(model)
        recall.switch(None)
        other = ExactRecall(model, 0.2)
        other.begin("its own")
        with self.assertRaisesRegex(RuntimeError, "another ExactRecall"):
            recall.switch("0")

    def test_a_cast_a_resize_or_a_replaced_module(self):
        for change, pattern in {
            lambda model: model.to(torch.bfloat16): "bfloat16 but was torch.float32",
            lambda model: setattr(model, "embed", nn.Embedding(40, 16)): r"embed\.weight",
            lambda model: setattr(model.embed.weight, "data", torch.ones(45, 16)): (
                r"embed\.weight has shape \(45, 16\) but had \(40, 16\).*resize the base"
            ),
        }.items():
            model, recall = self.trained(tasks=1)
            change(model)
            for call in (recall.verify, partial(recall.switch, None), partial(recall.export, "0")):
                with self.assertRaisesRegex(RuntimeError, pattern):
                    call()

    def test_a_copy(self):
        model, recall = self.trained()
        other, twin = copy.deepcopy((recall, model))
        after = list(self.after)
        self.train_task(twin, other, 3)
        self.assert_recalls(twin, other)
        self.after = after
        self.assert_recalls(model, recall)

    def test_layers_thawed_later_are_named(self):
        model = tiny.plain()
        model.blocks[0].requires_grad_(False)
        recall = ExactRecall(model, 0.2)
        with self.assertNoLogs("bitstack_nb", "WARNING"):
            recall.begin("frozen")
            recall.close()
        model.blocks[0].requires_grad_(True)
        with self.assertLogs("bitstack_nb", "WARNING") as logs:
            recall.begin("thawed")
        self.assertRegex(logs.output[0], r"blocks\.0\.mix.*was frozen.*make a new ExactRecall")

    def test_no_head(self):
        headless, frozen = tiny.plain(), tiny.plain()
        del headless.classifier
        frozen.classifier.requires_grad_(False)
        for model, why in {
            headless: "none is found",
            frozen: r"classifier\.bias is frozen",
        }.items():
            with self.assertRaisesRegex(ValueError, f"Plain has no trainable head .*{why}"):
                ExactRecall(model)


if __name__ == "__main__":
    unittest.main()
