"""What one run does, in full: a frozen record whose hash names the run's result."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

import torch

from bitstack_nb.data.tasks import EVALUATIONS, FIVE_TASKS, SAMPLINGS, Task, find_task
from bitstack_nb.settings import CONTROLS, IMPORTANCES, RANDOM, check_settings

STRATEGIES = (
    "finetune",
    "bitstack",
    "bitstack-strict",
    "random-mask",
    "magnitude-mask",
    "recall",
    "frozen",
    "ewc",
    "replay",
    "lora",
    "single",
    "joint",
)
_LOCKING = ("sparsity", "budget", "n_batches", "importance", "head_steps")
# Settings that mean something to some strategies only; they are left out of the others' record, so
# that fine-tuning at two sparsities is one run.
OWN_SETTINGS = {
    "finetune": ("head_steps",),
    "bitstack": _LOCKING,
    "bitstack-strict": _LOCKING,
    **dict.fromkeys(CONTROLS, _LOCKING),
    "recall": ("sparsity", "n_batches", "importance"),
    "frozen": ("head_steps",),
    "ewc": ("strength", "n_batches", "head_steps"),
    "replay": ("replay_size", "head_steps"),
    "lora": ("rank", "head_steps"),
    "single": ("head_steps",),
}
_POSITIVE = (
    "epochs",
    "batch_size",
    "learning_rate",
    "head_learning_rate",
    "train_size",
    "test_size",
)
_REAL = (
    "sparsity",
    "strength",
    "epochs",
    "learning_rate",
    "head_learning_rate",
    "weight_decay",
)
_WHOLE = {"n_batches": 1, "rank": 1, "replay_size": 1, "warmup_steps": 0, "head_steps": 0}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One run: a strategy on a sequence of tasks. The defaults are the preset ``smoke``.

    Args:
        strategy: ``finetune``; ``bitstack``; ``bitstack-strict`` (embeddings, norms and biases
            frozen too after the first task); ``random-mask`` and ``magnitude-mask`` (as many
            entries as BitStack locks, drawn or the largest); ``recall`` (BitStack's mode of that
            name); ``frozen`` (the backbone after the first task), ``ewc``, ``replay``, ``lora``
            (an adapter per task); ``single`` (a model per task) and ``joint`` (all tasks at once),
            the upper bounds.
        sparsity, budget, n_batches, importance: of :class:`bitstack_nb.BitStack` and the controls;
            ignored by the others, but ``n_batches`` not by ``ewc``, which takes its Fisher from as
            many examples, and ``budget`` by ``recall``. No importance is ``gradient``; ``random``,
            for ``recall`` alone, takes no batches.
        model: ``tiny-gpt2`` (made on the spot), a Hub name or a folder.
        data: ``embedded`` (synthetic), ``hub``, or a folder of Parquet files.
        tasks: in training order; names of the known ones or own :class:`Task` objects.
        seed: draws the samples, initialises heads, orders batches and sets dropout.
        train_size, test_size: examples per task, or a fraction of the split below 1.
        max_length: tokens a text is cut at.
        epochs: passes over each task's training sample.
        batch_size: examples per step, in training and in measuring importance.
        learning_rate, weight_decay, warmup_steps: of AdamW with a linear schedule, per task.
        head_learning_rate: of the heads, if it is another than the backbone's.
        strength: of the penalty of ``ewc``.
        rank: of the adapters of ``lora``.
        head_steps: steps on a new task's head alone, before it is trained; none if None.
            ``recall`` always takes 32, ``joint`` knows no new task.
        replay_size: examples of each earlier task that ``replay`` trains on again.
        sampling: ``stratified`` (drawn) or ``head`` (the published slices).
        evaluate_on: ``test``, or ``heldout`` training data, for choosing settings.
    """

    strategy: str = "finetune"
    sparsity: float | None = 0.12
    budget: str | None = "union"
    n_batches: int | None = 32
    model: str = "tiny-gpt2"
    data: str = "embedded"
    tasks: tuple[Task, ...] = FIVE_TASKS
    seed: int = 0
    train_size: int | float = 1000
    test_size: int | float = 250
    max_length: int = 48
    epochs: float = 3
    batch_size: int = 16
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup_steps: int = 10
    sampling: str = "stratified"
    evaluate_on: str = "test"
    importance: str | None = None
    head_learning_rate: float | None = None
    strength: float | None = 1e6
    rank: int | None = 8
    replay_size: int | None = 100
    head_steps: int | None = None

    def __post_init__(self) -> None:
        tasks = tuple(find_task(t) if isinstance(t, str) else t for t in self.tasks)
        object.__setattr__(self, "tasks", tasks)
        if self.strategy not in STRATEGIES:
            raise ValueError(
                f"strategy is {self.strategy!r}, expected one of {', '.join(STRATEGIES)}"
            )
        names = [task.name for task in tasks]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"tasks are {names}, expected one or more, each once")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}, expected more than 0")
        for name, known in (("sampling", SAMPLINGS), ("evaluate_on", EVALUATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}"
                )
        if self.model == "tiny-gpt2" and self.data != "embedded":
            raise ValueError(
                f"tiny-gpt2 knows the embedded tasks' words only, but data is {self.data!r}: name "
                "a pretrained model, such as --model sentence-transformers/all-MiniLM-L6-v2"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay!r}, expected a number from 0 on")
        self._check_own_settings()
        own = self._own_settings()
        for name in {n for names in OWN_SETTINGS.values() for n in names}.difference(own):
            object.__setattr__(self, name, None)
        if self.importance == "gradient":
            object.__setattr__(self, "importance", None)
        if self.head_learning_rate == self.learning_rate:
            object.__setattr__(self, "head_learning_rate", None)
        if self.head_steps == 0:
            object.__setattr__(self, "head_steps", None)
        for name in _REAL:
            # 1 and 1.0 are one protocol. Not so for sizes: 1.0 is the whole split.
            value = getattr(self, name)
            if value is not None and float(value).is_integer():
                object.__setattr__(self, name, int(value))

    def _own_settings(self) -> tuple[str, ...]:
        """Those that mean something to the strategy; what is drawn is measured on no batches."""
        own = OWN_SETTINGS.get(self.strategy, ())
        drawn = "importance" in own and self.importance == RANDOM
        return tuple(name for name in own if not (drawn and name == "n_batches"))

    def _check_own_settings(self) -> None:
        """Raise a ValueError for a setting that means something to the strategy and is wrong."""
        own = self._own_settings()
        if "sparsity" in own:
            known = IMPORTANCES if "budget" in own else (*IMPORTANCES, RANDOM)
            budget, importance = self.budget or "union", self.importance or "gradient"
            check_settings(self.sparsity, budget=budget, importance=importance, importances=known)
        if self.strategy == "recall" and self.sparsity * len(self.tasks) > 1 + 1e-9:
            raise ValueError(
                f"sparsity is {self.sparsity:g}, but {len(self.tasks)} tasks have room in one set "
                f"of weights up to {1 / len(self.tasks):g}: each owns entries of its own"
            )
        strength = self.strength
        if "strength" in own and not (isinstance(strength, Real) and 0 <= strength < math.inf):
            raise ValueError(f"strength is {strength!r}, expected a number from 0 on, as 1e6")
        for name, least in _WHOLE.items():
            value = getattr(self, name)
            if name not in (*own, "warmup_steps") or (name, value) == ("head_steps", None):
                continue
            if not isinstance(value, Integral) or value < least:
                raise ValueError(f"{name} is {value!r}, expected a whole number, at least {least}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able record; settings that the strategy ignores are left out.

        What is None is left out, so a field added later keeps old names if None is its default.
        """
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Protocol:
        """The protocol of a result's record."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(record) - known)
        if unknown:
            raise ValueError(f"unknown protocol settings: {', '.join(unknown)}")
        tasks = tuple(Task(**task) for task in record["tasks"])
        return cls(**{**record, "tasks": tasks})

    @property
    def name(self) -> str:
        """Strategy, seed and a hash of everything else: the result's file name."""
        canonical = json.dumps(self.to_dict(), sort_keys=True)
        digest = hashlib.sha256(canonical.encode()).hexdigest()[:10]
        return f"{self.strategy}-seed{self.seed}-{digest}"

    def shuffled(self) -> Protocol:
        """The same tasks in an order drawn by the seed; seed 0 keeps the order there is."""
        if self.seed == 0:
            return self
        order = torch.randperm(
            len(self.tasks), generator=torch.Generator().manual_seed(self.seed)
        ).tolist()
        return replace(self, tasks=tuple(self.tasks[position] for position in order))

    def with_strategy(self, strategy: str, **settings: Any) -> Protocol:
        """The same protocol for another strategy, at its settings."""
        defaults = {key: getattr(Protocol, key) for key in OWN_SETTINGS.get(strategy, ())}
        return replace(self, strategy=strategy, **{**defaults, **settings})


# quick: real data, minutes on a T4. published: the settings of the published table.
PRESETS: dict[str, Protocol] = {
    "smoke": Protocol(),
    "quick": Protocol(
        model="distilbert-base-uncased",
        data="hub",
        train_size=1000,
        test_size=300,
        max_length=128,
        epochs=1,
        batch_size=16,
        learning_rate=5e-5,
        warmup_steps=20,
    ),
    "published": Protocol(
        model="gpt2",
        data="hub",
        train_size=0.05,
        test_size=0.01,
        max_length=256,
        epochs=3,
        batch_size=8,
        learning_rate=2e-5,
        weight_decay=0.01,
        warmup_steps=50,
        seed=42,
    ),
}


def default_preset(*, gpu: str = "published") -> str:
    """The notebooks' preset: ``BITSTACK_PRESET``, else ``smoke``, or ``gpu`` where there is one.

    Raises:
        ValueError: ``BITSTACK_PRESET`` names no preset.
    """
    name = os.environ.get("BITSTACK_PRESET")
    if not name:
        return gpu if torch.cuda.is_available() else "smoke"
    if name not in PRESETS:
        raise ValueError(f"BITSTACK_PRESET is {name!r}, expected one of {', '.join(PRESETS)}")
    return name
