"""save and load: the size of the file, exact round trips, and files that must be refused."""

import gc
import os
import resource
import tempfile
import unittest
from pathlib import Path

import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bitstack_nb import BitStack
from bitstack_nb.stack import LockedEntriesMoved
from bitstack_nb.storage import MaskFileError


class OneMatrix(nn.Module):
    """Over two million eligible entries, and a gradient that costs nothing to measure."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2048, 1024)
        self.second = nn.Linear(31, 77)  # sizes that are no multiple of eight

    def forward(self, x, labels):
        loss = self.body(x).square().mean() + self.second(x[:, :31]).square().mean()
        return type("Output", (), {"loss": loss})()


class Case(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.path = self.folder / "stack.safetensors"

    def locked(self, model=None, *, sparsity=0.1, tasks=2, **settings) -> BitStack:
        stack = BitStack(tiny.plain() if model is None else model, sparsity, **settings)
        for task in range(tasks):
            stack.update(tiny.batches(2, seed=task))
        return stack

    def assert_same(self, found: BitStack, expected: BitStack):
        self.assertEqual(list(found.masks), list(expected.masks))
        for name, mask in expected.masks.items():
            self.assertTrue(torch.equal(found.masks[name], mask), name)
        self.assertEqual(found.stats(), expected.stats())
        self.assertTrue(found.layer_table().equals(expected.layer_table()))
        self.assertEqual(set(found.handles), set(expected.handles))

    def assert_untouched(self, model: nn.Module, before: dict):
        for name, different in tiny.changed(model, before).items():
            self.assertFalse(different.any(), name)
        for name, parameter in model.named_parameters():
            self.assertFalse(parameter._backward_hooks, name)
            self.assertTrue(parameter.requires_grad)
            self.assertIsNone(parameter.grad)


class RoundTrip(Case):
    def test_masks_values_settings_and_table(self):
        for budget, exclude in (("union", None), ("fresh", ["blocks.0", "classifier"])):
            for path in (self.path, str(self.path)):
                with self.subTest(budget=budget, path=type(path)):
                    model = tiny.plain(0)
                    stack = self.locked(model, budget=budget, exclude=exclude)
                    stack.save(path)
                    other = tiny.plain(1)
                    before = tiny.snapshot(other)
                    loaded = BitStack.load(path, other)
                    self.assert_same(loaded, stack)
                    self.assertEqual(loaded.verify(), 0)
                    for name, value in other.state_dict().items():
                        mask = stack.masks.get(name, torch.zeros_like(value, dtype=torch.bool))
                        expected = torch.where(mask, model.state_dict()[name], before[name])
                        self.assertTrue(
                            torch.equal(tiny.as_bits(value), tiny.as_bits(expected)), name
                        )

    def test_a_loaded_stack_goes_on_as_the_original(self):
        for budget in ("union", "fresh"):
            with self.subTest(budget):
                model = tiny.plain()
                stack = self.locked(model, budget=budget)
                stack.save(self.path)
                twin = tiny.unhooked_copy(model)
                loaded = BitStack.load(self.path, twin)
                for each, module in ((stack, model), (loaded, twin)):
                    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
                    each.attach(optimizer)
                    tiny.train(module, optimizer, tiny.batches(3, seed=5))
                    each.update(tiny.batches(2, seed=5))
                    self.assertEqual(each.verify(), 0)
                self.assert_same(loaded, stack)
                for name, different in tiny.changed(twin, tiny.snapshot(model)).items():
                    self.assertFalse(different.any(), name)

    def test_without_values_the_present_ones_are_locked(self):
        stack = self.locked()
        stack.save(self.path, values=False)
        other = tiny.plain(1)
        before = tiny.snapshot(other)
        loaded = BitStack.load(self.path, other)
        self.assert_same(loaded, stack)
        self.assertEqual(loaded.verify(), 0)
        self.assertFalse(any(c.any() for c in tiny.changed(other, before).values()))
        with torch.no_grad():
            other.blocks[0].up.weight.add_(1.0)
        with self.assertRaises(LockedEntriesMoved):
            loaded.verify()
        loaded.restore()
        mask = stack.masks["blocks.0.up.weight"]
        moved = tiny.changed(other, before)["blocks.0.up.weight"]
        self.assertTrue(torch.equal(moved, ~mask))

    def test_values_as_locked_even_if_the_model_has_moved(self):
        model = tiny.plain()
        stack = self.locked(model)
        locked_as = tiny.snapshot(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        stack.save(self.path)
        other = tiny.plain(1)
        BitStack.load(self.path, other)
        for name, mask in stack.masks.items():
            self.assertFalse(tiny.changed(other, locked_as)[name][mask].any())

    def test_dtypes_and_special_values(self):
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            with self.subTest(dtype):
                model = tiny.plain().to(dtype)
                with torch.no_grad():
                    model.blocks[0].down.bias[:3] = torch.tensor([-0.0, 0.0, 1e-7], dtype=dtype)
                stack = self.locked(model, sparsity=1.0)
                self.assertTrue(stack.masks["blocks.0.down.bias"][:3].all())
                stack.save(self.path)
                other = tiny.plain(1).to(dtype)
                self.assert_same(BitStack.load(self.path, other), stack)
                for name, mask in stack.masks.items():
                    self.assertFalse(tiny.changed(other, tiny.snapshot(model))[name][mask].any())

    def test_before_any_update(self):
        stack = BitStack(tiny.plain(), 0.3)
        stack.save(self.path)
        loaded = BitStack.load(self.path, tiny.plain(1))
        self.assertEqual(loaded.stats(), stack.stats())
        self.assertEqual(loaded.verify(), 0)

    def test_onto_a_compiled_model_and_back(self):
        stack = self.locked()
        stack.save(self.path)
        compiled = BitStack.load(self.path, torch.compile(tiny.plain(1), backend="eager"))
        self.assert_same(compiled, stack)
        compiled.save(self.path)
        self.assert_same(BitStack.load(self.path, tiny.plain(2)), stack)

    def test_state_dict_through_torch_save(self):
        stack = self.locked()
        torch.save(stack.state_dict(), self.path)
        twin = BitStack(tiny.plain(), 0.1)
        twin.load_state_dict(torch.load(self.path))
        self.assert_same(twin, stack)


class Size(Case):
    def two_million(self, sparsity: float) -> tuple[BitStack, int, int]:
        stack = BitStack(tiny.seeded(OneMatrix, 0), sparsity, exclude=[])
        x = torch.randn(4, 2048, generator=torch.Generator().manual_seed(0))
        for task in range(3):
            stack.update([{"x": x.roll(task), "labels": x}])
        numbers = stack.stats()
        self.assertGreater(numbers["eligible"], 2_000_000)
        return stack, numbers["eligible"], numbers["locked"]

    def test_at_most_1_02_bits_per_entry_on_disk(self):
        stack, eligible, locked = self.two_million(0.12)
        self.assertGreater(locked, 0.12 * eligible)
        stack.save(self.path, values=False)
        self.assertLessEqual(8 * self.path.stat().st_size / eligible, 1.02)
        stack.save(self.path)
        self.assertLessEqual(8 * (self.path.stat().st_size - 4 * locked) / eligible, 1.02)

    def test_at_most_1_02_bits_per_entry_in_memory(self):
        def live() -> dict[int, int]:
            gc.collect()
            storages = [t.untyped_storage() for t in gc.get_objects() if type(t) is torch.Tensor]
            return {s.data_ptr(): s.nbytes() for s in storages}

        before = live()
        stack, eligible, locked = self.two_million(0.01)
        model = sum(4 * p.numel() for p in stack._model.parameters())
        after = live()
        new = sum(size for where, size in after.items() if where not in before)
        parameters = {p.untyped_storage().data_ptr() for p in stack._model.parameters()}
        if parameters & after.keys():  # whether gc saw the parameters' storages themselves
            new -= model
        self.assertGreaterEqual(new, eligible / 8 + 4 * locked)
        self.assertLessEqual(new, 1.02 * eligible / 8 + 4 * locked)


class Refused(Case):
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
        save_file(tensors, self.path, metadata=metadata)

    def test_a_newer_version_or_another_bit_order(self):
        for key, value in {"version": "999", "bit_order": "big", "format": "other"}.items():
            with self.subTest(key):
                self.rewritten(lambda _, metadata, k=key, v=value: metadata.update({k: v}))
                self.refuse("stack.safetensors")

    def test_missing_or_damaged_parts(self):
        self.locked().save(self.path)
        with safe_open(self.path, framework="pt") as file:
            keys, entries = list(file.keys()), list(file.metadata())
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


class AtomicWrite(Case):
    def test_only_the_file_is_left(self):
        stack = self.locked()
        for _ in range(2):
            stack.save(self.path)
            self.assertEqual(os.listdir(self.folder), [self.path.name])

    def test_a_full_disk_leaves_the_old_file(self):
        self.locked(tasks=1).save(self.path)
        old = self.path.read_bytes()
        stack = self.locked(tasks=3)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))
        try:
            with self.assertRaises(Exception) as raised:
                stack.save(self.path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        self.assertIsInstance(raised.exception, OSError)
        self.assertEqual(self.path.read_bytes(), old)
        self.assertEqual(os.listdir(self.folder), [self.path.name])
        self.assertEqual(stack.verify(), 0)

    def test_a_folder_that_cannot_be(self):
        (self.folder / "file").write_text("x")
        with self.assertRaises(OSError):
            self.locked().save(self.folder / "file" / "stack.safetensors")
        self.assertEqual(os.listdir(self.folder), ["file"])

    def test_saving_changes_nothing(self):
        model = tiny.plain()
        stack = self.locked(model)
        before, rng = tiny.snapshot(model), torch.get_rng_state()
        stack.save(self.path)
        BitStack.load(self.path, tiny.plain(1))
        self.assertFalse(any(c.any() for c in tiny.changed(model, before).values()))
        self.assertTrue(torch.equal(rng, torch.get_rng_state()))


if __name__ == "__main__":
    unittest.main()
