"""Exact recall: files that serve inference elsewhere, exported models, and what is refused."""

import subprocess
import sys
import unittest
import zlib
from pathlib import Path

import numpy as np
import tiny
import torch
from cases import ADAMW, FileCase, RecallCase, backbone
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bitstack_nb import ExactRecall, maskfile
from bitstack_nb.maskfile import MaskFileError

SERVE = """
import sys
sys.path.insert(0, sys.argv[1])
import tiny, torch
from bitstack_nb import ExactRecall, maskfile

model = tiny.gpt2().eval()
stack = ExactRecall.load(sys.argv[2] + "/stack.safetensors", model)
batch = tiny.batches(1, seed=9)[0]
for task in (1, 0, 2):
    model.score.load_state_dict(torch.load(f"{sys.argv[2]}/head-{task}.pt"))
    with stack.using(str(task)), torch.no_grad():
        torch.save(model(**batch).logits, f"{sys.argv[2]}/served-{task}.pt")
stack.verify()
"""


class Case(FileCase, RecallCase):
    def setUp(self):
        super().setUp()
        self.tests = str(Path(__file__).parent)


class RoundTrip(Case):
    def test_outputs_in_a_new_process(self):
        """Base by its name, stack and heads from files: the logits of training time exactly."""
        model = tiny.gpt2()
        stack = ExactRecall(model, 0.2, importance="gradient")
        optimizer, batch = ADAMW(model.parameters()), tiny.batches(1, seed=9)[0]
        stack.attach(optimizer)
        expected = []
        for task in range(3):
            stack.begin(str(task), loader=tiny.batches(2, seed=task))
            tiny.train(model, optimizer, tiny.batches(3, seed=task))
            stack.close()
            torch.save(model.score.state_dict(), self.folder / f"head-{task}.pt")
            expected.append(model.eval()(**batch).logits)
        stack.save(self.path)
        command = [sys.executable, "-c", SERVE, self.tests, str(self.folder)]
        subprocess.run(command, check=True, cwd=Path(self.tests).parent)
        for task, logits in enumerate(expected):
            served = torch.load(self.folder / f"served-{task}.pt")
            self.assertTrue(torch.equal(served, logits))
        self.assertFalse(torch.equal(expected[0], expected[1]))

    def test_models_masks_and_table(self):
        for dtype in (torch.float32, torch.bfloat16):
            for sparsity in (0.2, 0.0):
                with self.subTest(dtype=dtype, sparsity=sparsity):
                    _, stack = self.trained(tiny.plain().to(dtype), sparsity=sparsity)
                    stack.save(self.path)
                    other = tiny.plain().to(dtype)
                    with torch.no_grad():
                        other.classifier.weight.zero_()  # heads are not the stack's
                    loaded = ExactRecall.load(self.path, other)
                    self.assert_same(loaded, stack)
                    self.assert_bits(other, self.after[-1])
                    self.assert_recalls(other, loaded)
                    self.assertFalse(other.classifier.weight.any())

    def test_a_loaded_stack_goes_on_as_the_original(self):
        model, stack = self.trained(tasks=2)
        stack.save(self.path)
        twin = tiny.plain()
        loaded = ExactRecall.load(self.path, twin)
        twin.classifier.load_state_dict(model.classifier.state_dict())
        for each, module in ((stack, model), (loaded, twin)):
            optimizer = ADAMW(module.parameters())
            each.attach(optimizer)
            self.assertEqual(each.verify(), 0)
            each.begin("2", loader=tiny.batches(3, seed=5))
            tiny.train(module, optimizer, tiny.batches(3, seed=5))
            each.close()
        self.after.append(backbone(model))
        self.assert_same(loaded, stack)
        self.assert_recalls(twin, loaded)

    def test_without_a_task_and_saved_within_a_block(self):
        stack = ExactRecall(tiny.plain(), 0.2, importance="gradient")
        stack.save(self.path)
        self.assertEqual(ExactRecall.load(self.path, tiny.plain()).stats(), stack.stats())
        _, stack = self.trained()
        with stack.using("0"):
            stack.save(self.path)
        other = tiny.plain()
        self.assert_recalls(other, ExactRecall.load(self.path, other))

    def test_state_dict_through_torch_save_into_a_stack_in_use(self):
        _, stack = self.trained()
        torch.save(stack.state_dict(), self.folder / "state.pt")
        after = self.after
        model, twin = self.trained(sparsity=0.1, tasks=1)
        twin.load_state_dict(torch.load(self.folder / "state.pt", weights_only=True))
        self.after = after
        self.assert_same(twin, stack)
        self.assert_recalls(model, twin)
        self.assertEqual(
            twin.begin("new", loader=tiny.batches(2, seed=0))["locked"], 4 * round(0.2 * 2722)
        )

    def test_onto_a_compiled_model(self):
        _, stack = self.trained()
        stack.save(self.path)
        model = tiny.plain()
        compiled = torch.compile(model, backend="eager")
        self.assert_recalls(model, ExactRecall.load(self.path, compiled))

    def test_resuming_within_a_task_is_refused(self):
        stack = ExactRecall(tiny.plain(), 0.2, importance="gradient")
        stack.begin("new", loader=tiny.batches(2, seed=0))
        for call in (lambda: stack.save(self.path), stack.state_dict):
            with self.assertRaisesRegex(RuntimeError, r"task 0 is still open.*close"):
                call()
        self.assertFalse(self.path.exists())

    def test_size(self):
        """Values, and two planes of one bit per entry for three tasks."""
        model = tiny.plain(width=64, depth=3)
        _, stack = self.trained(model, sparsity=0.1)
        stack.save(self.path)
        numbers = stack.stats()
        bound = 4 * numbers["locked"] + 1.02 * 2 * numbers["eligible"] / 8
        with safe_open(self.path, framework="pt") as file:
            tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
        self.assertLessEqual(sum(t.numel() * t.element_size() for t in tensors), bound)

    def test_inference_keeps_no_copy_of_the_base(self):
        _, stack = self.trained()
        stack.save(self.path)
        model = tiny.plain()
        loaded = ExactRecall.load(self.path, model)
        with torch.no_grad():
            model.embed.weight[0] += 1.0
        self.assertEqual(loaded.verify(), 0)  # nothing to compare it with
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        with self.assertRaisesRegex(RuntimeError, f"^{round(0.2 * 2722):,} locked weights"):
            loaded.verify()
        loaded.restore()
        self.assertEqual(loaded.verify(), 0)

    def test_a_base_that_moved_after_loading_is_none(self):
        """Or what is trained next would be saved as a task of the base that it is none of."""
        _, stack = self.trained()
        stack.save(self.path)
        for name in ("attach", "begin"):
            with self.subTest(name):
                model = tiny.plain()
                loaded = ExactRecall.load(self.path, model)
                optimizer = ADAMW(model.parameters())
                tiny.train(model, optimizer, tiny.batches(2, seed=3))  # not attached
                before = tiny.snapshot(model)
                with self.assertRaisesRegex(MaskFileError, r"another base.*blocks\.0\.down\.bias"):
                    if name == "attach":
                        loaded.attach(optimizer)
                    else:
                        loaded.begin("new", loader=tiny.batches(2, seed=3))
                for parameter, changed in tiny.changed(model, before).items():
                    masks = loaded.mask("2")
                    own = masks.get(parameter, False)
                    self.assertFalse((changed & ~torch.as_tensor(own)).any(), parameter)

    def test_onto_a_model_for_inference(self):
        """Frozen, as served: what a task may own, the file says."""
        _, stack = self.trained()
        stack.save(self.path)
        model = tiny.plain().eval().requires_grad_(False)
        loaded = ExactRecall.load(self.path, model)
        self.assertFalse(any(p.requires_grad for p in model.parameters()))
        self.assert_recalls(model, loaded)


class Export(Case):
    def test_a_plain_model(self):
        model, stack = self.trained(tiny.gpt2().eval())
        batch = tiny.batches(1, seed=9)[0]
        present = tiny.snapshot(model)
        for task in (0, 1, 2, None):
            exported = stack.export(None if task is None else str(task))
            with stack.using(None if task is None else str(task)):
                self.assertFalse(
                    any(c.any() for c in tiny.changed(exported, tiny.snapshot(model)).values())
                )
                expected = model.eval()(**batch).logits
            self.assertFalse(any(p._backward_hooks for p in exported.parameters()))
            exported.save_pretrained(self.folder / "exported")
            loaded = type(model).from_pretrained(self.folder / "exported").eval()
            self.assertTrue(torch.equal(loaded(**batch).logits, expected))
            with torch.no_grad():
                for parameter in exported.parameters():
                    parameter.add_(1.0)
        self.assertFalse(any(c.any() for c in tiny.changed(model, present).values()))
        self.assertEqual(stack.verify(), 0)


class Refused(Case):
    def refuse(self, *patterns: str, model=None):
        model = tiny.plain() if model is None else model
        before = tiny.snapshot(model)
        with self.assertRaises(MaskFileError) as raised:
            ExactRecall.load(self.path, model)
        for pattern in patterns:
            self.assertRegex(str(raised.exception), pattern)
        self.assertFalse(any(c.any() for c in tiny.changed(model, before).values()))
        self.assertFalse(any(p._backward_hooks for p in model.parameters()))

    def test_another_base(self):
        model, stack = self.trained()
        stack.save(self.path)
        self.refuse("another base.*checkpoint", model=tiny.plain(1))
        self.refuse("another base", model=tiny.unhooked_copy(model))  # it stands as the last task's
        other = tiny.plain()
        with torch.no_grad():
            other.embed.weight[3, 4] += 1.0
        self.refuse(r"another base: embed\.weight of", model=other)
        self.refuse("bfloat16.*float32", model=tiny.plain().to(torch.bfloat16))
        self.refuse(r"blocks\.1\.", model=tiny.plain(depth=1))

    def test_into_a_stack_in_use(self):
        _, stack = self.trained()
        state = stack.state_dict()
        model, twin = self.trained(tiny.plain(1), tasks=2)
        with self.assertRaisesRegex(MaskFileError, "another base"):
            twin.load_state_dict(state)
        self.assert_bits(model, self.after[-1])
        self.assert_recalls(model, twin)

    def rewritten(self, change) -> None:
        self.good.save(self.path)
        tensors = load_file(self.path)
        with safe_open(self.path, framework="pt") as file:
            metadata = dict(file.metadata())
        change(tensors, metadata)
        metadata["digest"] = maskfile._digest(tensors, metadata)  # or it would refuse every change
        save_file(tensors, self.path, metadata=metadata)

    def test_missing_or_damaged_parts(self):
        _, self.good = self.trained()
        self.good.save(self.path)
        with safe_open(self.path, framework="pt") as file:
            keys, entries = list(file.keys()), file.metadata().keys() - {"digest"}
        for key in keys:
            for name, change in {
                "missing": lambda t, _, k: t.pop(k),
                "shortened": lambda t, _, k: t.update({k: t[k][..., :-1].clone()}),
                "flattened": lambda t, _, k: t.update({k: t[k].flatten()[:-1].clone()}),
            }.items():
                with self.subTest(name, key=key):
                    self.rewritten(lambda t, m, c=change, k=key: c(t, m, k))
                    self.refuse("stack.safetensors")
        for entry in entries:
            with self.subTest(missing=entry):
                self.rewritten(lambda _, metadata, e=entry: metadata.pop(e))
                self.refuse()
            with self.subTest(garbled=entry):
                self.rewritten(lambda _, metadata, e=entry: metadata.update({e: "{]"}))
                self.refuse()

    def repacked(self, change) -> None:
        """The file with its owners changed after unpacking them."""
        planes = torch.cat(list(self.good.state_dict()["owners"].values()), dim=1)

        def pack(tensors, _) -> None:
            data = zlib.compress(change(planes.clone()).numpy())
            tensors["owners"] = torch.from_numpy(np.frombuffer(data, np.uint8).copy())

        self.rewritten(pack)

    def test_owners_that_are_not_there(self):
        _, self.good = self.trained(tasks=2)
        self.repacked(lambda planes: planes.fill_(0b11))
        self.refuse("damaged.*task that is not there")
        self.repacked(
            lambda planes: planes.index_fill_(1, torch.tensor([planes.shape[1] - 1]), 255)
        )
        self.refuse("stack.safetensors")

    def test_owners_that_unpack_to_another_size(self):
        """A small file must not fill the memory either."""
        _, self.good = self.trained(tasks=2)
        for zeros in (1, 10_000_000):
            self.repacked(lambda _, zeros=zeros: torch.zeros(zeros, dtype=torch.uint8))
            self.refuse("damaged.*do not unpack to 2 planes")


if __name__ == "__main__":
    unittest.main()
