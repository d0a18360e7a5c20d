"""TaskBank: many text classifiers on one backbone, in one file. A new task changes no old one.

A thin class over ``ExactRecall`` (own weights and heads of the tasks), a tokenizer and the
transformers ``Trainer``. ``examples`` reads texts and labels, ``router`` chooses a text's task, and
``bankfiles`` is the folder of a saved bank.
"""

from __future__ import annotations

import copy
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from bitstack_nb import bankfiles, router
from bitstack_nb.encoding import Encoder
from bitstack_nb.examples import Examples, Text, as_text, read_examples
from bitstack_nb.features import mean_pooled
from bitstack_nb.learning import (
    HEAD_LEARNING_RATE,
    LEARNING_RATE,
    default_arguments,
    train_open_task,
)
from bitstack_nb.pretrained import prepare
from bitstack_nb.recall import Diverged, ExactRecall
from bitstack_nb.rng import undisturbed_rng
from bitstack_nb.trainer import unwrap_forward

MAX_LENGTH = 256  # tokens, if the model has so many positions
BATCH_SIZE = 32  # texts that are answered at once
ROUTED = 1000  # texts of a task that the router learns from, at most


class TaskBank:
    """One backbone, and for each task a few own weights, a head and the names of its labels.

    Every method may be called from several threads; one at a time uses the model.

    Args:
        model: a ``...ForSequenceClassification`` of transformers, in float32. It is the base now:
            train and change it by this bank only.
        tokenizer: the model's.
        sparsity: share of the eligible weights that a task owns.
        max_length: tokens that a text is cut at. None takes 256, or what the model can read.
        name: of the backbone, a Hub name or a folder; ``from_pretrained`` fills it in.
        revision: the commit on the Hub, if the model does not know it.

    Attributes:
        model, tokenizer, max_length: as above.
        recall: the tasks, an ``ExactRecall``.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        *,
        sparsity: float = 0.01,
        max_length: int | None = None,
        name: str | None = None,
        revision: str | None = None,
    ) -> None:
        name = name or model.name_or_path or type(model).__name__
        revision = revision or getattr(model.config, "_commit_hash", None)
        prepare(model, tokenizer, name)
        recall = ExactRecall(model.eval(), sparsity)
        self._fill(recall, model, tokenizer, max_length, {"name": name, "revision": revision})

    def _fill(
        self,
        recall: ExactRecall,
        model: transformers.PreTrainedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        max_length: int | None,
        base: dict[str, Any],
    ) -> None:
        self.recall, self.model, self.tokenizer, self.base = recall, model, tokenizer, base
        self._encoder = Encoder(model, tokenizer)
        self.max_length = min(MAX_LENGTH, self._encoder.limit)
        self.max_length = self._length(max_length)
        self._lock = threading.RLock()
        self._routers: dict[bool, router.Router] = {}  # of tasks that read pairs, and of others
        self._measured: dict[str, dict[str, float]] = {}  # by task, what evaluate() found

    def _length(self, max_length: int | None) -> int:
        """A number of tokens to cut texts at, the bank's if there is none given."""
        if max_length is None:
            return self.max_length
        limit = self._encoder.limit
        if not isinstance(max_length, int) or not 1 <= max_length <= limit:
            raise ValueError(f"max_length is {max_length!r}, expected 1 to {limit} tokens")
        return max_length

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        base: str | Path | None = None,
        revision: str | None = None,
        sparsity: float = 0.01,
        max_length: int | None = None,
        device: str | torch.device | None = None,
    ) -> TaskBank:
        """A saved bank, or an empty one on a pretrained backbone.

        Args:
            name: a folder or a Hub name, of a bank or of a backbone. The backbone ``tiny-gpt2`` is
                in the package.
            base: where a saved bank's backbone is, if not where it was.
            revision: the commit or branch on the Hub.
            sparsity, max_length: of a new bank; a saved one keeps its own.
            device: where the model is put; None takes a GPU if there is one.

        Raises:
            ValueError: there is no such bank or backbone, a file is damaged, or the backbone is
                another one than the saved bank's.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model, tokenizer, saved = bankfiles.load(str(name), base=base, revision=revision)
        model.to(device).eval()
        if saved.record is None:
            return cls(model, tokenizer, sparsity=sparsity, max_length=max_length, **saved.base)
        bank = cls.__new__(cls)
        recall = bankfiles.load_tasks(saved, model)
        bank._fill(recall, model, tokenizer, saved.record["max_length"], saved.base)
        kept = {task["name"]: task for task in saved.record["tasks"]}
        for task, digest in recall.digests.items():
            if kept.get(task, {}).get("digest") == digest:  # not of another of this name
                bank._measured[task] = kept[task]["measured"]
        return bank

    # Tasks --------------------------------------------------------------------------------------

    @property
    def tasks(self) -> dict[str, list[str]]:
        """The names of the tasks, in the order of learning, and of their labels."""
        return {name: self._labels(name) for name in self.recall.names}

    def _labels(self, name: str) -> list[str]:
        return list(self.recall.labels(name) or self.recall.notes(name)["labels"])

    @property
    def digests(self) -> dict[str, str]:
        """By task the digest of its own weights, its head, its labels and its router part."""
        return self.recall.digests

    def verify(self) -> int:
        """Check that the base and every task are bit for bit what they were; 0.

        Raises:
            LockedWeightsMoved: some moved; the message says which.
        """
        with self._lock:
            return self.recall.verify()

    def remove(self, name: str) -> None:
        """Forget a task; no file saved from now on has anything of it."""
        with self._lock:
            self._check_known(name)
            self.recall.remove(name)
            self._measured.pop(name, None)
            self._routers.clear()

    def adopt(self, other: TaskBank) -> None:
        """Take over copies of all tasks of another bank on the same backbone.

        Raises:
            ValueError: both have a task of one name, or the backbones differ. Nothing has changed.
        """
        with self._lock:
            try:
                self.recall.adopt(other.recall)
            except ValueError as error:
                both = f"the bank on {self.base['name']} cannot adopt that on {other.base['name']}"
                raise ValueError(f"{both}: {error}") from error
            self._measured |= copy.deepcopy(other._measured)
            self._routers.clear()

    def export(self, name: str) -> transformers.PreTrainedModel:
        """A plain copy of a task's model, with its head and label names, for any tool."""
        with self._lock:
            self._check_known(name)
            return self.recall.export(name)

    def to(self, device: str | torch.device) -> TaskBank:
        """Move the model to a device; tasks follow when they are used."""
        with self._lock:
            self.model.to(device)
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a TaskBank cannot be pickled or copied: use save_pretrained(folder) and "
            "TaskBank.from_pretrained(folder)"
        )

    def __repr__(self) -> str:
        return f"TaskBank({self.base['name']!r}, tasks: {', '.join(self.recall.names) or 'none'})"

    # Learning -----------------------------------------------------------------------------------

    def learn(
        self,
        name: str,
        train: Any,
        *,
        eval_dataset: Any = None,
        text: str | Sequence[str] | None = None,
        label: str | None = None,
        labels: Sequence[str] | None = None,
        args: TrainingArguments | None = None,
        epochs: float = 3,
        batch_size: int = 16,
        lr: float = LEARNING_RATE,
        head_lr: float = HEAD_LEARNING_RATE,
        max_length: int | None = None,
        seed: int | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        progress: bool = True,
    ) -> dict[str, float]:
        """Learn a new task. All others stay as they are, bit for bit.

        The head is trained alone first, on the frozen base. If learning fails or is interrupted,
        the bank is as it was.

        Args:
            name: of the task, a new one.
            train: a ``datasets.Dataset``, a mapping of columns, a pandas frame, or rows: mappings,
                or tuples of a text and a label.
            eval_dataset: the same, of other texts. The epoch that classifies most of them rightly
                is kept.
            text: the column of the texts, or two for pairs; None guesses it.
            label: the column of the labels; None guesses it.
            labels: their names in order, if the dataset does not name them.
            args: for the Trainer, in place of ``epochs`` and ``batch_size``. Its learning rate is
                not used.
            lr, head_lr: learning rates of the own weights and of the head. Own weights need a much
                higher one than full fine-tuning. The defaults were chosen with MiniLM-L6, five
                tasks and a sparsity of 1 %. A smaller share needs a higher rate.
            max_length: tokens that a text is cut at; the bank's if not given.
            seed: of the own weights, the head and the order of the texts.
            callbacks: for the Trainer.
            progress: show a progress bar.

        Returns:
            ``texts`` (how many), ``loss`` in training, and with ``eval_dataset`` the share of its
            texts that are classified rightly (``accuracy``) and the ``epoch`` that is kept.

        Raises:
            ValueError: the data or a setting cannot be used, or training diverged.
        """
        data = read_examples(train, text=text, label=label, names=labels)
        held = self._of_task(eval_dataset, data, "eval_dataset")
        length = self._length(max_length)
        with self._lock, undisturbed_rng(self.model.device), self._ends_on_base():
            rows = self._encoder.rows(data.texts, length, data.labels)
            held_rows = held and self._encoder.rows(held.texts, length, held.labels)
            order = torch.Generator().manual_seed(seed or 0)
            how = {"shuffle": True, "generator": order, "collate_fn": self._encoder.collate}
            loader = DataLoader(rows, batch_size, **how)
            self.recall.begin(name, data.names, loader=loader, seed=seed)
            part = self._part(data.texts, held and held.texts)
            with tempfile.TemporaryDirectory() as folder:
                given = {"epochs": epochs, "batch_size": batch_size, "progress": progress}
                given |= {"seed": seed or 0, "device": self.model.device}
                found = train_open_task(
                    self.recall,
                    self.model,
                    rows,
                    held=held_rows,
                    collate=self._encoder.collate,
                    args=args or default_arguments(folder, **given),
                    rates=(lr, head_lr),
                    callbacks=callbacks,
                )
            found = {"texts": len(rows), **found}
            (columns, column), about = data.columns, {"pairs": data.pairs, "max_length": length}
            notes = {"text": columns, "label": column, **about, **found}
            try:
                self.recall.close(kept=part._asdict(), notes=notes)
            except Diverged as error:
                why = "training has diverged (NaN or infinite weights)"
                raise ValueError(f"task {name!r}: {why}. Learn it with smaller rates") from error
            self._routers.clear()
        return found

    def keep(self, name: str, texts: Sequence[Text], *, max_length: int | None = None) -> None:
        """Make the classifier that the bank was made from its first task, as it is.

        For a classifier that is fine-tuned already: the task has its head, the names of its labels
        and its answers, bit for bit.

        Args:
            name: of the task.
            texts: some hundred of its texts, without labels, which the router learns from.
            max_length: tokens that a text is cut at; the bank's if not given.

        Raises:
            ValueError: the model has no trained head, the bank has tasks already, or a text is no
                string or pair.
        """
        model, length = self.model, self._length(max_length)
        if type(model).__name__ not in (model.config.architectures or []):
            raise ValueError(
                f"{self.base['name']} is a backbone, not a fine-tuned classifier, so there is no "
                "head to keep: learn(name, train) adds a task. A classifier that you have just "
                "trained has to be saved (save_pretrained) and loaded from there first"
            )
        items = [as_text(text, f"text {number}") for number, text in enumerate(texts)]
        if not items or len({type(item) for item in items}) > 1:
            raise ValueError("texts holds none, or pairs beside single texts: give one kind")
        with self._lock, undisturbed_rng(model.device), self._ends_on_base():
            if self.recall.names:
                known = ", ".join(self.tasks)
                raise ValueError(f"keep comes before learn, but the bank has {known}")
            self.recall.begin(name)
            about = {"pairs": isinstance(items[0], tuple), "max_length": length}
            labels = [model.config.id2label[number] for number in range(model.config.num_labels)]
            notes = {"text": None, "label": None, **about, "texts": len(items), "labels": labels}
            self.recall.close(kept=self._part(items, None)._asdict(), notes=notes)
            self._routers.clear()

    @contextmanager
    def _ends_on_base(self) -> Iterator[None]:
        """After the block the model is the base, in evaluation mode, and no task is open."""
        if self.recall.is_open:  # in a callback of the Trainer
            raise RuntimeError("the bank is learning a task: wait until it is learnt")
        try:
            yield
        finally:
            if self.recall.is_open:
                self.recall.abandon()
            self.recall.switch(None)
            unwrap_forward(self.model)
            self.model.eval()

    def _of_task(self, data: Any, task: Examples, what: str) -> Examples | None:
        """Other examples of a task that is learnt from ``task``."""
        if data is None:
            return None
        text, label = task.columns
        found = read_examples(data, text=text, label=label, names=task.names, what=what)
        if found.pairs != task.pairs:
            raise ValueError(f"{what} has {'pairs' if found.pairs else 'single texts'}, train not")
        return found

    # Answers ------------------------------------------------------------------------------------

    def predict(
        self,
        texts: Text | Mapping[str, str] | Sequence[Text | Mapping[str, str]],
        *,
        task: str | Sequence[str | None] | None = None,
        top_k: int | None = 1,
        batch_size: int = BATCH_SIZE,
        unknown: float = 0.0,
    ) -> list[Any]:
        """Labels and probabilities, as a text-classification pipeline gives them, and the task.

        Args:
            texts: strings. A pair is a tuple of two, or ``{"text": ..., "text_pair": ...}``.
            task: of all texts, or one for each of them; None lets the bank choose.
            top_k: how many labels of a text; None gives all.
            batch_size: texts at once. Texts of a task are sorted by length for it.
            unknown: share of a task's own texts that may count as texts of no task, as 0.05. Where
                the bank chooses, such a text gets task None, label None and score 0. At 0 every
                text gets a task.

        Returns:
            In the order of the texts ``{"task": ..., "label": ..., "score": ...}`` each, or a list
            of such where ``top_k`` is not 1. One text is a list of one, as in a pipeline.

        Raises:
            ValueError: the bank is empty, there is no such task, or a text is no string or pair.
        """
        single = isinstance(texts, str | Mapping)
        items = [as_text(t, f"text {n}") for n, t in enumerate([texts] if single else texts)]
        answers: list[Any] = [None] * len(items)
        with self._lock:
            for name, numbers in self._by_task(items, task, unknown).items():
                found = self._answers(name, [items[n] for n in numbers], top_k, batch_size)
                for number, answer in zip(numbers, found, strict=True):
                    answers[number] = answer
        return answers[0] if single and top_k != 1 else answers

    def route(self, texts: Sequence[Text], *, unknown: float = 0.0) -> list[dict[str, Any]]:
        """The task of each text, as ``predict`` chooses it, and the probability of that task."""
        items = [as_text(text, f"text {n}") for n, text in enumerate(texts)]
        with self._lock:
            return [choice._asdict() for choice in self._choices(items, unknown)]

    def features(self, texts: Sequence[Text]) -> torch.Tensor:
        """What the router sees of texts or of pairs: ``[texts, size]``, mean-pooled on the base."""
        with self._lock:
            rows = self._encoder.rows(texts, self.max_length)
            order, batches = self._encoder.batches(rows, BATCH_SIZE)
            with self.recall.using(None) as model:
                return mean_pooled(model, batches).cpu()[order.argsort()]

    def evaluate(
        self,
        name: str,
        test: Any,
        *,
        text: str | Sequence[str] | None = None,
        label: str | None = None,
        chosen: bool = False,
        batch_size: int = BATCH_SIZE,
    ) -> dict[str, float]:
        """The share of labelled texts that a task classifies rightly.

        Args:
            name: of the task.
            test: examples, as for ``learn``.
            text, label: their columns, if they are not those of ``learn``.
            chosen: let the bank choose the task of each text. A text counts as right if its task
                and its label are; ``routed`` is the share whose task is.
            batch_size: texts at once.

        Returns:
            ``texts`` (how many), ``accuracy``, and ``routed`` if ``chosen``.
        """
        with self._lock:
            self._check_known(name)
            notes, names = self.recall.notes(name), self._labels(name)
            text, label = text or notes["text"], label or notes["label"]
            data = read_examples(test, text=text, label=label, names=names, what="test")
            task = None if chosen else name
            answers = self.predict(data.texts, task=task, batch_size=batch_size)
            tasks = [answer["task"] == name for answer in answers]
            right = sum(
                own and answer["label"] == names[number]
                for own, answer, number in zip(tasks, answers, data.labels, strict=True)
            )
            found = {"texts": len(answers), "accuracy": right / len(answers)}
            if chosen:
                return {**found, "routed": sum(tasks) / len(tasks)}
            self._measured[name] = found
            return found

    def measured(self, name: str) -> dict[str, float]:
        """What :meth:`evaluate` found last for a task."""
        return dict(self._measured.get(name, {}))

    def _by_task(
        self, items: Sequence[Text], task: str | Sequence[str | None] | None, unknown: float
    ) -> dict[str | None, list[int]]:
        """The numbers of the texts by their task."""
        if not self.recall.names:
            raise ValueError("the bank is empty: learn(name, train) adds a task")
        tasks = [task] * len(items) if task is None or isinstance(task, str) else list(task)
        if len(tasks) != len(items):
            raise ValueError(f"there are {len(items)} texts, but {len(tasks)} tasks")
        for name in dict.fromkeys(tasks):
            if name is not None:
                self._check_known(name)
        if free := [number for number, name in enumerate(tasks) if name is None]:
            choices = self._choices([items[number] for number in free], unknown)
            for number, choice in zip(free, choices, strict=True):
                tasks[number] = choice.task
        found: dict[str | None, list[int]] = {}
        for number, name in enumerate(tasks):
            found.setdefault(name, []).append(number)
        return found

    def _answers(
        self, name: str | None, texts: Sequence[Text], top_k: int | None, batch_size: int
    ) -> list[Any]:
        if name is None:
            nothing = {"task": None, "label": None, "score": 0.0}
            return [dict(nothing) if top_k == 1 else [dict(nothing)] for _ in texts]
        scores = self._scores(name, texts, batch_size)
        labels, answers = self._labels(name), []
        best = scores.topk(min(top_k or len(labels), len(labels)), dim=1)
        for values, places in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            found = [
                {"task": name, "label": labels[place], "score": score}
                for score, place in zip(values, places, strict=True)
            ]
            answers.append(found[0] if top_k == 1 else found)
        return answers

    @torch.no_grad()
    def _scores(self, name: str, texts: Sequence[Text], batch_size: int) -> torch.Tensor:
        """Probabilities of a task's labels: float32 ``[texts, labels]`` on the CPU."""
        notes = self.recall.notes(name)
        for text in texts:
            if isinstance(text, tuple) != notes["pairs"]:
                columns = f" ({', '.join(notes['text'])})" if notes["text"] else ""
                kind = f"pairs{columns}" if notes["pairs"] else "single texts"
                raise ValueError(f"task {name!r} reads {kind}, but got {text!r:.60}")
        rows = self._encoder.rows(texts, notes["max_length"])
        order, batches = self._encoder.batches(rows, batch_size)
        training = self.model.training
        with self.recall.using(name) as model:
            model.eval()
            found = [model(**batch).logits.float().softmax(1).cpu() for batch in batches]
            model.train(training)
        return torch.cat(found)[order.argsort()]

    # Which task is a text of? -------------------------------------------------------------------

    def _choices(self, texts: Sequence[Text], unknown: float) -> list[router.Choice]:
        """The task of each text, among those that read pairs for a pair, else among the others."""
        choices: dict[int, router.Choice] = {}
        for pairs in (False, True):
            numbers = [n for n, text in enumerate(texts) if isinstance(text, tuple) == pairs]
            if numbers:
                features = self.features([texts[number] for number in numbers])
                found = self._router(pairs).choose(features, unknown=unknown)
                choices |= zip(numbers, found, strict=True)
        return [choices[number] for number in range(len(texts))]

    def _router(self, pairs: bool) -> router.Router:
        if pairs not in self._routers:
            names = [n for n in self.recall.names if self.recall.notes(n)["pairs"] == pairs]
            if not names:
                kind = "pairs" if pairs else "single texts"
                raise ValueError(f"no task of the bank reads {kind}")
            parts = {name: router.Part(**self.recall.kept(name)) for name in names}
            self._routers[pairs] = router.Router(parts)
        return self._routers[pairs]

    def _part(self, texts: Sequence[Text], held: Sequence[Text] | None) -> router.Part:
        """A new task's part of the router, from at most so many texts."""

        def some(texts: Sequence[Text]) -> torch.Tensor:
            order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
            return self.features([texts[number] for number in order[:ROUTED].tolist()])

        return router.fit(some(texts), None if held is None else some(held))

    def _check_known(self, name: str) -> None:
        if name not in self.recall.names:
            known = ", ".join(map(repr, self.recall.names)) or "no task"
            raise ValueError(f"there is no task {name!r}: the bank has {known}")

    # Keeping it ---------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, *, include_base: bool = False) -> None:
        """Write the bank into a folder, whole or not at all.

        ``bank.safetensors`` holds the tasks; ``bank.json`` names the base and lists the tasks; the
        tokenizer and a model card (README.md) stand beside them.

        Args:
            folder: a new one, or one with a bank on the same base, which is replaced.
            include_base: copy the base too, into ``base/``.

        Raises:
            ValueError: the folder holds a bank on another base.
            OSError: it cannot be written.
        """
        with self._lock:
            bankfiles.save(self, Path(folder).expanduser(), include_base=include_base)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        include_base: bool = False,
        message: str = "Upload a task bank",
    ) -> str:
        """Upload the bank to a repository of the Hub, made if need be; the address of the commit.

        Raises:
            ValueError: the Hub refuses, or the base is a folder and not included.
        """
        with self._lock:
            how = {"private": private, "token": token, "message": message}
            return bankfiles.push(self, name, include_base=include_base, **how)
