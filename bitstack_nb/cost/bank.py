"""A task bank beside peft's adapters: three tasks with heads of three sizes on one backbone.

``python -m bitstack_nb cost bank`` measures bytes, times and exactness, all kinds side by side.
"""

from __future__ import annotations

import copy
import logging
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from bitstack_nb.cost import adapters, measure, processes
from bitstack_nb.cost.adapters import Bank, Kept, LoRA, MergedLoRA, MergedSHiRA, SHiRA
from bitstack_nb.cost.measure import Times, Work, take_turns
from bitstack_nb.cost.report import CostReport
from bitstack_nb.data.backbones import load_backbone
from bitstack_nb.data.loading import load_task
from bitstack_nb.data.tasks import find_task
from bitstack_nb.pretrained import load_pretrained
from bitstack_nb.results.provenance import provenance
from bitstack_nb.settings import TINY

if TYPE_CHECKING:
    import pandas as pd

TASKS = ("imdb", "ag_news", "dbpedia")  # 2, 4 and 14 labels
EXTRA = "extra"  # a task that is added and removed
LEARNERS = (Bank, LoRA, SHiRA)
MERGED = {MergedLoRA: LoRA, MergedSHiRA: SHiRA}  # and the kind that saved their tasks
LABELS = [kind.label for kind in (Bank, LoRA, MergedLoRA, SHiRA, MergedSHiRA)]


logger = logging.getLogger(__name__)


def measure_bank(
    report: CostReport,
    *,
    model: str | None = None,
    data: str = "embedded",
    texts: int = 48,
    rounds: int = 7,
    progress: bool = False,
) -> None:
    """Measure a task bank and peft's adapters on the same three tasks and backbone.

    Args:
        report: takes the measurements.
        model: a folder or a Hub name of an encoder whose head is one layer, as BERT's. None takes
            MiniLM's architecture with random weights.
        data: of the tasks, as in a ``Protocol``.
        texts: of each task, to train on for one epoch. A few are enough: bytes and times do not
            depend on how well a task is learnt.
        rounds: measurements of each time.
        progress: show a progress bar.
    """
    origin, found, seconds = provenance(), {}, {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft|transformers")  # of each other
        place = _Place(Path(folder), report.device)
        place.learn(model, data=data, texts=texts)
        with tqdm(_costs(place, rounds), disable=not progress, unit="cost") as bar:
            for name, values, times in bar:
                bar.set_description(name)
                found[name] = values
                if times:
                    seconds[name] = times.seconds
    settings = {"model": model or "MiniLM's architecture", "data": data, "texts": texts}
    settings |= {"own": adapters.OWN, "rank": adapters.RANK, "rounds": rounds}
    report.bank = {"settings": settings, "found": found, "seconds": seconds}
    report.provenance["bank"] = origin


def bank_table(report: CostReport) -> pd.DataFrame:
    """A row per cost, a column per kind, as text."""
    import pandas as pd

    def text(value: Any) -> str:
        if value is None or isinstance(value, bool):
            return {None: "–", True: "yes", False: "no"}[value]
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    rows = report.bank["found"].items()
    cells = [[name, *(text(found.get(label)) for label in LABELS)] for name, found in rows]
    return pd.DataFrame(cells, columns=["", *LABELS])


class _Place:
    """A folder with a backbone and the tasks that each kind has learnt and saved.

    Attributes:
        plain: the backbone.
        kept: by label the tasks of each kind.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.base, self.device = folder, folder / "base", device
        self.kept: dict[str, Kept] = {}

    def learn(self, model: str | None, *, data: str, texts: int) -> None:
        """Let each kind learn the tasks and save them."""
        self._write_base(model)
        of = {"train_size": texts, "test_size": 16, "seed": 0}
        samples = {name: load_task(find_task(name), data, **of) for name in TASKS}
        for kind in LEARNERS:
            kept = self.kept[kind.label] = kind(self.base, self.device)
            for name, sample in samples.items():
                kept.learn(name, sample.train, _labels(sample.task.num_labels))
            (self.folder / kind.label).mkdir()
            kept.save(self.folder / kind.label)
        for merged, kind in MERGED.items():
            self.kept[merged.label] = self.load(merged, kind.label)

    def _write_base(self, name: str | None) -> None:
        backbone = load_backbone(name or TINY, max_length=adapters.LENGTH, seed=0)
        model, tokenizer = backbone.model if name else measure.minilm(), backbone.tokenizer
        tokenizer.padding_side = "right"
        model.save_pretrained(self.base)
        tokenizer.save_pretrained(self.base)
        self.plain = load_pretrained(str(self.base))[0].eval().to(self.device)

    def load(self, kind: type[Kept], label: str | None = None) -> Kept:
        """What a kind makes of the saved tasks of its own or another label."""
        return kind.load(self.base, self.folder / (label or kind.label), self.device)

    def batch(self, rows: int, length: int = adapters.LENGTH) -> dict[str, torch.Tensor]:
        """Random tokens with labels, 0 or 1."""
        batch = measure.random_batch(self.plain, seed=100, rows=rows, length=length)
        return {**batch, "labels": batch["labels"] % 2}

    def turns(self, works: Mapping[str, Work], rounds: int) -> Times:
        return take_turns(works, rounds=rounds, device=self.device)


def _labels(count: int) -> list[str]:
    return [str(number) for number in range(count)]


# Costs --------------------------------------------------------------------------------------------

Row = tuple[str, dict[str, Any], Times | None]


def _costs(place: _Place, rounds: int) -> Iterator[Row]:
    before = {label: _answers(kept, place) for label, kept in place.kept.items()}
    weights = {kept.label: kept.weights(TASKS[0]) / 1000 for kept in _learners(place)}
    yield "weights of a task without head, thousands", weights, None
    yield (
        "file of a task with head, kB",
        {kind.label: _file(place, kind) for kind in LEARNERS},
        None,
    )
    yield _ratios("pass of one text / plain pass", _passes(place, 1, rounds=10 * rounds))
    yield _ratios("pass of 24 texts / plain pass", _passes(place, 24, rounds=rounds))
    yield _ratios("3 texts of 3 tasks / plain pass", _mixed(place, 1, rounds=3 * rounds))
    yield _ratios("24 texts of 3 tasks / plain pass", _mixed(place, 8, rounds=rounds))
    yield _ratios("training step / plain step", _steps(place, rounds=rounds))
    yield _milliseconds("switch to a task, ms", _switches(place, rounds=5 * rounds))
    yield _milliseconds("add a task, ms", _additions(place, rounds=rounds))
    yield _milliseconds("remove a task, ms", _removals(place, rounds=rounds))
    yield _ratios("load base and tasks / load base", _loads(place, rounds=(rounds + 1) // 2))
    again = _in_a_new_process(place)
    equal = {label: _equal(before[label], again[label]) for label in again}
    yield "old answers in a new process: same bits", equal, None
    equal = {label: _equal(before[label], _answers(k, place)) for label, k in place.kept.items()}
    yield "old answers after other tasks: same bits", equal, None
    moved = {label: _moved(kept, place) for label, kept in place.kept.items()}
    yield "weights of the base that have moved, %", moved, None
    yield "loads heads of 2, 4 and 14 labels by itself", _own_heads(place), None


def _ratios(name: str, times: Times) -> Row:
    return name, {label: times.ratio(label) for label in times.seconds if label != "base"}, times


def _milliseconds(name: str, times: Times) -> Row:
    return name, {w: 1000 * statistics.median(own) for w, own in times.seconds.items()}, times


def _file(place: _Place, kind: type[Kept]) -> float:
    found = [f for files in kind.files for f in (place.folder / kind.label).glob(files)]
    return sum(file.stat().st_size for file in found) / len(TASKS) / 1000


@contextmanager
def _shown(kept: Kept) -> Iterator[None]:
    kept.switch(TASKS[0])
    yield
    kept.base()


@torch.no_grad()
def _passes(place: _Place, rows: int, *, rounds: int) -> Times:
    batch = place.batch(rows)
    works = {"base": Work(partial(place.plain, batch["input_ids"]))}
    for label, kept in place.kept.items():
        works[label] = Work(partial(kept.model, batch["input_ids"]), partial(_shown, kept))
    return place.turns(works, rounds)


@torch.no_grad()
def _mixed(place: _Place, each: int, *, rounds: int) -> Times:
    """A batch of which some rows are of each task; ``base`` passes it once, as one task."""
    tasks = [name for name in TASKS for _ in range(each)]
    batch = {"input_ids": place.batch(len(tasks))["input_ids"]}
    works = {"base": Work(partial(place.plain, **batch))}
    for label, kept in place.kept.items():
        works[label] = Work(partial(kept.mixed, batch, tasks), partial(_shown, kept))
    return place.turns(works, rounds)


def _steps(place: _Place, *, rounds: int) -> Times:
    batch, twin = place.batch(adapters.BATCH_SIZE), copy.deepcopy(place.plain)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    works = {"base": Work(partial(step, twin, torch.optim.AdamW(twin.parameters(), lr=1e-5)))}
    for kept in _learners(place):
        optimizer = torch.optim.AdamW(kept.begin(EXTRA, _labels(2)), lr=1e-5)
        works[kept.label] = Work(partial(step, kept.model, optimizer))
    times = place.turns(works, rounds)
    for kept in _learners(place):
        kept.close()
        _remove(kept)
    return times


def _learners(place: _Place) -> list[Kept]:
    return [place.kept[kind.label] for kind in LEARNERS]


def _add(kept: Kept) -> None:
    kept.begin(EXTRA, _labels(2))
    kept.close()


def _remove(kept: Kept) -> None:
    kept.switch(TASKS[0])  # peft would warn that the shown adapter goes
    kept.remove(EXTRA)


def _switches(place: _Place, *, rounds: int) -> Times:
    def there_and_back(kept: Kept) -> None:
        kept.switch(TASKS[0])
        kept.switch(TASKS[1])

    works = {label: Work(partial(there_and_back, kept)) for label, kept in place.kept.items()}
    seconds = place.turns(works, rounds).seconds
    return Times({label: [both / 2 for both in own] for label, own in seconds.items()})


def _additions(place: _Place, *, rounds: int) -> Times:
    @contextmanager
    def removed(kept: Kept) -> Iterator[None]:
        yield
        _remove(kept)

    works = {k.label: Work(partial(_add, k), partial(removed, k)) for k in _learners(place)}
    return place.turns(works, rounds)


def _removals(place: _Place, *, rounds: int) -> Times:
    @contextmanager
    def added(kept: Kept) -> Iterator[None]:
        _add(kept)
        yield

    works = {k.label: Work(partial(_remove, k), partial(added, k)) for k in _learners(place)}
    return place.turns(works, rounds)


def _loads(place: _Place, *, rounds: int) -> Times:
    works = {"base": Work(partial(load_pretrained, str(place.base)))}
    works |= {kind.label: Work(partial(place.load, kind)) for kind in LEARNERS}
    return place.turns(works, rounds)


# Exactness ----------------------------------------------------------------------------------------

Answers = dict[str, torch.Tensor]


@torch.no_grad()
def _answers(kept: Kept, place: _Place) -> Answers:
    """The logits of some texts by task."""
    found = {}
    for name in TASKS:
        kept.switch(name)
        found[name] = kept.model(place.batch(4)["input_ids"]).logits.cpu()
    kept.base()
    return found


def _equal(one: Answers, other: Answers) -> bool:
    return all(torch.equal(one[name], other[name]) for name in TASKS)


def _in_a_new_process(place: _Place) -> dict[str, Answers]:
    """By label the answers of the saved tasks."""
    threads = torch.get_num_threads()  # or sums would be in another order
    given = f"{str(place.folder)!r}, {place.device!r}, threads={threads}"
    processes.run_python(f"from bitstack_nb.cost import bank; bank._answer_again({given})")
    return {kind.label: load_file(place.folder / f"{kind.label}.answers") for kind in LEARNERS}


def _answer_again(folder: str, device: str, *, threads: int) -> None:
    torch.set_num_threads(threads)
    place = _Place(Path(folder), device)
    place.plain = load_pretrained(str(place.base))[0]
    for kind in LEARNERS:
        save_file(_answers(place.load(kind), place), place.folder / f"{kind.label}.answers")


def _moved(kept: Kept, place: _Place) -> float:
    """The percentage of the backbone's weights that are not what they were."""
    kept.base()
    now = {n.replace(".base_layer.", "."): p for n, p in kept.model.named_parameters()}
    start = f"{place.plain.base_model_prefix}."
    own = {n: p for n, p in place.plain.named_parameters() if n.startswith(start)}
    differing = sum(int((now[name] != parameter).sum()) for name, parameter in own.items())
    return 100 * differing / sum(parameter.numel() for parameter in own.values())


def _own_heads(place: _Place) -> dict[str, bool]:
    """Whether a kind loads heads of several sizes that it keeps itself."""
    sizes = {name: find_task(name).num_labels for name in TASKS}
    found = {Bank.label: True}  # as it has been loaded above
    for kind in (LoRA, SHiRA):
        folder = place.folder / f"{kind.label}, own heads"
        error = adapters.error_of_own_heads(kind, place.base, folder, sizes)
        logger.info("%s: %s", kind.label, error or "loads heads of several sizes")
        found[kind.label] = not error
    return found
