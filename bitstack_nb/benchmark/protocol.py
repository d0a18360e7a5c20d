"""The settings of one run, in full: a frozen record, and a name made of their hash.

Importing this module loads neither torch nor transformers; making a protocol loads the strategies.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitstack_nb.benchmark.strategies import all_strategies
from bitstack_nb.data.tasks import EVALUATIONS, FIVE_TASKS, SAMPLINGS, Task, find_task
from bitstack_nb.settings import BUDGETS, IMPORTANCES, MODES, POOLINGS, PRECISIONS, RANDOM, TINY

if TYPE_CHECKING:
    from bitstack_nb.benchmark.strategy import Strategy


def _setting(default: Any, text: str, **checks: Any) -> Any:
    """A field with its help; ``choices``, ``above``, ``least`` and ``whole`` say what it may be."""
    return field(default=default, metadata={"help": text, **checks})


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One run: a strategy on a sequence of tasks. The defaults are the preset ``smoke``.

    The metadata of a field say what it is and may be. A strategy names the settings that it uses;
    settings that only other strategies use become None and are left out of the record.
    """

    strategy: str = _setting("finetune", "way to train, a file in benchmark/strategies")
    sparsity: float | None = _setting(0.12, "share of the eligible weights one task locks or owns")
    budget: str | None = _setting(
        "union", "importance with masks lifted (union) or behind them (fresh)", choices=BUDGETS
    )
    n_batches: int | None = _setting(
        32, "batches that importance, or the Fisher of ewc, is measured on", whole=True, least=1
    )
    model: str = _setting(
        TINY, "Hub name or folder of a sequence classifier; tiny-gpt2 is in the package"
    )
    data: str = _setting(
        "embedded", "embedded (synthetic), hub, or a folder with <dataset>/train.parquet"
    )
    tasks: tuple[Task, ...] = _setting(FIVE_TASKS, "in training order: names, or Task objects")
    seed: int = _setting(
        0, "random seed of samples, heads, batches and dropout", whole=True, least=0
    )
    train_size: int | float = _setting(
        1000, "training examples per task, or a fraction such as 0.05", above=0
    )
    test_size: int | float = _setting(
        250, "test examples per task, or a fraction such as 0.01", above=0
    )
    max_length: int = _setting(48, "tokens a text is cut at")
    epochs: float = _setting(3, "passes over each task's training sample", above=0)
    batch_size: int = _setting(32, "examples per step", above=0)
    learning_rate: float = _setting(1e-3, "rate of AdamW, with a linear schedule per task", above=0)
    weight_decay: float = _setting(0.01, "weight decay of AdamW", least=0)
    warmup_steps: int = _setting(
        10, "steps at the start of a task in which the rates rise", whole=True, least=0
    )
    sampling: str = _setting(
        "stratified", "random rows by class, or the published first rows", choices=SAMPLINGS
    )
    evaluate_on: str = _setting(
        "test", "the test split, or held-out training data to choose settings", choices=EVALUATIONS
    )
    importance: str | None = _setting(
        None,
        "score of weights; gradient if not given; random for recall alone",
        choices=(*IMPORTANCES, RANDOM),
    )
    head_learning_rate: float | None = _setting(
        None, "rate of the heads; the backbone's if not given", above=0
    )
    strength: float | None = _setting(1e6, "strength of the penalty of ewc", least=0)
    rank: int | None = _setting(8, "rank of the adapters of lora", whole=True, least=1)
    replay_size: int | None = _setting(
        100, "examples that replay keeps of each earlier task", whole=True, least=1
    )
    head_steps: int | None = _setting(
        None, "steps on a new task's head alone, before it is trained", whole=True, least=0
    )
    pooling: str | None = _setting(
        None,
        "what heads read: the mean of a text's tokens, or cls, one token (the first; in decoders "
        "the last); the model's own pooling if not given; always mean for probe",
        choices=POOLINGS,
    )
    precision: str | None = _setting(
        None,
        "of training and prediction, weights stay fp32; if not given, bf16 or fp16 on a GPU, fp32 "
        "on a CPU",
        choices=PRECISIONS,
    )
    importance_mode: str | None = _setting(
        None,
        "measure importance without dropout (eval, if not given) or with it (train)",
        choices=MODES,
    )
    locks_of: str | None = _setting(
        None,
        "folder of BitStack's results: a mask of the same seed locks exactly as many weights; "
        "if not given, as many as are important to its own model",
    )

    def __post_init__(self) -> None:
        tasks = tuple(find_task(t) if isinstance(t, str) else t for t in self.tasks)
        object.__setattr__(self, "tasks", tasks)
        names = [task.name for task in tasks]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"tasks are {names}, expected one or more, each once")
        if self.model == TINY and self.data != "embedded":
            raise ValueError(
                f"tiny-gpt2 knows the embedded tasks' words only, but data is {self.data!r}: name "
                "a pretrained model, such as --model sentence-transformers/all-MiniLM-L6-v2"
            )
        foreign = self._foreign_settings()
        for item in fields(self):
            if item.name not in foreign:
                _check(item, getattr(self, item.name))
        _strategy(self.strategy).check(self)
        self._normalise(foreign)

    def _foreign_settings(self) -> set[str]:
        """Settings that mean something to other strategies only."""
        own = set(_strategy(self.strategy).settings)
        if "importance" in own and self.importance == RANDOM:
            own.discard("n_batches")  # random weights are measured on no batches
        return {name for other in all_strategies().values() for name in other.settings} - own

    def _normalise(self, foreign: set[str]) -> None:
        """Give protocols that mean the same run the same fields, and so the same name."""
        meant = dict.fromkeys(foreign)
        if self.importance == "gradient":
            meant["importance"] = None
        if self.head_learning_rate == self.learning_rate:
            meant["head_learning_rate"] = None
        if self.head_steps == 0:
            meant["head_steps"] = None
        if self.importance_mode == "eval":
            meant["importance_mode"] = None
        if _strategy(self.strategy).pooling:
            meant["pooling"] = None
        for item in fields(self):
            # 1 and 1.0 are one protocol. Not so for sizes: 1.0 is the whole split.
            if item.type in ("float", "float | None") and item.name not in meant:
                value = getattr(self, item.name)
                if value is not None and float(value).is_integer():
                    meant[item.name] = int(value)
        for name, value in meant.items():
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able record; settings that the strategy ignores are left out.

        What is None is left out, so a field added later keeps old names if None is its default.
        """
        record = asdict(self) | {"tasks": tuple(task.to_dict() for task in self.tasks)}
        return {key: value for key, value in record.items() if value is not None}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Protocol:
        """The protocol of a result's record."""
        return cls(**{**record, "tasks": tuple(Task(**task) for task in record["tasks"])})

    @cached_property  # and so the same for a worker in another folder
    def name(self) -> str:
        """Strategy, seed and a hash of everything else: the result's file name."""
        record = self.to_dict()
        folders = {n: _spelled(record[n]) for n in ("data", "model", "locks_of") if n in record}
        canonical = json.dumps(record | folders, sort_keys=True)
        digest = hashlib.sha256(canonical.encode()).hexdigest()[:10]
        return f"{self.strategy}-seed{self.seed}-{digest}"

    def stage_seed(self, number: int) -> int:
        """A seed of its own for each stage, below the 2**32 that numpy takes."""
        return (1000 * self.seed + number) % 2**32

    def shuffled(self) -> Protocol:
        """The same tasks in a random order, by the seed; seed 0 keeps the order there is."""
        import torch

        if self.seed == 0:
            return self
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.tasks), generator=generator).tolist()
        return replace(self, tasks=tuple(self.tasks[position] for position in order))

    def with_strategy(self, strategy: str, **settings: Any) -> Protocol:
        """The same protocol for another strategy, at the default settings of that strategy.

        On the tiny GPT-2 each strategy has rates of its own. A rate that is not the present
        strategy's own stays.
        """
        present, new = _strategy(self.strategy), _strategy(strategy)
        defaults = {name: getattr(Protocol, name) for name in new.settings}
        if settings.get("model", self.model) == TINY:
            shared = {*present.tiny, *new.tiny} - {*present.settings, *new.settings}
            kept = {n for n in shared if getattr(self, n) != _on_tiny(present, n)}
            defaults |= {n: _on_tiny(new, n) for n in {*defaults, *shared} - kept}
        return replace(self, strategy=strategy, **{**defaults, **settings})

    def with_chosen(self, strategy: str, **settings: Any) -> Protocol:
        """As ``with_strategy``, with the settings that were chosen for the strategy.

        A pretrained backbone gets those that were chosen on MiniLM-L6 (results/README.md), if the
        rate of full fine-tuning does not suit the strategy. ``settings`` come first.
        """
        tiny = settings.get("model", self.model) == TINY
        chosen = {} if tiny else _strategy(strategy).chosen(settings)
        return self.with_strategy(strategy, **{**chosen, **settings})


def _on_tiny(strategy: type[Strategy], name: str) -> Any:
    """A strategy's setting for the tiny GPT-2."""
    return strategy.tiny.get(name, getattr(Protocol, name))


def _spelled(path: str) -> str:
    """One spelling for a folder: from here, else from home, else from the root. A name stays."""
    full = Path(os.path.normpath(Path(path).expanduser().absolute()))
    for base, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        if full.is_relative_to(base):
            return prefix + full.relative_to(base).as_posix()
    return full.as_posix()


def _strategy(name: str) -> type[Strategy]:
    known = all_strategies()
    if name not in known:
        raise ValueError(f"strategy is {name!r}, expected one of {', '.join(known)}")
    return known[name]


def _check(item: Field, value: Any) -> None:
    """Raise a ValueError that names a setting out of range, and what it may be."""
    limits, expected = item.metadata, None
    if value is None and "None" in str(item.type) and item.default is None:
        return
    least, above = limits.get("least"), limits.get("above")
    if "choices" in limits and value not in limits["choices"]:
        expected = f"one of {', '.join(limits['choices'])}"
    elif limits.get("whole") and not (isinstance(value, Integral) and least <= value < 2**63):
        expected = f"a whole number, at least {least} and below 2**63"
    elif least is not None and not (isinstance(value, Real) and least <= value < float("inf")):
        expected = f"a number from {least} on"
    elif above is not None and not (isinstance(value, Real) and above < value < float("inf")):
        expected = f"a number above {above}"
    if expected:
        raise ValueError(f"{item.name} is {value!r}, expected {expected}")


class _Presets(Mapping[str, Protocol]):
    """Protocols by name, made when they are looked up: that loads the strategies."""

    def __init__(self, settings: Mapping[str, Mapping[str, Any]]) -> None:
        self._settings = settings

    def __getitem__(self, name: str) -> Protocol:
        return Protocol(**self._settings[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)


# smoke: the defaults, synthetic data, minutes on two cores. ci: the same in seconds, for tests.
# quick: real data, minutes on a T4. published: the settings of the published table.
PRESETS: Mapping[str, Protocol] = _Presets(
    {
        "smoke": {},
        "ci": {
            "tasks": FIVE_TASKS[:3],
            "train_size": 160,
            "test_size": 60,
            "max_length": 24,
            "epochs": 1,
            "batch_size": 16,
            "warmup_steps": 2,
        },
        "quick": {
            "model": "distilbert-base-uncased",
            "data": "hub",
            "train_size": 1000,
            "test_size": 300,
            "max_length": 128,
            "epochs": 1,
            "batch_size": 16,
            "learning_rate": 5e-5,
            "warmup_steps": 20,
        },
        "published": {
            "model": "gpt2",
            "data": "hub",
            "train_size": 0.05,
            "test_size": 0.01,
            "max_length": 256,
            "epochs": 3,
            "batch_size": 8,
            "learning_rate": 2e-5,
            "weight_decay": 0.01,
            "warmup_steps": 50,
            "seed": 42,
        },
    }
)

# What the command line's preset published-code adds to published: the published code's readings.
PUBLISHED_CODE = {"budget": "fresh", "sampling": "head", "importance_mode": "train"}


def default_preset(*, gpu: str = "quick") -> str:
    """The notebooks' preset: ``BITSTACK_PRESET``, else ``smoke``, or ``gpu`` where there is one.

    Raises:
        ValueError: ``BITSTACK_PRESET`` names no preset.
    """
    import torch

    name = os.environ.get("BITSTACK_PRESET")
    if not name:
        return gpu if torch.cuda.is_available() else "smoke"
    if name not in PRESETS:
        raise ValueError(f"BITSTACK_PRESET is {name!r}, expected one of {', '.join(PRESETS)}")
    return name
