"""The file of exact recall: other processes, other bases, damage; exported models."""

import json
import random
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import tiny
import torch
from cases import ADAMW, FileCase, RecallCase
from damage import damaged
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bitstack_nb import ExactRecall, maskfile, taskfile
from bitstack_nb.guard import LockedWeightsMoved
from bitstack_nb.maskfile import MaskFileError

SERVE = """
import sys
sys.path.insert(0, sys.argv[1])
import tiny, torch
from bitstack_nb import ExactRecall

model = tiny.distilbert().eval()
tasks = ExactRecall.load(sys.argv[2] + "/tasks.safetensors", model)
batch = {k: v for k, v in tiny.batches(1, seed=9)[0].items() if k != "labels"}
for name in reversed(tasks.names):
    with tasks.using(name), torch.no_grad():
        assert list(model.config.id2label.values())[0] == name + " 0"
        torch.save(model(**batch).logits, f"{sys.argv[2]}/{name}.pt")
assert tasks.verify() == 0
"""


class Case(FileCase, RecallCase):
    def setUp(self):
        super().setUp()
        self.path = self.folder / "tasks.safetensors"

    def assert_same(self, found, expected):
        self.assertEqual(found.names, expected.names)
        self.assertEqual(found.stats(), expected.stats())
        for name in expected.names:
            one, other = found._tasks[name], expected._tasks[name]
            self.assertEqual((one.labels, one.seed), (other.labels, other.seed))
            self.assertEqual((one.own.counts, one.digests), (other.own.counts, other.digests))
            self.assertTrue(one.own.positions.equal(other.own.positions))
            self.assertTrue(all(map(torch.equal, one.own.values, other.own.values)))


class Casts(Case):
    def test_a_cast_of_a_loaded_model_is_named(self):
        """Also where the task is asked for that is shown already, and before it is saved."""
        self.trained(tasks=2)[1].save(self.path)
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            model = tiny.plain()
            tasks = ExactRecall.load(self.path, model)
            tasks.switch("0")
            model.to(dtype)
            for call in (
                lambda t=tasks: t.switch("0"),
                lambda t=tasks: t.using("0").__enter__(),
                lambda t=tasks: t.export("0"),
                lambda t=tasks: t.switch("1"),
                tasks.verify,
            ):
                with self.assertRaisesRegex(
                    RuntimeError, f"is {dtype} but was torch.float32.*cast"
                ):
                    call()
            before = self.path.read_bytes()
            with self.assertRaisesRegex(LockedWeightsMoved, r"classifier.*'0'.*cast.*remove"):
                tasks.save(self.path)
            self.assertEqual(self.path.read_bytes(), before)


class RoundTrip(Case):
    def test_outputs_in_a_new_process(self):
        """Eleven tasks with heads of their own size: names do not go by their sorting."""
        model, expected = tiny.distilbert(), {}
        tasks = ExactRecall(model, 0.2)
        batch = {k: v for k, v in tiny.batches(1, seed=9)[0].items() if k != "labels"}
        for number in (10, 2, 1, 0, 3, 4, 5, 6, 7, 8, 9):
            name = f"task {number}"
            tasks.begin(name, [f"{name} {i}" for i in range(2 + number)])
            own = [p for group in tasks.parameters() for p in group["params"]]
            for p in own:
                p.grad = torch.randn_like(p)
            ADAMW(own).step()
            tasks.close()
            expected[name] = model.eval()(**batch).logits
        tasks.save(self.path)
        tests = Path(__file__).parent
        command = [sys.executable, "-c", SERVE, str(tests), str(self.folder)]
        subprocess.run(command, check=True, cwd=tests.parent)
        for name, logits in expected.items():
            self.assertTrue(torch.equal(torch.load(self.folder / f"{name}.pt"), logits), name)

    def test_tasks_and_what_comes_after_them(self):
        for dtype in (torch.float32, torch.bfloat16):
            for sparsity in (0.5, 0.01):
                with self.subTest(dtype=dtype, sparsity=sparsity):
                    build = lambda d=dtype: tiny.plain().to(d)  # noqa: E731
                    model, tasks = self.trained(build(), sparsity=sparsity)
                    tasks.switch("0")
                    tasks.save(self.path)
                    twin = build().eval().requires_grad_(False)
                    loaded = ExactRecall.load(self.path, twin)
                    self.assert_bits(twin, self.base)
                    self.assertFalse(any(p.requires_grad for p in twin.parameters()))
                    self.assert_same(loaded, tasks)
                    self.assert_recalls(twin, loaded)
                    after = list(self.after)
                    for each, on in ((tasks, model), (loaded, twin)):
                        each.switch("2")
                        self.train_task(on, each, 3)
                    self.assertTrue(all(map(torch.equal, *(a.values() for a in self.after[-2:]))))
                    self.after = [*after, self.after[-1]]
                    self.assert_recalls(twin, loaded)

    def test_what_a_task_keeps_and_whom_another_adopts(self):
        _, tasks = self.trained(tasks=1)
        tasks.begin("1")
        tasks.close(kept={"mean": torch.arange(3.0)}, notes={"texts": (1, 2)})
        tasks.save(self.path)
        loaded = ExactRecall.load(self.path, tiny.plain())
        self.assertEqual(loaded.digests, tasks.digests)
        self.assertTrue(torch.equal(loaded.kept("1")["mean"], torch.arange(3.0)))
        self.assertEqual((loaded.notes("1"), loaded.notes("0")), ({"texts": [1, 2]}, {}))
        other = ExactRecall(tiny.plain(), 0.5)
        other.adopt(loaded)
        self.assertEqual((other.digests, other.verify()), (tasks.digests, 0))
        with self.assertRaisesRegex(ValueError, "both have a task '0', '1'"):
            other.adopt(loaded)
        narrow = ExactRecall(tiny.plain(), 0.5, exclude=["norm"])
        for foreign in (narrow, ExactRecall(tiny.plain(1), 0.5)):
            with self.assertRaises(MaskFileError):
                foreign.adopt(loaded)
            self.assertEqual(foreign.names, [])

    def test_rounded_values_are_the_exact_ones(self):
        model, tasks = self.trained(tasks=1)
        tasks.begin("1")
        tiny.train(model, ADAMW(tasks.parameters()), tiny.batches(2, seed=0))
        tasks.close(values="bfloat16")
        self.after.append(tiny.snapshot(model))
        self.assert_recalls(model, tasks)
        tasks.save(self.path)
        twin = tiny.plain()
        self.assert_recalls(twin, ExactRecall.load(self.path, twin))
        with self.assertRaisesRegex(ValueError, "int8"):
            tasks.close(values="int8")

    def test_a_removed_task_changes_no_other(self):
        _, tasks = self.trained()
        tasks.save(self.path)
        before = self.records()
        tasks.remove("1")
        tasks.save(self.path)
        self.assertEqual(self.records(), [before[0], before[2]])

    def records(self):
        with safe_open(self.path, framework="pt") as file:
            return json.loads(file.metadata()["tasks"])

    def test_size(self):
        """At most 6 bytes per own weight and 4 kB per task, whatever the share."""
        for sparsity in (0.001, 0.1, 0.6):
            tasks = ExactRecall(tiny.plain(width=128, depth=4), sparsity)
            tasks.begin("a")
            tasks.close()
            tasks.save(self.path)
            own = tasks.stats()["locked"]
            head = 4 * (128 * tiny.CLASSES + tiny.CLASSES)
            self.assertLessEqual(self.path.stat().st_size, head + 6 * own + 4096)
            self.assertLessEqual(4 * own, tasks.own_bytes())
            self.assertLessEqual(tasks.own_bytes(), self.path.stat().st_size)

    def test_two_hundred_tasks(self):
        tasks = ExactRecall(tiny.plain(), 0.01)
        for number in range(200):
            tasks.begin(str(number))
            tasks.close()
        start = time.perf_counter()
        tasks.save(self.path)
        twin = tiny.plain()
        loaded = ExactRecall.load(self.path, twin)
        for name in loaded.names:
            loaded.switch(name)
        self.assertLess(time.perf_counter() - start, 10)
        self.assert_same(loaded, tasks)

    def test_positions(self):
        """Long gaps, none, and both ends."""
        for total, flat in (
            (10, []),
            (10, [0, 9]),
            (400_000, [0, 65_535, 131_071, 399_999]),
            (400_000, [65_534, 65_536, 262_143]),
            (64, range(64)),
        ):
            flat = np.array(flat, dtype=np.int64)
            packed = taskfile._bytes(taskfile._packed(flat, total))
            self.assertTrue(np.array_equal(taskfile._unpacked(packed, total), flat))

    def test_an_open_task_is_not_saved(self):
        _, tasks = self.trained(tasks=1)
        tasks.begin("open")
        with self.assertRaisesRegex(RuntimeError, r"'open' is open: close\(\)"):
            tasks.save(self.path)
        self.assertFalse(self.path.exists())


class Export(Case):
    def test_a_pipeline_answers_as_before(self):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast, pipeline

        words = {f"w{i}": i for i in range(tiny.VOCABULARY)}
        plain = Tokenizer(models.WordLevel(words, unk_token="w1"))
        plain.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="w0")
        model, labels = tiny.roberta(), ["no", "maybe", "yes"]
        tasks = ExactRecall(model, 0.2)
        tasks.begin("task", labels)
        tiny.train(model, ADAMW(tasks.parameters(lr=0.1)), tiny.batches(4, seed=0))
        tasks.close()
        inputs = tokenizer("w3 w5 w7", return_tensors="pt", return_token_type_ids=False)
        scores = model.eval()(**inputs).logits.softmax(-1)[0]
        tasks.switch(None)
        exported = tasks.export("task")
        exported.save_pretrained(self.folder / "exported")
        answer = pipeline("text-classification", str(self.folder / "exported"), tokenizer=tokenizer)
        (found,) = answer("w3 w5 w7")
        self.assertEqual(found["label"], labels[int(scores.argmax())])
        self.assertAlmostEqual(found["score"], float(scores.max()), places=6)


class Refused(Case):
    def refuse(self, pattern, model=None):
        model = tiny.plain() if model is None else model
        before = tiny.snapshot(model)
        with self.assertRaisesRegex(MaskFileError, pattern):
            ExactRecall.load(self.path, model)
        self.assertFalse(any(c.any() for c in tiny.changed(model, before).values()))

    def test_another_base(self):
        model, tasks = self.trained()
        tasks.save(self.path)
        self.refuse("another base.*Load the backbone", tiny.plain(1))
        self.refuse("another base", tiny.unhooked_copy(model))  # it is a task's model
        other = tiny.plain()
        with torch.no_grad():
            other.embed.weight[3, 4] += 1.0
        self.refuse(r"another base: embed\.weight of", other)
        self.refuse("bfloat16.*float32", tiny.plain().to(torch.bfloat16))
        self.refuse(r"blocks\.1\.", tiny.plain(depth=1))
        other = tiny.plain()
        other.classifier = torch.nn.Sequential(other.classifier)
        self.refuse("the head is another one", other)

    def test_files_of_other_kinds(self):
        self.locked().save(self.path)
        self.refuse("not a file written by ExactRecall")
        self.path.write_bytes(b"no safetensors")
        self.refuse("no safetensors file")
        with self.assertRaises(FileNotFoundError):
            ExactRecall.load(self.folder / "missing", tiny.plain())

    def test_missing_garbled_or_changed_parts(self):
        """With every digest as it would have to be, so that nothing else refuses them."""
        _, tasks = self.trained(tasks=2)
        tasks.save(self.path)
        with safe_open(self.path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(self.path)
        changes = [lambda t, m, k=k: m.pop(k) for k in metadata]
        garbled = metadata.keys() - {"digest"}
        changes += [lambda t, m, k=k: m.update({k: "{]"}) for k in garbled]
        changes += [lambda t, m, k=k: t.pop(k) for k in tensors]
        changes += [lambda t, m, k=k: t.update({k: t[k].flatten()[:-1]}) for k in tensors]
        changes += [
            lambda t, m: m.update(version="3"),
            lambda t, m: t.update({"7.positions": t["0.positions"].clone()}),
            lambda t, m: t.update({"0.positions": _gaps([1] * 5000)}),
            lambda t, m: t.update(base=taskfile._bytes(zlib.compress(b"[]"))),
            lambda t, m: m.update(tasks=m["tasks"].replace('"name":"1"', '"name":"0"')),
            lambda t, m: m.update(settings=json.dumps({"sparsity": 2.0})),
        ]
        for number, change in enumerate(changes):
            with self.subTest(number):
                other, about = dict(tensors), dict(metadata)
                change(other, about)
                save_file(other, self.path, metadata=_with_digests(other, about))
                self.refuse("tasks.safetensors")

    def test_damaged_bytes(self):
        """What loads is what was saved, to the last bit."""
        _, tasks = self.trained()
        tasks.save(self.path)
        data, generator, loaded = self.path.read_bytes(), random.Random(0), 0
        header = 8 + int.from_bytes(data[:8], "little")
        for _ in range(200):
            self.path.write_bytes(damaged(data, generator, header=header))
            model = tiny.plain()
            before = tiny.snapshot(model)
            try:
                self.assert_same(ExactRecall.load(self.path, model), tasks)
                loaded += 1
            except MaskFileError:
                pass
            self.assertFalse(any(c.any() for c in tiny.changed(model, before).values()))
        self.assertLess(loaded, 20)  # some change nothing: a digit by itself


def _gaps(numbers):
    return taskfile._bytes(b"g" + np.array(numbers, dtype="<u2").tobytes())


def _with_digests(tensors, metadata):
    """The metadata with digests that fit, as far as it can be read."""
    try:
        records = json.loads(metadata["tasks"])
        for number, record in enumerate(records):
            key = f"{number}."
            own = {k.removeprefix(key): t for k, t in tensors.items() if k.startswith(key)}
            record.pop("digest")
            record["digest"] = maskfile.digest(own, record)
        metadata["tasks"] = json.dumps(records, separators=(",", ":"))
        metadata.pop("digest")
        metadata["digest"] = maskfile.digest({"base": tensors["base"]}, metadata)
    except (KeyError, ValueError):
        pass
    return metadata
