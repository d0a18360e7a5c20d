"""The task bank: learning, predictions, its folder, and old tasks that do not change."""

import copy
import json
import random
import subprocess
import sys
import tempfile
import threading
import unittest
from functools import cache
from itertools import chain
from pathlib import Path
from unittest import mock

import tiny
import torch
from tiny_backbones import write_backbones
from transformers import TrainerCallback

from bitstack_nb import TaskBank, bankfiles
from bitstack_nb.examples import read_examples
from bitstack_nb.guard import LockedWeightsMoved

COLOURS, SKY, WEATHER = ["red", "green"], ["sun", "moon", "blue"], ["rain", "snow", "wind"]
TEXTS = ["red rain", "green snow wind", "sun", "moon rain rain . wind", "blue"]
TASKS = {"colours": COLOURS, "sky": SKY, "weather": WEATHER}

ANSWER = """
import json, sys
from bitstack_nb import TaskBank

bank = TaskBank.from_pretrained(sys.argv[1])
assert bank.verify() == 0
texts = json.loads(sys.argv[2])
answers = {task: bank.predict(texts, task=task, top_k=None) for task in bank.tasks}
print(json.dumps({"answers": answers, "digests": bank.digests}))
"""


@cache
def backbones() -> dict[str, Path]:
    folder = tempfile.TemporaryDirectory()
    backbones.folder = folder  # until the process ends
    return write_backbones(Path(folder.name))


def rows(words: list[str], count: int = 24, *, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of the words of all tasks and the label, the one word of ``words`` in them."""
    generator, made = random.Random(seed), []
    for _ in range(count):
        own = generator.choice(words)
        others = [word for word in ["rain", "snow", "wind", "."] if word not in words]
        text = [own, *generator.choices(others, k=generator.randint(1, 4))]
        made.append((" ".join(text), f"it is {own}"))
    return made


def learn(bank: TaskBank, name: str, words: list[str] | None = None, **settings):
    settings = {"epochs": 1, "progress": False} | settings
    return bank.learn(name, rows(words or TASKS[name]), **settings)


def new_bank(architecture: str = "bert", **settings) -> TaskBank:
    return TaskBank.from_pretrained(backbones()[architecture], sparsity=0.05, **settings)


@cache
def shared_bank() -> TaskBank:
    bank = new_bank()
    for name in ("colours", "sky"):
        learn(bank, name)
    return bank


class BankCase(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))

    @property
    def bank(self) -> TaskBank:
        """Two tasks; a test that changes the bank makes its own."""
        return shared_bank()

    def saved(self, bank: TaskBank | None = None, **how) -> Path:
        (bank or self.bank).save_pretrained(self.folder / "bank", **how)
        return self.folder / "bank"

    def answers(self, bank: TaskBank) -> dict:
        return {task: bank.predict(TEXTS, task=task, top_k=None) for task in bank.tasks}


class OldTasks(BankCase):
    def test_three_more_tasks_one_removed_and_a_new_process(self):
        bank = new_bank()
        learn(bank, "colours", eval_dataset=rows(COLOURS, 8, seed=1))
        learn(bank, "gone", ["blue", "."])
        before, digests = self.answers(bank), bank.digests
        removed = bank.recall._tasks["gone"]
        for name in ("sky", "weather", "more"):
            learn(bank, name, TASKS.get(name, COLOURS))
            self.assertEqual(self.answers(bank) | before, self.answers(bank))
        bank.remove("gone")
        del before["gone"], digests["gone"]
        self.assertEqual(bank.digests | digests, bank.digests)
        folder = self.saved(bank)
        command = [sys.executable, "-c", ANSWER, str(folder), json.dumps(TEXTS)]
        done = subprocess.run(
            command, check=True, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE
        )
        found = json.loads(done.stdout)
        self.assertEqual(found, {"answers": self.answers(bank), "digests": bank.digests})
        self.assertEqual(found["answers"] | before, found["answers"])
        self.assert_nothing_left(folder, removed)

    def assert_nothing_left(self, folder, removed):
        """No file of the folder has a name, label, digest or tensor of the task."""
        tensors = [*removed.own.values, *removed.head.state_dict().values(), *removed.kept.values()]
        parts = [t.detach().cpu().numpy().tobytes() for t in tensors if t.numel() > 3 and t.any()]
        parts += [b"gone", b"it is .", removed.digest[:12].encode()]
        for file in folder.rglob("*"):
            content = file.read_bytes()
            self.assertFalse(file.name != "README.md" and b"gone" in content, file)
            for part in parts:
                self.assertNotIn(part, content, file)

    def test_verify_finds_a_changed_task_that_is_not_shown(self):
        bank = new_bank()
        learn(bank, "colours")
        with torch.no_grad():
            bank.recall._tasks["colours"].head.parts["classifier"].bias[0] += 1
        with self.assertRaisesRegex(LockedWeightsMoved, "task 'colours'"):
            bank.verify()

    def test_a_failed_or_interrupted_learn_changes_nothing(self):
        class Stop(TrainerCallback):
            def on_step_end(self, *_, **__):
                raise KeyboardInterrupt

        bank = new_bank()
        learn(bank, "colours")
        before, model, random_state = (
            self.answers(bank),
            tiny.snapshot(bank.model),
            torch.get_rng_state(),
        )
        failures = [
            ({"callbacks": [Stop()]}, KeyboardInterrupt, ""),
            ({"lr": 1e30, "epochs": 4}, ValueError, "'sky': training has diverged"),
            ({"eval_dataset": rows(COLOURS)}, ValueError, "eval_dataset has the label 'it is "),
            ({"max_length": 1}, ValueError, "leaves no room"),
        ]
        for settings, error, message in failures:
            with self.assertRaisesRegex(error, message):
                learn(bank, "sky", **settings)
            self.assertEqual(self.answers(bank), before)
            self.assertFalse(any(c.any() for c in tiny.changed(bank.model, model).values()))
        self.assertTrue(torch.equal(torch.get_rng_state(), random_state))
        learn(bank, "sky")
        self.assertEqual(bank.verify(), 0)
        self.assertEqual(self.answers(bank) | before, self.answers(bank))


class Learning(BankCase):
    def test_every_architecture(self):
        for name in backbones():
            with self.subTest(name):
                bank = new_bank(name)
                found = learn(bank, "sky", eval_dataset=rows(SKY, 8), epochs=2)
                self.assertEqual(found["texts"], 24)
                self.assertIn(found["epoch"], (1, 2))
                self.assertEqual(bank.evaluate("sky", rows(SKY, 8))["accuracy"], found["accuracy"])

    def test_a_fine_tuned_classifier_is_the_first_task(self):
        learn(taught := new_bank(), "colours")
        model, folder = taught.export("colours"), self.folder / "classifier"
        model.save_pretrained(folder)
        taught.tokenizer.save_pretrained(folder)
        bank = TaskBank.from_pretrained(folder, sparsity=0.05)
        with self.assertRaisesRegex(ValueError, "texts holds none"):
            bank.keep("colours", [])
        bank.keep("colours", [text for text, _ in rows(COLOURS)])
        before = bank.predict(TEXTS, task="colours", top_k=None)
        self.assertEqual(before, taught.predict(TEXTS, task="colours", top_k=None))
        learn(bank, "sky")
        loaded = TaskBank.from_pretrained(self.saved(bank))
        self.assertIn("| kept as it was | - |", (self.folder / "bank/README.md").read_text())
        for each in (bank, loaded):
            self.assertEqual(each.tasks["colours"], ["it is green", "it is red"])
            self.assertEqual(each.predict(TEXTS, task="colours", top_k=None), before)
            self.assertEqual(each.evaluate("colours", rows(COLOURS))["texts"], 24)
            self.assertEqual({a["task"] for a in each.route(TEXTS)} - {"colours", "sky"}, set())
            self.assertEqual(each.verify(), 0)
        with self.assertRaisesRegex(ValueError, "keep comes before learn"):
            bank.keep("more", TEXTS)
        with self.assertRaisesRegex(ValueError, "is a backbone, not a fine-tuned classifier"):
            new_bank().keep("colours", TEXTS)

    def test_arguments_of_ones_own(self):
        """Half precision leaves a wrapped forward behind; answers stay those of a new process."""
        from transformers import TrainingArguments

        bank = new_bank()
        settings = {"bf16": True, "optim": "adafactor", "num_train_epochs": 1, "use_cpu": True}
        settings |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        args = TrainingArguments(output_dir=str(self.folder), **settings)
        found = bank.learn("sky", rows(SKY), eval_dataset=rows(SKY, 8), args=args)
        self.assertEqual((found["epoch"], args.eval_strategy), (1, "no"))
        again = TaskBank.from_pretrained(self.saved(bank))
        self.assertEqual(self.answers(again), self.answers(bank))

    def test_pairs(self):
        bank = new_bank("roberta")
        data = {
            "question": [text for text, _ in rows(SKY)],
            "passage": [text for text, _ in rows(COLOURS)],
            "label": [0, 1] * 12,
        }
        text = ("question", "passage")
        bank.learn("pairs", data, text=text, labels=["no", "yes"], epochs=1, progress=False)
        learn(bank, "sky")
        (one,) = bank.predict([("red", "sun")], task="pairs")
        self.assertIn(one["label"], ("no", "yes"))
        self.assertEqual(bank.predict({"text": "red", "text_pair": "sun"}, task="pairs"), [one])
        self.assertEqual(bank.evaluate("pairs", data)["texts"], 24)
        self.assertEqual(len(bank.predict([("red", "sun"), "moon"])), 2)
        with self.assertRaisesRegex(ValueError, r"pairs \(question, passage\), but got 'red'"):
            bank.predict("red", task="pairs")


class Answers(BankCase):
    def test_as_a_pipeline(self):
        from transformers import pipeline

        exported = self.bank.export("sky")
        for how in ({}, {"top_k": None}, {"top_k": 2}):
            answer = pipeline("text-classification", exported, tokenizer=self.bank.tokenizer)
            for texts in (TEXTS, TEXTS[0]):
                expected, found = answer(texts, **how), self.bank.predict(texts, task="sky", **how)
                nested = how and not isinstance(texts, str)
                flat = [chain(*each) if nested else each for each in (expected, found)]
                for one, other in zip(*flat, strict=True):
                    self.assertEqual((other["task"], other["label"]), ("sky", one["label"]))
                    self.assertAlmostEqual(other["score"], one["score"], places=5)

    def test_mixed_requests_keep_their_order(self):
        texts, tasks = TEXTS * 3, [None, "sky", "colours"] * 5
        found = self.bank.predict(texts, task=tasks, batch_size=2)
        for text, task, answer in zip(texts, tasks, found, strict=True):
            (alone,) = self.bank.predict(text, task=task)
            self.assertEqual((alone["task"], alone["label"]), (answer["task"], answer["label"]))
            self.assertAlmostEqual(alone["score"], answer["score"], places=5)

    def test_threads(self):
        """Each gets the answers of its task, also while another task is learnt."""
        bank = new_bank()
        for name in ("colours", "sky"):
            learn(bank, name)
        expected, wrong = self.answers(bank), []

        def ask(task: str) -> None:
            for _ in range(5):
                if bank.predict(TEXTS, task=task, top_k=None) != expected[task]:
                    wrong.append(task)

        threads = [threading.Thread(target=ask, args=(task,)) for task in [*expected] * 3]
        threads.append(threading.Thread(target=learn, args=(bank, "weather")))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual((wrong, len(bank.tasks)), ([], 3))

    def test_what_cannot_be_answered_is_one_line(self):
        cases = [
            (lambda: new_bank().predict("red"), "the bank is empty"),
            (lambda: self.bank.predict("red", task="news"), "no task 'news': .*'colours', 'sky'"),
            (lambda: self.bank.predict(["red", None]), "text 1 is None, expected a string"),
            (lambda: self.bank.predict(["red"], task=["sky", "sky"]), "1 texts, but 2 tasks"),
            (lambda: self.bank.remove("news"), "no task 'news'"),
            (lambda: self.bank.evaluate("news", rows(SKY)), "no task 'news'"),
            (lambda: learn(self.bank, "sky"), "a task 'sky' already"),
        ]
        for call, message in cases:
            with self.subTest(message), self.assertRaisesRegex(ValueError, message) as caught:
                call()
            self.assertNotIn("\n", str(caught.exception))
        self.assertEqual(self.bank.predict([]), [])
        with self.assertRaisesRegex(TypeError, "save_pretrained"):
            copy.deepcopy(self.bank)


class Routing(BankCase):
    def test_texts_of_unknown_task(self):
        test = {"colours": rows(COLOURS, seed=1), "sky": rows(SKY, seed=1)}
        for name, texts in test.items():
            known, chosen = (self.bank.evaluate(name, texts, chosen=c) for c in (False, True))
            self.assertGreater(chosen["routed"], 0.6)
            self.assertLessEqual(chosen["accuracy"], chosen["routed"])
            self.assertGreaterEqual(known["accuracy"], 0)
            self.assertEqual({c["task"] for c in self.bank.route(["snow"] * 3)} - {*test}, set())
        with self.assertRaisesRegex(ValueError, "unknown is 5, expected a share"):
            self.bank.predict(TEXTS, unknown=5)
        answers = self.bank.predict(TEXTS, unknown=1.0)
        nothing = {"task": None, "label": None, "score": 0.0}
        self.assertIn(nothing, answers)

    def test_removing_a_task_drops_its_part(self):
        bank = new_bank()
        learn(bank, "colours")
        learn(bank, "sky")
        expected = bank.route(TEXTS)
        learn(bank, "weather")
        bank.remove("weather")
        self.assertEqual(bank.route(TEXTS), expected)


class Folder(BankCase):
    def test_the_base_included(self):
        folder = self.saved(include_base=True)
        bank = TaskBank.from_pretrained(folder)
        self.assertEqual(self.answers(bank), self.answers(self.bank))
        (backbones()["bert"] / "x").touch()
        self.assertTrue(json.loads((folder / "bank.json").read_text())["base"]["included"])

    def test_another_base_is_refused_by_name(self):
        folder = self.saved()
        with self.assertRaisesRegex(ValueError, "another base|does not fit") as caught:
            TaskBank.from_pretrained(folder, base=backbones()["roberta"])
        self.assertIn("bert", str(caught.exception))
        self.assertIn("roberta", str(caught.exception))
        other = new_bank("roberta")
        with self.assertRaisesRegex(ValueError, "holds a bank on another base"):
            other.save_pretrained(folder)
        with self.assertRaisesRegex(ValueError, "roberta cannot adopt that on .*bert"):
            other.adopt(self.bank)

    def test_adopt(self):
        one, other = new_bank(), new_bank()
        learn(one, "weather")
        learn(other, "sky")
        learn(other, "colours")
        answers = self.answers(one) | self.answers(other)
        one.adopt(other)
        other.remove("sky")
        self.assertEqual((list(one.tasks), one.verify()), (["weather", "sky", "colours"], 0))
        self.assertEqual(self.answers(one), answers)
        with self.assertRaisesRegex(ValueError, "both have a task 'colours'"):
            one.adopt(other)
        self.assertEqual(self.answers(TaskBank.from_pretrained(self.saved(one))), answers)

    def test_damaged_or_missing_files(self):
        folder = self.saved()
        tasks = '{"format": "bitstack-bank", "max_length": 9, "base": {}, "tasks": ["name"]}'
        for content in (tasks, "{", "[]", "{}", '{"format": "bitstack-bank", "base": {}}'):
            whole = (folder / "bank.json").read_text()
            (folder / "bank.json").write_text(content)
            with self.assertRaisesRegex(ValueError, "bank.json is damaged"):
                TaskBank.from_pretrained(folder)
            (folder / "bank.json").write_text(whole)
        (folder / "bank.safetensors").write_bytes(b"junk")
        with self.assertRaisesRegex(ValueError, "bert cannot be loaded with .*cut short"):
            TaskBank.from_pretrained(folder)
        with self.assertRaisesRegex(ValueError, "no bank.json and no config.json"):
            TaskBank.from_pretrained(self.folder)

    def test_a_save_that_fails_at_any_step(self):
        """The folder has the tasks of before or those of after."""
        bank = new_bank()
        learn(bank, "colours")
        folder, before = self.saved(bank), bank.digests
        learn(bank, "sky")
        steps = ("_write", "_beside", "_record"), ("save", "_check_heads")
        for where, names in zip((bankfiles, type(bank.recall)), steps, strict=True):
            for name in names:
                with mock.patch.object(where, name, side_effect=OSError("disk full")):
                    with self.assertRaisesRegex(OSError, "disk full"):
                        self.saved(bank)
                found = TaskBank.from_pretrained(folder)
                self.assertIn(found.digests, (before, bank.digests))
                self.assertEqual(found.verify(), 0)
                self.assertEqual([f.name for f in folder.iterdir() if f.name[0] == "."], [])
        self.assertEqual(TaskBank.from_pretrained(self.saved(bank)).digests, bank.digests)

    def test_the_card(self):
        card = self.saved() / "README.md"
        self.assertIn("| sky | it is blue, it is moon, it is sun | 24 texts |", card.read_text())
        card.write_text("my own page")
        self.saved()
        self.assertEqual(card.read_text(), "my own page")


class ExamplesOfAnyKind(unittest.TestCase):
    def read(self, data, **how):
        found = read_examples(data, **how)
        return found.texts, found.labels, found.names

    def test_kinds(self):
        import pandas
        from datasets import ClassLabel, Dataset, Features, Value

        columns = {"text": ["a", "b", "c"], "label": ["no", "yes", "no"]}
        expected = (["a", "b", "c"], [0, 1, 0], ["no", "yes"])
        named = Features({"sentence": Value("string"), "kind": ClassLabel(names=["no", "yes"])})
        plain = {"sentence": columns["text"], "kind": [0, 1, 0]}
        for data in (
            columns,
            [*zip(*columns.values(), strict=True)],
            [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
            pandas.DataFrame(columns),
            Dataset.from_dict(columns),
            Dataset.from_dict(plain, features=named),
            Dataset.from_dict(plain, features=named).to_iterable_dataset(),
        ):
            self.assertEqual(self.read(data), expected)
        self.assertEqual(self.read(plain | {"id": [1, 2, 3]}, label="kind")[2], ["0", "1"])
        self.assertEqual(self.read(plain, label="kind", names=["no", "yes"]), expected)
        self.assertEqual(
            self.read({"text": ["a"] * 3, "label": [10, 9, 10.0]})[1:], ([1, 0, 1], ["9", "10"])
        )
        self.assertEqual(
            self.read([(("a", "b"), True), (["c", "d"], False)])[0], [("a", "b"), ("c", "d")]
        )

    def test_errors(self):
        rows = [("a", "no"), ("b", "yes")]
        cases = [
            ([], {}, "train holds no rows"),
            (3, {}, "train is int, expected"),
            ([1, 2], {}, "neither mappings nor tuples"),
            ({"a": ["x"], "b": ["y"]}, {}, "columns a, b: name the one of the labels, label="),
            ({"a": ["x"], "b": ["y"], "label": [0]}, {}, r"the texts \(or two for pairs\), text="),
            (rows, {"text": "body"}, "no column 'body', only text, label"),
            (rows, {"text": ("a", "b", "c")}, "no column 'a'"),
            ([("a", "no"), (None, "yes")], {}, "text 1 of train is None, expected a string"),
            ([("a", 0), ("b", -1)], {}, "label 1 of train is -1, .*leave such rows out"),
            ([("a", "no"), ("b", None)], {}, "label 1 of train is None"),
            ([("a", "no"), (("b", "c"), "yes")], {}, "pairs and single texts"),
            (rows, {"names": ["no", "maybe"]}, "the label 'yes', expected one of no, maybe"),
            ([("a", 0), ("b", 5)], {"names": ["no", "yes"]}, "the label 5, expected"),
        ]
        for data, how, message in cases:
            with self.subTest(message), self.assertRaisesRegex(ValueError, message) as caught:
                read_examples(data, **how)
            self.assertNotIn("\n", str(caught.exception))


if __name__ == "__main__":
    unittest.main()
