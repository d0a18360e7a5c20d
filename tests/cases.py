"""What several test files of the method start from and check."""

import tempfile
import unittest
from functools import partial
from pathlib import Path

import tiny
import torch

from bitstack_nb import BitStack, ExactRecall

ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)


class LockedCase(unittest.TestCase):
    def locked_model(self, make_optimizer=ADAMW, *, build=tiny.plain, sparsity=0.3):
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


class RecallCase(unittest.TestCase):
    """Tasks "0", "1", ... of exact recall; `self.after[t]` is the whole model just after task t."""

    def trained(
        self, model=None, *, tasks=3, sparsity=0.2, **settings
    ) -> tuple[torch.nn.Module, ExactRecall]:
        """A model and its tasks, each trained for some steps."""
        model = tiny.plain() if model is None else model
        self.base, self.after = tiny.snapshot(model), []
        recall = ExactRecall(model, sparsity, **settings)
        for task in range(tasks):
            self.train_task(model, recall, task)
        return model, recall

    def train_task(self, model, recall, task, make_optimizer=ADAMW, **arguments):
        recall.begin(str(task), loader=tiny.batches(3, seed=task), **arguments)
        optimizer = make_optimizer(recall.parameters())
        tiny.train(model, optimizer, tiny.batches(4, seed=task), seed=task)
        recall.close()
        self.after.append(tiny.snapshot(model))

    def assert_bits(self, model, expected: dict):
        """Every tensor of the model has the expected bits."""
        found = tiny.snapshot(model)
        self.assertEqual(found.keys(), expected.keys())
        for name, value in found.items():
            self.assertTrue(torch.equal(tiny.as_bits(value), tiny.as_bits(expected[name])), name)

    def assert_recalls(self, model, recall):
        """Each task and the base come back bit for bit, in any order, and the present stays."""
        before = tiny.snapshot(model)
        for task in (*range(len(self.after)), None, *reversed(range(len(self.after)))):
            with recall.using(None if task is None else str(task)):
                self.assert_bits(model, self.base if task is None else self.after[task])
                self.assertEqual(recall.verify(), 0)
            self.assert_bits(model, before)


def backbone(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers but the head's."""
    heads = ("classifier.", "score.")
    return {n: v for n, v in tiny.snapshot(model).items() if not n.startswith(heads)}


def trainer_of(model, folder, callbacks, *, seed=1, count=24, optimizers=(None, None), **arguments):
    """A transformers Trainer of a model on random rows, four a step, for one epoch on the CPU."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    (batch,) = tiny.batches(1, seed=seed, size=count)
    settings = {
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings | arguments),
        train_dataset=[{key: value[i] for key, value in batch.items()} for i in range(count)],
        callbacks=callbacks,
        optimizers=optimizers,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class FileCase(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.path = self.folder / "stack.safetensors"

    def locked(self, model=None, *, sparsity=0.1, tasks=2, **settings) -> BitStack:
        stack = BitStack(tiny.plain() if model is None else model, sparsity, **settings)
        for task in range(tasks):
            stack.update(tiny.batches(2, seed=task))
        return stack

    def assert_unchanged(self, model, before: dict):
        """Every parameter and buffer has the bits of the snapshot."""
        moved = [name for name, changed in tiny.changed(model, before).items() if changed.any()]
        self.assertEqual(moved, [])

    def assert_same(self, found: BitStack, expected: BitStack):
        self.assertEqual(list(found.masks), list(expected.masks))
        for name, mask in expected.masks.items():
            self.assertTrue(torch.equal(found.masks[name], mask), name)
        self.assertEqual(found.stats(), expected.stats())
        self.assertTrue(found.layer_table().equals(expected.layer_table()))
        self.assertEqual(set(found.handles), set(expected.handles))
