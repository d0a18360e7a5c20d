"""save and load: exact round trips, one bit per weight, and damaged or foreign files refused."""

import gc
import json
import os
import random
import re
import unittest
from pathlib import Path
from unittest import mock

import tiny
import torch
from cases import ADAMW, FileCase
from damage import damaged, spoilt
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import bitstack_nb
from bitstack_nb import BitStack, ExactRecall, maskfile
from bitstack_nb.guard import LockedWeightsMoved
from bitstack_nb.importance import choose, random_scores
from bitstack_nb.maskfile import MaskFileError

try:
    import resource
except ImportError:
    resource = None


class TwoMillion(nn.Module):
    """Over two million eligible weights, and a gradient that costs nothing to measure."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2048, 1024)
        self.second = nn.Linear(31, 77)  # sizes that are no multiple of eight

    def forward(self, x, labels):
        loss = self.body(x).square().mean() + self.second(x[:, :31]).square().mean()
        return type("Output", (), {"loss": loss})()


class RoundTrip(FileCase):
    def test_masks_values_settings_and_table(self):
        """Locked weights get their values, and no other weight of the model is touched."""
        for budget, exclude, path in (
            ("union", None, self.path),
            ("fresh", ["blocks.0", "classifier"], str(self.path)),
        ):
            with self.subTest(budget):
                model, other = tiny.plain(0), tiny.plain(1)
                stack = self.locked(model, budget=budget, exclude=exclude)
                before = tiny.snapshot(other)
                stack.save(path)
                loaded = BitStack.load(path, other)
                self.assert_same(loaded, stack)
                self.assertEqual(loaded.verify(), 0)
                for name, value in other.state_dict().items():
                    mask = stack.masks.get(name, torch.zeros_like(value, dtype=torch.bool))
                    expected = torch.where(mask, model.state_dict()[name], before[name])
                    self.assertTrue(torch.equal(tiny.as_bits(value), tiny.as_bits(expected)), name)

    def test_a_loaded_stack_goes_on_as_the_original(self):
        for budget in ("union", "fresh"):
            with self.subTest(budget):
                model = tiny.plain()
                stack = self.locked(model, budget=budget)
                stack.save(self.path)
                twin = tiny.unhooked_copy(model)
                loaded = BitStack.load(self.path, twin)
                for each, module in ((stack, model), (loaded, twin)):
                    optimizer = ADAMW(module.parameters())
                    each.attach(optimizer)
                    tiny.train(module, optimizer, tiny.batches(3, seed=5))
                    each.update(tiny.batches(2, seed=5))
                    self.assertEqual(each.verify(), 0)
                self.assert_same(loaded, stack)
                self.assert_unchanged(twin, tiny.snapshot(model))

    def test_without_values_the_present_ones_are_locked(self):
        stack, other = self.locked(), tiny.plain(1)
        stack.save(self.path, values=False)
        before = tiny.snapshot(other)
        loaded = BitStack.load(self.path, other)
        self.assert_same(loaded, stack)
        self.assert_unchanged(other, before)
        with torch.no_grad():
            other.blocks[0].up.weight.add_(1.0)
        with self.assertRaises(LockedWeightsMoved):
            loaded.verify()
        loaded.restore()
        moved = tiny.changed(other, before)["blocks.0.up.weight"]
        self.assertTrue(torch.equal(moved, ~stack.masks["blocks.0.up.weight"]))

    def test_home_is_expanded(self):
        folder = Path(self.path).parent
        tasks = ExactRecall(tiny.plain())
        with mock.patch.dict(os.environ, HOME=str(folder)):
            for kept, kind in ((self.locked(), BitStack), (tasks, ExactRecall)):
                kept.save("~/deeper/kept")
                self.assertTrue((folder / "deeper" / "kept").is_file())
                kind.load("~/deeper/kept", tiny.plain())

    def test_values_are_those_of_locking_in_every_dtype(self):
        """Although the model has moved since; special values too."""
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            with self.subTest(dtype):
                model, other = tiny.plain().to(dtype), tiny.plain(1).to(dtype)
                with torch.no_grad():
                    model.blocks[0].down.bias[:3] = torch.tensor([-0.0, 0.0, 1e-7], dtype=dtype)
                stack, locked_as = self.locked(model, sparsity=1.0), tiny.snapshot(model)
                self.assertTrue(stack.masks["blocks.0.down.bias"][:3].all())
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(1.0)
                stack.save(self.path)
                self.assert_same(BitStack.load(self.path, other), stack)
                for name, mask in stack.masks.items():
                    self.assertFalse(tiny.changed(other, locked_as)[name][mask].any())

    def test_other_defaults(self):
        """Users may set the dtype and device of new tensors; meta is the first to fail."""
        stack, other = BitStack(tiny.plain(), 0.3), tiny.plain(1)
        stack.save(self.path)
        self.assertEqual(BitStack.load(self.path, other).stats()["locked"], 0)
        expected, dtype = random_scores(stack.masks, seed=0), torch.get_default_dtype()
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
        self.assertTrue(all(torch.equal(s, scores[name]) for name, s in expected.items()))

    def test_onto_a_frozen_model(self):
        """The file tells what may be locked; the model may be frozen, and trained again later."""
        stack, model = self.locked(), tiny.plain(1).requires_grad_(False)
        stack.save(self.path)
        model.blocks[1].up.requires_grad_(True)
        flags = [p.requires_grad for p in model.parameters()]
        loaded = BitStack.load(self.path, model)
        self.assertEqual([p.requires_grad for p in model.parameters()], flags)
        optimizer = ADAMW(model.requires_grad_(True).parameters())
        loaded.attach(optimizer)
        self.assert_same(loaded, stack)
        before = tiny.snapshot(model)
        tiny.train(model, optimizer, tiny.batches(2, seed=4))
        self.assertEqual(loaded.verify(), 0)
        self.assertTrue(any(c.any() for c in tiny.changed(model, before).values()))

    def test_onto_a_compiled_model_and_through_a_checkpoint(self):
        stack, twin = self.locked(), BitStack(tiny.plain(), 0.1)
        stack.save(self.path)
        compiled = BitStack.load(self.path, torch.compile(tiny.plain(1), backend="eager"))
        self.assert_same(compiled, stack)
        torch.save(compiled.state_dict(), self.folder / "run.pt")
        twin.load_state_dict(torch.load(self.folder / "run.pt", weights_only=True))
        self.assert_same(twin, stack)


class Size(FileCase):
    def locked_two_million(self, model, sparsity: float) -> tuple[BitStack, int, int]:
        x = torch.randn(4, 2048, generator=torch.Generator().manual_seed(0))
        stack = BitStack(model, sparsity, exclude=[])
        for task in range(3):
            stack.update([{"x": x.roll(task), "labels": x}])
        numbers = stack.stats()
        self.assertGreater(numbers["eligible"], 2_000_000)
        return stack, numbers["eligible"], numbers["locked"]

    def test_at_most_1_02_bits_per_weight_on_disk(self):
        stack, eligible, locked = self.locked_two_million(tiny.seeded(TwoMillion, 0), 0.12)
        self.assertGreater(locked, 0.12 * eligible)
        stack.save(self.path, values=False)
        self.assertLessEqual(8 * self.path.stat().st_size / eligible, 1.02)
        stack.save(self.path)
        self.assertLessEqual(8 * (self.path.stat().st_size - 4 * locked) / eligible, 1.02)

    def test_at_most_1_02_bits_per_weight_in_memory(self):
        """Between updates no other tensor is alive than packed masks and locked values."""

        def storages() -> dict[int, int]:
            gc.collect()
            kinds = (torch.Tensor, nn.Parameter)  # not the fake ones that torch.compile leaves
            found = [t.untyped_storage() for t in gc.get_objects() if type(t) in kinds]
            return {storage.data_ptr(): storage.nbytes() for storage in found}

        model = tiny.seeded(TwoMillion, 0)
        before = storages()
        _stack, eligible, locked = self.locked_two_million(model, 0.01)
        new = sum(size for where, size in storages().items() if where not in before)
        self.assertGreaterEqual(new, eligible / 8 + 4 * locked)  # the measurement sees them
        self.assertLessEqual(new, 1.02 * eligible / 8 + 4 * locked)


class Writing(FileCase):
    def assert_in_folder(self, *names: str):
        self.assertEqual([path.name for path in self.folder.iterdir()], list(names))

    def test_nothing_but_the_file_changes(self):
        model = tiny.plain()
        stack, before, rng = self.locked(model), tiny.snapshot(model), torch.get_rng_state()
        for _ in range(2):
            stack.save(self.path)
            self.assert_in_folder(self.path.name)
        BitStack.load(self.path, tiny.plain(1))
        self.assert_unchanged(model, before)
        self.assertTrue(torch.equal(rng, torch.get_rng_state()))

    @unittest.skipIf(resource is None, "no file size limits on this system")
    def test_a_full_disk_leaves_the_old_file(self):
        self.locked(tasks=1).save(self.path)
        old, stack = self.path.read_bytes(), self.locked(tasks=3)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))
        try:
            with self.assertRaisesRegex((OSError, SafetensorError), "(?i)too large"):
                stack.save(self.path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        self.assertEqual(self.path.read_bytes(), old)
        self.assert_in_folder(self.path.name)


class Refused(FileCase):
    """The error names the file or every mismatch, and the model is left alone."""

    def refuse(self, *patterns: str, model=None, error=MaskFileError) -> None:
        model = tiny.plain(1) if model is None else model
        before = tiny.snapshot(model)
        with self.assertRaises(error) as raised:
            BitStack.load(self.path, model)
        for pattern in patterns or ("stack.safetensors",):
            self.assertRegex(str(raised.exception), pattern)
        self.assert_unchanged(model, before)
        for parameter in model.parameters():
            self.assertFalse(parameter._backward_hooks or not parameter.requires_grad)
            self.assertIsNone(parameter.grad)

    def rewritten(self, change) -> None:
        """Save a good file, let `change(tensors, metadata)` spoil it, and write it back."""
        self.locked().save(self.path)
        write(self.path, *changed_content(self.path, change))

    def test_foreign_files(self):
        for name, make in {
            "text": lambda: self.path.write_text("not a mask file, but long enough\n" * 99),
            "zeros": lambda: self.path.write_bytes(bytes(4096)),
            "weights": lambda: save_file({"weight": torch.ones(3)}, self.path),
            "pickled": lambda: torch.save(self.locked().state_dict(), self.path),
        }.items():
            with self.subTest(name):
                make()
                self.refuse()

    def test_no_file(self):
        self.refuse(error=FileNotFoundError)
        self.path.mkdir()
        self.refuse(error=(OSError, MaskFileError))

    def test_missing_or_damaged_parts(self):
        self.locked().save(self.path)
        with safe_open(self.path, framework="pt") as file:
            keys, entries = list(file.keys()), file.metadata().keys() - {"digest"}
        for key in keys:
            self.rewritten(lambda tensors, _, k=key: tensors.pop(k))
            self.refuse()
            self.rewritten(lambda t, _, k=key: t.update({k: t[k].flatten()[:-1].clone()}))
            self.refuse()
        for entry in entries:  # another format, version, method and bit order among them
            self.rewritten(lambda _, metadata, e=entry: metadata.pop(e))
            self.refuse()
            self.rewritten(lambda _, metadata, e=entry: metadata.update({e: "{]"}))
            self.refuse()

    def test_every_mismatch_is_named(self):
        self.locked().save(self.path)
        wider = tiny.plain()
        wider.blocks[0].up.weight = nn.Parameter(torch.ones(33, tiny.WIDTH))
        wider.blocks[1].mix = nn.Parameter(torch.ones(5))
        del wider.blocks[0].gain
        wider.blocks[1].norm.bias = nn.Parameter(torch.ones(tiny.WIDTH, dtype=torch.float64))
        names = (r"0\.up\.weight", "33", r"1\.mix", r"0\.gain", r"1\.norm\.bias", "float64")
        self.refuse(*names, model=wider)
        self.refuse(r"blocks\.1\.up\.weight", r"blocks\.1\.gain", model=tiny.plain(depth=1))
        self.refuse(r"blocks\.2\.up\.weight", model=tiny.plain(depth=3))
        self.refuse("bfloat16", "float32", model=tiny.plain().to(torch.bfloat16))
        self.refuse(*tiny.expected_eligible("plain", tiny.plain()), model=tiny.bert())

    def test_state_of_another_model(self):
        state, stack = self.locked().state_dict(), self.locked(tiny.plain(1, depth=1))
        masks = dict(stack.masks)
        with self.assertRaisesRegex(MaskFileError, r"blocks\.1\.up\.weight"):
            stack.load_state_dict(state)
        self.assertTrue(all(torch.equal(stack.masks[name], mask) for name, mask in masks.items()))
        self.assertEqual(stack.verify(), 0)


class Damaged(FileCase):
    """Hundreds of damaged files: each is refused by our error, or the stack it gives is right."""

    def setUp(self):
        super().setUp()
        self.stack = self.locked(tasks=3, budget="fresh")
        self.stack.save(self.path)

    def load_or_refuse(self) -> BitStack | None:
        model = tiny.plain()
        before = tiny.snapshot(model)
        try:
            return BitStack.load(self.path, model)
        except MaskFileError:
            self.assert_unchanged(model, before)
            self.assertFalse(any(p._backward_hooks for p in model.parameters()))
            return None

    def test_damaged_bytes(self):
        """The stack that loads is the one that was saved, to the last bit."""
        expected, data = plain(self.stack.state_dict()), self.path.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        generator, loaded = random.Random(0), 0
        for number in range(300):
            self.path.write_bytes(damaged(data, generator, header=header))
            if (found := self.load_or_refuse()) is not None:
                loaded += 1
                self.assertEqual(plain(found.state_dict()), expected, number)
        self.assertLess(loaded, 30)  # some change nothing: a digit by itself

    def test_other_contents(self):
        """Other contents under a right digest: consistent, or refused."""
        tensors, metadata = changed_content(self.path, lambda *_: None)
        generator, loaded = random.Random(1), 0
        for number in range(150):
            other_tensors, other = dict(tensors), dict(metadata)
            if generator.random() < 0.5:
                key = generator.choice(sorted(tensors))
                other_tensors[key] = spoilt_tensor(tensors[key], generator)
            else:
                key = generator.choice(["parameters", "settings", "values"])
                other[key] = json.dumps(spoilt(json.loads(metadata[key]), generator))
            write(self.path, other_tensors, other)
            if (found := self.load_or_refuse()) is not None:
                loaded += 1
                self.assert_consistent(found, number)
        self.assertTrue(0 < loaded < 75, loaded)

    def assert_consistent(self, stack: BitStack, number: int) -> None:
        """Counts are those of the masks, values those in the model, and it can be kept."""
        self.assertEqual(stack.verify(), 0, number)
        rows, locked = stack.layer_table(), stack.stats()["locked"]
        self.assertEqual(locked, sum(int(mask.sum()) for mask in stack.masks.values()), number)
        self.assertEqual(rows["added"].sum(), locked, number)
        self.assertTrue((rows["added"] >= 0).all() and (rows["added"] <= rows["selected"]).all())
        self.assertTrue((rows["selected"] <= rows["eligible"]).all(), number)
        stack.save(self.path)
        self.assertEqual(plain(self.load_or_refuse().state_dict()), plain(stack.state_dict()))

    def test_nothing_is_unpickled(self):
        """A pickle runs code when it is loaded. numpy, torch and joblib load some if they may."""
        unpickles = re.compile(
            r"^\s*(import|from) (pickle|cPickle|dill|cloudpickle|shelve|marshal)\b"
            r"|torch\.(load|save)\(|joblib(\.| import .*\b)(load|dump|Memory)\b",
            re.M,
        )
        for path in Path(bitstack_nb.__file__).parent.rglob("*.py"):
            self.assertIsNone(unpickles.search(path.read_text()), path)


def changed_content(path: Path, change) -> tuple[dict, dict]:
    """A file's tensors and metadata, as ``change(tensors, metadata)`` leaves them."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    change(tensors, metadata)
    return tensors, metadata


def write(path: Path, tensors: dict, metadata: dict) -> None:
    """A file under a right digest, so that more than the digest has to refuse it."""
    metadata = {key: value for key, value in metadata.items() if key != "digest"}
    save_file(tensors, path, metadata | {"digest": maskfile.digest(tensors, metadata)})


def plain(state):
    """A state in comparable form."""
    if isinstance(state, torch.Tensor):
        return str(state.dtype), state.shape, tiny.as_bits(state).tolist()
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return [plain(value) for value in state] if isinstance(state, list) else state


def spoilt_tensor(tensor: torch.Tensor, generator: random.Random) -> torch.Tensor:
    change = generator.choice(
        [
            lambda: torch.cat([tensor.flatten(), tensor.flatten()[:1]]),
            lambda: tensor.flatten().clone(),
            lambda: tensor[None].clone(),
            lambda: tensor.to(generator.choice([torch.float32, torch.float16, torch.int64])),
            lambda: torch.zeros_like(tensor),
            lambda: tensor.flip(0),
            lambda: -tensor,
            lambda: torch.full_like(tensor, generator.choice([1, 5, 100])),
            lambda: tensor.new_empty(0),
            lambda: tensor.new_ones(()),
        ]
    )
    return change().contiguous()


if __name__ == "__main__":
    unittest.main()
