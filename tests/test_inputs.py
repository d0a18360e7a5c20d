"""What update and begin are given: training's inputs, wrapped models, loaders, and refusals."""

import copy
import os
import pickle
import tempfile
import unittest
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import accelerate
import datasets
import peft
import tiny
import torch
from cases import LockedCase, RecallCase, backbone, trainer_of
from torch import nn

from bitstack_nb import BitStack, ExactRecall

INPUTS = {"token_type_ids", "attention_mask"}


class Passing(nn.Module):
    """A wrapper whose forward names `input_ids` and `labels`; the rest goes through `**inputs`."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = tiny.bert().bert
        self.classifier = nn.Linear(16, 3)

    def forward(self, input_ids, labels=None, **inputs):
        logits = self.classifier(self.bert(input_ids=input_ids, **inputs).pooler_output)
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def adapted() -> peft.PeftModel:
    """A BERT with LoRA adapters that are not zero."""
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=["query", "value"], init_lora_weights=False
    )
    return tiny.seeded(lambda: peft.get_peft_model(tiny.bert(), config), 0)


def typed_batches(count: int, *, seed: int) -> list:
    made = tiny.batches(count, seed=seed)
    return [{**b, "token_type_ids": (b["input_ids"] % 2) * b["attention_mask"]} for b in made]


class InputsOfTraining(LockedCase):
    def seen_by(self, bert: nn.Module, call) -> dict:
        """The inputs that first reach a BERT within the call."""
        seen = []
        handle = bert.register_forward_pre_hook(
            lambda module, _, given: seen.append(given), with_kwargs=True
        )
        call()
        handle.remove()
        return {key: seen[0][key] for key in INPUTS if seen[0].get(key) is not None}

    def test_the_model_sees_what_training_gives_it(self):
        """Named inputs, those through **kwargs, and those of PEFT's wrapper."""
        (batch,) = typed_batches(1, seed=0)
        for name, build in (("named", tiny.bert), ("**kwargs", Passing), ("PEFT", adapted)):
            model = build()
            bert = model.get_submodule("base_model.model.bert" if name == "PEFT" else "bert")
            exclude = ["classifier", "embed"]
            stack, tasks = BitStack(model, 0.2, exclude), ExactRecall(model, 0.2, exclude)
            training = self.seen_by(bert, lambda m=model: m(**batch))
            self.assertEqual(training.keys(), INPUTS)
            for call in (
                lambda s=stack: s.measure([batch]),
                lambda t=tasks: t.begin("task", loader=[batch]),
            ):
                with self.subTest(name):
                    found = self.seen_by(bert, call)
                    self.assertEqual(found.keys(), INPUTS)
                    for key in INPUTS:
                        self.assertTrue(torch.equal(found[key], training[key]), key)

    def test_a_trainers_loader_of_rows_with_text(self):
        """The Trainer drops the text; the rows themselves are no batches."""
        (batch,) = tiny.batches(1, seed=0, size=12)
        columns = {key: value.tolist() for key, value in batch.items()}
        rows = datasets.Dataset.from_dict({**columns, "text": ["a b"] * 12})
        model, stack = tiny.bert(), BitStack(tiny.bert(), 0.2)
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(model, folder, None)
            trainer.train_dataset = rows
            stack.update(trainer.get_train_dataloader())
        self.assertGreater(stack.stats()["locked"], 0)
        for wrong in (rows, rows.with_format("torch"), rows.rename_column("labels", "label")):
            for call in (stack.update, lambda r: ExactRecall(model).begin("task", loader=r)):
                with self.assertRaisesRegex(TypeError, r"single rows.*get_train_dataloader\(\)"):
                    call(wrong)

    def test_tensors_within_an_input_are_found(self):
        """A mapping or list of tensors is an input as well; a loader may fill it again."""

        class Nested(tiny.Plain):
            def forward(self, inputs, labels):
                return super().forward(inputs["ids"], inputs["masks"][0], labels)

        def nested(batch):
            inputs = {"ids": batch["input_ids"], "masks": [batch["attention_mask"]]}
            return {"inputs": inputs, "labels": batch["labels"]}

        def refilled():
            (buffer,) = tiny.batches(1, seed=9)
            for batch in tiny.batches(4, seed=1):
                for key, value in buffer.items():
                    value.copy_(batch[key])
                yield nested(buffer)

        heads = []
        for loader in (refilled(), [nested(batch) for batch in tiny.batches(4, seed=1)]):
            model = tiny.seeded(Nested, 0)
            tasks = ExactRecall(model, 0.1, importance="gradient")
            tasks.begin("task", loader=loader, head_steps=6)
            heads.append((tiny.snapshot(model), tasks.mask("task")))
        for name, value in heads[0][0].items():
            self.assertTrue(torch.equal(value, heads[1][0][name]), name)
        for name, mask in heads[0][1].items():
            self.assertTrue(torch.equal(mask, heads[1][1][name]), name)


class Adapters(RecallCase, LockedCase):
    """Models that PEFT wraps: the trainable adapters are eligible, its copied head is the head."""

    def setUp(self):
        self.folder = self.enterContext(tempfile.TemporaryDirectory())
        self.model = adapted()

    def test_locked_adapters_stay(self):
        stack = BitStack(self.model, 0.3)
        trained = {n: p.numel() for n, p in self.model.named_parameters() if p.requires_grad}
        adapters = sum(size for name, size in trained.items() if "lora_" in name)
        self.assertEqual(stack.stats()["eligible"], adapters)
        trainer_of(self.model, self.folder, [stack.callback()]).train()
        stack.update(tiny.batches(3, seed=0))
        inner = self.model.get_base_model()
        before = tiny.snapshot(inner)
        trainer_of(self.model, self.folder, [stack.callback()], seed=2).train()
        self.assert_held(stack, inner, before)
        stack.save(f"{self.folder}/masks")
        loaded = BitStack.load(f"{self.folder}/masks", adapted())
        self.assertEqual(loaded.stats(), stack.stats())

    def test_tasks_of_adapters(self):
        """Each comes back, and PEFT's own file of it as well; a plain copy there is none."""
        inner = self.model.get_base_model()
        base = backbone(inner)
        tasks = ExactRecall(self.model, 0.3)
        (batch,) = tiny.batches(1, seed=9)
        answers = {}
        for seed, name in enumerate("ab"):
            tasks.begin(name, loader=tiny.batches(2, seed=seed))
            trainer_of(self.model, self.folder, [tasks.callback()], seed=seed).train()
            tasks.close()
            answers[name] = self.model.eval()(**batch).logits
        for name, answer in answers.items():
            with tasks.using(name):
                self.assertTrue(torch.equal(self.model.eval()(**batch).logits, answer))
                self.model.save_pretrained(f"{self.folder}/{name}")
            read = peft.PeftModel.from_pretrained(tiny.bert(), f"{self.folder}/{name}").eval()
            self.assertTrue(torch.equal(read(**batch).logits, answer))
        with self.assertRaisesRegex(ValueError, r"no plain copy.*save_pretrained"):
            tasks.export("a")
        tasks.switch(None)
        for name, value in backbone(inner).items():
            self.assertTrue(torch.equal(value, base[name]), name)

    def test_a_new_head_has_its_weights(self):
        """PEFT keeps the head twice, and another number of labels makes the trained one anew."""
        tasks = ExactRecall(self.model, 0.3)
        tasks.begin("a", labels=["yes", "no"])
        (weight,) = (
            p
            for n, p in self.model.named_parameters()
            if n.endswith("classifier.modules_to_save.default.weight")
        )
        self.assertEqual(weight.shape, (2, 16))
        self.assertTrue(0.01 < float(weight.std()) < 0.04)

    def test_wrappers_that_compute_more_are_refused(self):
        for config in (
            peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2),
            peft.AdaLoraConfig(task_type="SEQ_CLS", target_modules=["query"], total_step=9),
        ):
            for kind in (BitStack, ExactRecall):
                with self.assertRaisesRegex(ValueError, f"more for {config.peft_type.value}.*LoRA"):
                    kind(peft.get_peft_model(tiny.bert(), config))


class Refusals(LockedCase):
    def test_a_model_without_values(self):
        """Offloaded by accelerate or made on the device meta: when it is given, not later."""
        offloaded, halfway = tiny.bert(), tiny.plain()
        accelerate.cpu_offload(offloaded, execution_device="cpu")
        halfway.blocks[1].to("meta")
        with tempfile.TemporaryDirectory() as folder:
            self.locked_model()[2].save(f"{folder}/masks")
            tasks = ExactRecall(tiny.plain())
            tasks.save(f"{folder}/tasks")
            for model in (offloaded, halfway, tiny.plain().to("meta")):
                for call in (
                    BitStack,
                    ExactRecall,
                    lambda m, f=folder: BitStack.load(f"{f}/masks", m),
                    lambda m, f=folder: ExactRecall.load(f"{f}/tasks", m),
                ):
                    with self.assertRaisesRegex(
                        ValueError, "device meta.*offloaded.*Load it whole"
                    ):
                        call(model)

    def test_pickling_names_save_and_load(self):
        model, _, stack = self.locked_model()
        for kept in (stack, ExactRecall(tiny.plain())):
            kind = type(kept).__name__
            for call in (pickle.dumps, lambda kept: torch.save(kept, os.devnull)):
                with self.assertRaisesRegex(TypeError, rf"{kind}.*save\(path\).*{kind}\.load"):
                    call(kept)
            with self.assertRaisesRegex(TypeError, r"cannot be pickled.*save\(path\)"):
                pickle.dumps(kept.callback())
            self.assertEqual(copy.deepcopy(kept).stats(), kept.stats())
        pickle.dumps(model)


if __name__ == "__main__":
    unittest.main()
