"""Command line of task banks: ``python -m bitstack_nb bank learn | predict | list | remove``."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

READERS = "a .csv (first line: names of the columns), .jsonl or .parquet file"


def add_bank(commands: argparse._SubParsersAction) -> None:
    """Add the command ``bank`` with its own commands."""
    text = "text classifiers on one backbone, kept in a folder: learn, predict, list, remove"
    bank = commands.add_parser("bank", help=text, description=text)
    inner = bank.add_subparsers(required=True, metavar="COMMAND")
    _add_learn(inner)
    _add_predict(inner)
    listed = _add(inner, "list", "print the tasks of a bank", _list)
    listed.add_argument("--json", action="store_true", help="all that bank.json says")
    removed = _add(inner, "remove", "remove a task; nothing of it is left in the folder", _remove)
    removed.add_argument("--name", required=True, help="the task")
    _add_measure(inner)


def _add(
    commands: argparse._SubParsersAction, name: str, text: str, command: Callable
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=command)
    parser.add_argument("folder", metavar="FOLDER", help="the bank; to read, a Hub name too")
    parser.add_argument("--base", help="backbone: a Hub name or a folder, if not where it was")
    parser.add_argument("--verbose", action="store_true", help="log each step, and errors in full")
    return parser


def _add_learn(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "learn", "teach a bank a new task; a new bank needs --base", _learn)
    add = parser.add_argument
    add("--name", required=True, help="of the task")
    add("--data", required=True, metavar="FILE", type=_path, help=READERS)
    add("--held", metavar="FILE", type=_path, help="other texts, to keep the best epoch")
    add("--text", help="column of the texts, or two for pairs, as question,passage")
    add("--label", help="column of the labels")
    add("--labels", help="names of numbered labels, as negative,positive")
    add("--epochs", type=float, default=3, help="3 if not given")
    add("--batch-size", type=int, default=16, help="16 if not given")
    add("--lr", type=float, help="learning rate of the own weights")
    add("--head-lr", type=float, help="learning rate of the head")
    add("--max-length", type=int, help="tokens that a text is cut at")
    add("--sparsity", type=float, default=0.01, help="own weights of a task, in a new bank; 0.01")
    add("--seed", type=int, help="of the own weights, the head and the order of the texts")
    add("--quiet", action="store_true", help="no progress bar")


def _add_predict(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "predict", "print a JSON line for each text", _predict)
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT", help="before options; else lines are read")
    add("--data", metavar="FILE", type=_path, help=READERS)
    add("--text", help="column of the texts, or two for pairs; text if not given")
    add("--task", help="the task; if not given, the bank chooses it for each text")
    add("--unknown", type=float, default=0.0, help="share of own texts that may get no task; 0")


def _add_measure(commands: argparse._SubParsersAction) -> None:
    text = "measure banks on the benchmark's tasks: task of a text known, and chosen by the bank"
    parser = commands.add_parser("measure", help=text, description=text)
    parser.set_defaults(command=_measure)
    add = parser.add_argument
    add("--model", required=True, help="backbone: a Hub name or a folder")
    add("--data", default="hub", help="hub, embedded (synthetic), or a folder as for run")
    add("--tasks", default="five", help="names, or five, twenty or mixed; five if not given")
    add("--seeds", default="0", help="as 0,1,2: a bank for each")
    add("--train-size", type=int, default=480, help="texts of a task; 480")
    add("--test-size", type=int, default=200, help="test texts of a task; 200")
    add("--evaluate-on", choices=("test", "heldout"), default="test", help="heldout: to choose")
    add("--max-length", type=int, default=32, help="tokens that a text is cut at; 32")
    add("--sparsity", type=float, default=0.01, help="own weights of a task; 0.01")
    add("--epochs", type=float, help="as for learn")
    add("--batch-size", type=int, help="as for learn")
    add("--lr", type=float, help="as for learn")
    add("--head-lr", type=float, help="as for learn")
    add("--output", type=_path, default=Path("results/bank"), help="folder; results/bank")
    add("--quiet", action="store_true", help="no progress bar")
    add("--verbose", action="store_true", help="log each step, and errors in full")


# Commands -----------------------------------------------------------------------------------------


def _learn(options: argparse.Namespace) -> None:
    from bitstack_nb.bank import TaskBank

    folder = Path(options.folder).expanduser()
    if not (folder / "bank.json").is_file() and not options.base:
        raise ValueError(f"{folder} holds no bank: name a backbone for a new one (--base)")
    columns = {"text": _columns(options.text), "label": options.label}
    names = {"labels": _columns(options.labels, many=True)}
    train, held = (file and read_table(file) for file in (options.data, options.held))
    bank = _opened(TaskBank, folder, options)
    rates = {"lr": options.lr, "head_lr": options.head_lr}
    found = bank.learn(
        options.name,
        train,
        eval_dataset=held,
        epochs=options.epochs,
        batch_size=options.batch_size,
        max_length=options.max_length,
        seed=options.seed,
        progress=not options.quiet,
        **columns,
        **names,
        **{name: rate for name, rate in rates.items() if rate is not None},
    )
    bank.save_pretrained(folder)
    accuracy = f", held-out accuracy {100 * found['accuracy']:.1f} %" if held else ""
    print(f"{options.name}: learnt from {found['texts']} texts{accuracy}, saved in {folder}")


def _opened(kind: type, folder: Path, options: argparse.Namespace) -> Any:
    if (folder / "bank.json").is_file():
        return kind.from_pretrained(folder, base=options.base)
    return kind.from_pretrained(options.base, sparsity=options.sparsity)


def _predict(options: argparse.Namespace) -> None:
    from bitstack_nb.bank import TaskBank

    texts = options.texts
    if options.data:
        table = read_table(options.data)
        texts = _texts(table, _columns(options.text) or "text", options.data)
    elif not texts:
        texts = [line.rstrip("\n") for line in sys.stdin]
    bank = TaskBank.from_pretrained(options.folder, base=options.base)
    for answer in bank.predict(texts, task=options.task, unknown=options.unknown):
        print(json.dumps(answer, ensure_ascii=False))


def _list(options: argparse.Namespace) -> None:
    from bitstack_nb.bankfiles import read_record

    record = read_record(options.folder)
    if options.json:
        print(json.dumps(record, indent=2, ensure_ascii=False))
        return
    print(f"{options.folder}: {len(record['tasks'])} tasks on {record['base']['name']}")
    for task in record["tasks"]:
        print(f"  {task['name']}: {', '.join(task['labels'])} ({task['digest'][:12]})")


def _remove(options: argparse.Namespace) -> None:
    from bitstack_nb.bank import TaskBank

    folder = Path(options.folder).expanduser()
    if not (folder / "bank.json").is_file():
        raise ValueError(f"{folder} holds no bank")
    bank = TaskBank.from_pretrained(folder, base=options.base)
    bank.remove(options.name)
    bank.save_pretrained(folder)
    print(f"{options.name}: removed from {folder}")


def _measure(options: argparse.Namespace) -> None:
    from bitstack_nb.benchmark.banks import accuracy_table, measure_bank
    from bitstack_nb.data.tasks import SEQUENCES, find_task
    from bitstack_nb.files import replacing
    from bitstack_nb.results import format_table
    from bitstack_nb.results.plain_json import render

    tasks = SEQUENCES.get(options.tasks) or [find_task(n) for n in options.tasks.split(",")]
    names = ["model", "data", "train_size", "test_size", "evaluate_on", "max_length", "sparsity"]
    settings = {name: getattr(options, name) for name in names}
    for name in ("epochs", "batch_size", "lr", "head_lr"):
        if getattr(options, name) is not None:
            settings[name] = getattr(options, name)
    measured = []
    for seed in map(int, options.seeds.split(",")):
        found = measure_bank(tasks=tasks, seed=seed, progress=not options.quiet, **settings)
        measured.append(found)
        path = options.output / f"bank-seed{seed}.json"
        with replacing(path) as temporary:
            temporary.write_text(render(found) + "\n")
        print(path)
    print(f"\n{format_table(accuracy_table(measured))}")


# Files --------------------------------------------------------------------------------------------


def read_table(path: Path) -> Any:
    """The columns of a CSV, JSONL or Parquet file, as ``TaskBank.learn`` takes them.

    Raises:
        ValueError: the file is of another kind, or is not what its name says.
    """
    reader = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: expected {READERS}")
    try:
        return reader(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def _csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise ValueError(f"{path}: row {number} has more or fewer columns than line 1")
    return rows


def _jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}: line {number} is no JSON: {error}") from error
    return rows


def _parquet(path: Path) -> Any:
    from datasets import Dataset

    return Dataset.from_parquet(str(path), keep_in_memory=True)


def _texts(table: Any, columns: str | list[str], path: Path) -> list[Any]:
    """The texts or pairs of a table without labels."""
    rows, names = list(table), [columns] if isinstance(columns, str) else columns
    for name in names:
        if any(name not in row for row in rows):
            raise ValueError(f"{path} has no column {name!r}: name that of the texts (--text)")
    return [row[names[0]] if len(names) == 1 else tuple(row[n] for n in names) for row in rows]


def _columns(text: str | None, *, many: bool = False) -> str | list[str] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    return parts if many or len(parts) > 1 else parts[0]


def _path(text: str) -> Path:
    return Path(text).expanduser()
