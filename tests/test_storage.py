"""save and load: exact round trips, one bit per entry, and files that are whole or not there."""

import gc
import unittest

import tiny
import torch
from cases import ADAMW, FileCase
from safetensors import SafetensorError
from torch import nn

from bitstack_nb import BitStack
from bitstack_nb.guard import LockedWeightsMoved
from bitstack_nb.importance import choose, random_scores


class TwoMillion(nn.Module):
    """Over two million eligible entries, and a gradient that costs nothing to measure."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2048, 1024)
        self.second = nn.Linear(31, 77)  # sizes that are no multiple of eight

    def forward(self, x, labels):
        loss = self.body(x).square().mean() + self.second(x[:, :31]).square().mean()
        return type("Output", (), {"loss": loss})()


class RoundTrip(FileCase):
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
        with self.assertRaises(LockedWeightsMoved):
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

    def test_other_defaults(self):
        """Users may set the dtype and device of new tensors; meta is the first to fail."""
        model, other = tiny.plain(), tiny.plain(1)
        stack = BitStack(model, 0.3)
        expected = random_scores(stack.masks, seed=0)
        dtype = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.float64)
            with torch.device("meta"):
                scores = random_scores(stack.masks, seed=0)
                stack.lock(choose(scores, 100))
                stack.save(self.path)
                loaded = BitStack.load(self.path, other)
        finally:
            torch.set_default_dtype(dtype)
        self.assertEqual(stack.stats()["locked"], 100)
        self.assert_same(loaded, stack)
        for name, score in expected.items():
            self.assertTrue(torch.equal(score, scores[name]), name)

    def test_onto_a_frozen_model(self):
        """What may be locked, the file says; the model may be frozen, and trained again later."""
        stack = self.locked()
        stack.save(self.path)
        model = tiny.plain(1).requires_grad_(False)
        model.blocks[1].up.requires_grad_(True)
        flags = [p.requires_grad for p in model.parameters()]
        loaded = BitStack.load(self.path, model)
        self.assertEqual([p.requires_grad for p in model.parameters()], flags)
        model.requires_grad_(True)
        optimizer = ADAMW(model.parameters())
        loaded.attach(optimizer)
        self.assert_same(loaded, stack)
        before = tiny.snapshot(model)
        tiny.train(model, optimizer, tiny.batches(2, seed=4))
        self.assertEqual(loaded.verify(), 0)
        self.assertTrue(any(c.any() for c in tiny.changed(model, before).values()))

    def test_onto_a_compiled_model_and_back(self):
        stack = self.locked()
        stack.save(self.path)
        compiled = BitStack.load(self.path, torch.compile(tiny.plain(1), backend="eager"))
        self.assert_same(compiled, stack)
        compiled.save(self.path)
        self.assert_same(BitStack.load(self.path, tiny.plain(2)), stack)

    def test_state_dict_through_torch_save(self):
        stack = self.locked()
        path = self.folder / "checkpoint.pt"
        torch.save(stack.state_dict(), path)
        twin = BitStack(tiny.plain(), 0.1)
        twin.load_state_dict(torch.load(path, weights_only=True))
        self.assert_same(twin, stack)


class Size(FileCase):
    def two_million(self) -> tuple[nn.Module, torch.Tensor]:
        x = torch.randn(4, 2048, generator=torch.Generator().manual_seed(0))
        return tiny.seeded(TwoMillion, 0), x

    def locked_two_million(self, model, x, sparsity: float) -> tuple[BitStack, int, int]:
        stack = BitStack(model, sparsity, exclude=[])
        for task in range(3):
            stack.update([{"x": x.roll(task), "labels": x}])
        numbers = stack.stats()
        self.assertGreater(numbers["eligible"], 2_000_000)
        return stack, numbers["eligible"], numbers["locked"]

    def test_at_most_1_02_bits_per_entry_on_disk(self):
        stack, eligible, locked = self.locked_two_million(*self.two_million(), 0.12)
        self.assertGreater(locked, 0.12 * eligible)
        stack.save(self.path, values=False)
        self.assertLessEqual(8 * self.path.stat().st_size / eligible, 1.02)
        stack.save(self.path)
        self.assertLessEqual(8 * (self.path.stat().st_size - 4 * locked) / eligible, 1.02)

    def test_at_most_1_02_bits_per_entry_in_memory(self):
        """Between updates no other tensor is alive than packed masks and locked values."""

        def storages() -> dict[int, int]:
            gc.collect()
            kinds = (torch.Tensor, nn.Parameter)  # not the fake ones that torch.compile leaves
            found = [t.untyped_storage() for t in gc.get_objects() if type(t) in kinds]
            return {storage.data_ptr(): storage.nbytes() for storage in found}

        model, x, before = *self.two_million(), storages()
        _stack, eligible, locked = self.locked_two_million(model, x, 0.01)
        new = sum(size for where, size in storages().items() if where not in before)
        self.assertGreaterEqual(new, eligible / 8 + 4 * locked)  # the measurement sees them
        self.assertLessEqual(new, 1.02 * eligible / 8 + 4 * locked)


class AtomicWrite(FileCase):
    def assert_in_folder(self, *names: str):
        self.assertEqual([path.name for path in self.folder.iterdir()], list(names))

    def test_only_the_file_is_left(self):
        stack = self.locked()
        for _ in range(2):
            stack.save(self.path)
            self.assert_in_folder(self.path.name)

    def test_a_full_disk_leaves_the_old_file(self):
        self.locked(tasks=1).save(self.path)
        old = self.path.read_bytes()
        stack = self.locked(tasks=3)
        try:
            import resource
        except ImportError:
            self.skipTest("no file size limits on this system")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))
        try:
            with self.assertRaisesRegex((OSError, SafetensorError), "(?i)too large"):
                stack.save(self.path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        self.assertEqual(self.path.read_bytes(), old)
        self.assert_in_folder(self.path.name)
        self.assertEqual(stack.verify(), 0)

    def test_a_folder_that_cannot_be(self):
        (self.folder / "file").write_text("x")
        with self.assertRaises(OSError):
            self.locked().save(self.folder / "file" / "stack.safetensors")
        self.assert_in_folder("file")

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
