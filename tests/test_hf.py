"""The Trainer callback: locked weights are exact after training by the transformers Trainer."""

import gc
import logging
import os
import tempfile
import unittest
import weakref

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from cases import ADAMW, LockedCase, trainer_of
from transformers import BatchEncoding, TrainerCallback

from bitstack_nb import BitStack, ExactRecall
from bitstack_nb.guard import LockedWeightsMoved


class Watch(TrainerCallback):
    """Verifies after every optimizer step, and records what locked gradients were before it."""

    def __init__(self, stack: BitStack) -> None:
        self.stack, self.steps, self.locked_gradient = stack, 0, 0.0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for name, mask in self.stack.masks.items():
            self.locked_gradient += float(model.get_parameter(name).grad[mask].abs().sum())

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        self.stack.verify()


def two_classes(rows):
    return [{**row, "labels": row["labels"] % 2} for row in rows]


class WithTrainer(LockedCase):
    def setUp(self):
        self.folder = self.enterContext(tempfile.TemporaryDirectory())
        logger = logging.getLogger("transformers")
        self.addCleanup(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)

    def trainer(self, model, callbacks, **arguments):
        return trainer_of(model, self.folder, callbacks, **arguments)

    def locked(self, model, sparsity=0.3) -> BitStack:
        stack = BitStack(model, sparsity)
        stack.update(tiny.batches(2, seed=0))
        return stack

    def test_locked_weights_are_exact(self):
        for name, (build, arguments, steps) in {
            "plain": (tiny.gpt2, {}, 6),
            "accumulation": (tiny.bert, {"gradient_accumulation_steps": 3}, 2),
            "clipping and warm-up": (tiny.gpt2, {"max_grad_norm": 0.1, "warmup_steps": 2}, 6),
            "bfloat16": (tiny.gpt2, {"bf16": True}, 6),
            "Adafactor": (tiny.bert, {"optim": "adafactor"}, 6),
            "checkpointing": (tiny.gpt2, {"gradient_checkpointing": True}, 6),
        }.items():
            with self.subTest(name):
                model = build()
                stack = self.locked(model)
                watch, before = Watch(stack), tiny.snapshot(model)
                calls = dict(stack.hook_calls)
                self.trainer(model, [stack.callback(), watch], **arguments).train()
                self.assertEqual((watch.steps, watch.locked_gradient), (steps, 0.0))
                self.assert_held(stack, model, before)
                for masked in stack.handles:
                    self.assertEqual(stack.hook_calls[masked] - calls.get(masked, 0), 6)

    def test_tasks_in_sequence_with_one_trainer_each(self):
        model = tiny.gpt2()
        stack = BitStack(model, 0.15, budget="fresh")
        for task in range(3):
            before, masks = tiny.snapshot(model), dict(stack.masks)
            self.trainer(model, [stack.callback()], seed=task).train()
            for name, mask in masks.items():
                self.assertFalse(tiny.changed(model, before)[name][mask].any(), name)
            stack.update(tiny.batches(2, seed=task))
        self.assertGreater(stack.stats()["frozen_pct"], 40)

    def test_two_callbacks_through_two_trainings(self):
        model = tiny.gpt2()
        stack = self.locked(model)
        trainer = self.trainer(model, [stack.callback(), stack.callback()])
        for _ in range(2):
            before, calls = tiny.snapshot(model), dict(stack.hook_calls)
            trainer.train()
            self.assert_held(stack, model, before)
            for name in stack.handles:  # still one gradient hook per parameter
                self.assertEqual(stack.hook_calls[name] - calls.get(name, 0), 6)
            self.assertEqual(len(trainer.optimizer.optimizer._optimizer_step_post_hooks), 1)

    def test_an_optimizer_attached_by_hand_stays_and_the_trainers_may_go(self):
        model = tiny.gpt2()
        stack, mine = self.locked(model), ADAMW(model.parameters())
        stack.attach(mine)
        self.trainer(model, [stack.callback()], optimizers=(mine, None)).train()
        trainer = self.trainer(model, [stack.callback()])
        trainer.train()
        optimizer = weakref.ref(trainer.optimizer.optimizer)
        del trainer
        gc.collect()
        self.assertIsNone(optimizer())
        for group in mine.param_groups:
            group["lr"] = 1e-2  # the Trainer's schedule ended at zero
        before = tiny.snapshot(model)
        tiny.train(model, mine, tiny.batches(2, seed=3))
        self.assert_held(stack, model, before)

    def test_the_head_alone_and_then_all_of_it(self):
        model = tiny.bert()
        stack = self.locked(model)
        for frozen in (True, False):
            before = tiny.snapshot(model)
            model.bert.requires_grad_(not frozen)
            self.trainer(model, [stack.callback()]).train()
            moved = tiny.changed(model, before)
            self.assertTrue(moved["classifier.weight"].any())
            self.assertEqual(any(m.any() for n, m in moved.items() if "bert" in n), not frozen)
        self.assert_held(stack, model, before)

    def test_the_end_of_training_tells_what_moved(self):
        class Meddle(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **kwargs):
                with torch.no_grad():
                    model.transformer.h[0].attn.c_attn.weight.add_(1e-3)

        model = tiny.gpt2()
        stack = self.locked(model)
        with self.assertRaisesRegex(LockedWeightsMoved, r"h\.0\.attn\.c_attn\.weight"):
            self.trainer(model, [stack.callback(), Meddle()]).train()
        stack.restore()
        self.trainer(model, None).train()  # the control: without the callback
        with self.assertRaises(LockedWeightsMoved):
            stack.verify()
        with self.assertRaises(ValueError):
            self.trainer(tiny.gpt2(), [stack.callback()]).train()

    def test_exact_recall_with_one_trainer_a_task(self):
        """What moves is own weights and the head; the Trainer's optimizer holds nothing else."""
        for arguments in (
            {"max_grad_norm": 0.1, "warmup_steps": 2, "gradient_accumulation_steps": 2},
            {"bf16": True},
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": True},
            },
        ):
            with self.subTest(str(arguments)):
                model = tiny.gpt2()
                base, after = tiny.snapshot(model), {}
                recall = ExactRecall(model, 0.2)
                for task, labels in {"a": ["no", "yes"], "b": None}.items():
                    recall.begin(task, labels)
                    trainer = self.trainer(model, [recall.callback()], **arguments)
                    trainer.train_dataset = two_classes(trainer.train_dataset)
                    trainer.train()
                    held = [p for g in trainer.optimizer.param_groups for p in g["params"]]
                    own = round(0.2 * recall.stats()["eligible"])
                    self.assertEqual(sum(p.numel() for p in held), own + model.score.weight.numel())
                    recall.close()
                    after[task] = tiny.snapshot(model)
                    for name, changed in tiny.changed(
                        recall.export(task), base | {"score.weight": model.score.weight}
                    ).items():
                        mask = recall.mask(task).get(name, torch.zeros_like(changed))
                        self.assertFalse(changed[~mask].any(), name)
                        self.assertGreaterEqual(changed.sum(), 0.9 * mask.sum())
                for task, expected in after.items():
                    with recall.using(task):
                        self.assertFalse(
                            any(c.any() for c in tiny.changed(model, expected).values())
                        )
                    batch = {k: v for k, v in tiny.batches(1, seed=9)[0].items() if k != "labels"}
                    exported = recall.export(task).eval()
                    exported.save_pretrained(f"{self.folder}/{task}")
                    fresh = type(model).from_pretrained(f"{self.folder}/{task}").eval()
                    self.assertTrue(torch.equal(exported(**batch).logits, fresh(**batch).logits))

    def test_exact_recall_resumes_within_a_task(self):
        """From a Trainer's checkpoint in a new process, or it refuses before the first step."""
        arguments = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 5}

        def trained(seed, **resume):
            model = tiny.gpt2()
            recall = ExactRecall(model, 0.2)
            recall.begin("task", ["a", "b", "c"], seed=seed)
            self.trainer(model, [recall.callback()], **arguments).train(**resume)
            recall.close()
            return tiny.snapshot(model)

        expected = trained(5)
        checkpoint = f"{self.folder}/checkpoint-3"
        resumed = trained(5, resume_from_checkpoint=checkpoint)
        for name, value in expected.items():
            self.assertTrue(torch.equal(resumed[name], value), name)
        with self.assertRaisesRegex(LockedWeightsMoved, "transformer"):
            trained(6, resume_from_checkpoint=checkpoint)

    def test_exact_recall_with_a_trainer_from_before_the_task(self):
        model = tiny.gpt2()
        recall = ExactRecall(model, 0.2)
        recall.begin("one")
        trainer = self.trainer(model, [recall.callback()])
        trainer.train()
        recall.close()
        with self.assertRaisesRegex(RuntimeError, "open task"):
            trainer.train()
        recall.begin("two")
        with self.assertRaisesRegex(RuntimeError, r"make a Trainer.*after begin\(\)"):
            trainer.train()

    def test_update_after_training_measures_as_before_it(self):
        """Half-precision training leaves a wrapped forward behind; importance stays float32."""
        model, fresh = tiny.gpt2(), tiny.gpt2()
        self.trainer(model, None, bf16=True).train()
        fresh.load_state_dict(model.state_dict())
        masks = [dict(self.locked(each, 0.1).masks) for each in (model, fresh)]
        for name, mask in masks[0].items():
            self.assertTrue(torch.equal(mask, masks[1][name]), name)


class WithoutTrainer(LockedCase):
    def test_the_optimizer_that_accelerate_wraps(self):
        self.addCleanup(AcceleratorState._reset_state)
        self.addCleanup(PartialState._reset_state)
        model = tiny.gpt2()
        stack, optimizer = BitStack(model, 0.3), ADAMW(model.parameters())
        prepared, wrapped = Accelerator(cpu=True).prepare(model, optimizer)
        stack.attach(wrapped)
        stack.update(tiny.batches(2, seed=0))
        before = tiny.snapshot(model)
        tiny.train(prepared, wrapped, tiny.batches(3, seed=1))
        self.assert_held(stack, model, before)

    def test_batches_as_a_tokenizer_makes_them(self):
        plain, encoded = (BitStack(tiny.bert(), 0.2) for _ in range(2))
        plain.update(tiny.batches(2, seed=0))
        encoded.update([BatchEncoding(batch) for batch in tiny.batches(2, seed=0)])
        for name, mask in plain.masks.items():
            self.assertTrue(torch.equal(encoded.masks[name], mask), name)


if __name__ == "__main__":
    unittest.main()
