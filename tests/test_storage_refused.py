"""load: damaged, foreign and mismatching files are refused and the model is left alone."""

import unittest

import tiny
import torch
from cases import FileCase
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bitstack_nb import BitStack, maskfile
from bitstack_nb.maskfile import MaskFileError


class Refused(FileCase):
    def assert_untouched(self, model: nn.Module, before: dict):
        for name, different in tiny.changed(model, before).items():
            self.assertFalse(different.any(), name)
        for name, parameter in model.named_parameters():
            self.assertFalse(parameter._backward_hooks, name)
            self.assertTrue(parameter.requires_grad)
            self.assertIsNone(parameter.grad)

    def refuse(self, *patterns: str, model=None, error=MaskFileError) -> str:
        model = tiny.plain(1) if model is None else model
        before = tiny.snapshot(model)
        with self.assertRaises(error) as raised:
            BitStack.load(self.path, model)
        for pattern in patterns:
            self.assertRegex(str(raised.exception), pattern)
        self.assert_untouched(model, before)
        return str(raised.exception)

    def test_truncated_anywhere(self):
        for values in (True, False):
            self.locked().save(self.path, values=values)
            whole = self.path.read_bytes()
            header = 8 + int.from_bytes(whole[:8], "little")
            n = len(whole)
            cuts = {0, 1, 7, 8, 9, 100, header // 2, header - 1, header, header + 1}
            cuts |= {n * part // 17 for part in range(1, 17)} | {n - 100, n - 2, n - 1}
            for cut in sorted(cuts):
                with self.subTest(values=values, cut=cut, of=n):
                    self.path.write_bytes(whole[:cut])
                    self.refuse("stack.safetensors")

    def test_trailing_bytes(self):
        self.locked().save(self.path)
        self.path.write_bytes(self.path.read_bytes() + bytes(16))
        self.refuse()

    def test_foreign_files(self):
        def text():
            self.path.write_text("not a mask file, but long enough to look like one\n" * 9)

        def zeros():
            self.path.write_bytes(bytes(4096))

        def weights():
            save_file({"weight": torch.ones(3)}, self.path)

        def pickled():
            torch.save(self.locked().state_dict(), self.path)

        for make in (text, zeros, weights, pickled):
            with self.subTest(make.__name__):
                make()
                self.refuse("stack.safetensors")

    def test_no_file(self):
        self.refuse("stack.safetensors", error=FileNotFoundError)
        self.path.mkdir()
        self.refuse("stack.safetensors", error=(OSError, MaskFileError))

    def rewritten(self, change) -> None:
        """Save a good file, let `change(tensors, metadata)` spoil it, and write it back."""
        self.locked().save(self.path)
        tensors = load_file(self.path)
        with safe_open(self.path, framework="pt") as file:
            metadata = dict(file.metadata())
        change(tensors, metadata)
        metadata["digest"] = maskfile._digest(tensors, metadata)  # or it would refuse every change
        save_file(tensors, self.path, metadata=metadata)

    def test_a_newer_version_or_another_bit_order(self):
        for key, value in {"version": "999", "bit_order": "big", "format": "other"}.items():
            with self.subTest(key):
                self.rewritten(lambda _, metadata, k=key, v=value: metadata.update({k: v}))
                self.refuse("stack.safetensors")

    def test_missing_or_damaged_parts(self):
        self.locked().save(self.path)
        with safe_open(self.path, framework="pt") as file:
            keys, entries = list(file.keys()), file.metadata().keys() - {"digest"}
        for key in keys:
            if not key.startswith("values"):
                with self.subTest(missing=key):
                    self.rewritten(lambda tensors, _, k=key: tensors.pop(k))
                    self.refuse("stack.safetensors")
            with self.subTest(shortened=key):
                self.rewritten(lambda t, _, k=key: t.update({k: t[k].flatten()[:-1].clone()}))
                self.refuse("stack.safetensors")
        for entry in entries:
            with self.subTest(missing=entry):
                self.rewritten(lambda _, metadata, e=entry: metadata.pop(e))
                self.refuse("stack.safetensors")
            with self.subTest(garbled=entry):
                self.rewritten(lambda _, metadata, e=entry: metadata.update({e: "{]"}))
                self.refuse("stack.safetensors")

    def test_every_mismatch_is_named(self):
        self.locked().save(self.path)
        wider = tiny.plain()
        wider.blocks[0].up.weight = nn.Parameter(torch.ones(33, tiny.WIDTH))
        wider.blocks[1].mix = nn.Parameter(torch.ones(5))
        del wider.blocks[0].gain
        wider.blocks[1].norm.bias = nn.Parameter(torch.ones(tiny.WIDTH, dtype=torch.float64))
        self.refuse(
            r"blocks\.0\.up\.weight",
            "33",
            r"blocks\.1\.mix",
            r"blocks\.0\.gain",
            r"blocks\.1\.norm\.bias",
            "float64",
            model=wider,
        )

    def test_another_depth(self):
        self.locked().save(self.path)
        self.refuse(r"blocks\.1\.up\.weight", r"blocks\.1\.gain", model=tiny.plain(depth=1))
        self.refuse(r"blocks\.2\.up\.weight", model=tiny.plain(depth=3))

    def test_another_architecture(self):
        self.locked().save(self.path)
        message = self.refuse(model=tiny.bert())
        for name in tiny.expected_eligible("plain", tiny.plain()):
            self.assertIn(name, message)

    def test_values_of_another_dtype(self):
        self.locked().save(self.path)
        self.refuse("bfloat16", "float32", model=tiny.plain().to(torch.bfloat16))

    def test_state_of_another_model(self):
        state = self.locked().state_dict()
        stack = self.locked(tiny.plain(1, depth=1))
        masks = dict(stack.masks)
        with self.assertRaisesRegex(MaskFileError, r"blocks\.1\.up\.weight"):
            stack.load_state_dict(state)
        for name, mask in masks.items():
            self.assertTrue(torch.equal(stack.masks[name], mask))
        self.assertEqual(stack.verify(), 0)


if __name__ == "__main__":
    unittest.main()
