"""The command line's options, and the protocols that they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from bitstack_nb.benchmark.protocol import PRESETS, Protocol
from bitstack_nb.benchmark.strategies import all_strategies, strategy_names
from bitstack_nb.benchmark.sweeps import BACKENDS
from bitstack_nb.data.tasks import (
    AG_NEWS_BINARY,
    EVALUATIONS,
    FIVE_TASKS,
    SAMPLINGS,
    SEQUENCES,
    Task,
    find_task,
)
from bitstack_nb.settings import BUDGETS, IMPORTANCES, RANDOM

COMMANDS = ("run", "ablation", "stronger", "sweep", "figures", "cost")
PARTS = ("costs", "growth")
ABLATION_SPARSITIES = (0.0, 0.05, 0.10, 0.12, 0.20, 0.40)
# Each is drawn by itself: their protocols differ in more than a figure's labels can say.
_DRAWN = (
    "evidence",
    "ablation",
    "stronger",
    "twenty/all-tests",
    "twenty/200-tests",
    "twenty/40-tests",
    "earlier/plain-heads",
    "earlier/same-rate",
    "earlier/more-texts",
)
RECORDED = tuple(Path("results", name) for name in _DRAWN)
RECORDED_COSTS = Path("results") / "cost"  # a file per device

# From options to protocols ----------------------------------------------------------------------


def benchmarks(options: argparse.Namespace) -> list[Protocol]:
    """A protocol per seed, strategy and choice of its settings."""
    return [
        protocol
        for seed in options.seeds or [_base(options).seed]
        for strategy in options.strategy
        for protocol in _variants(_drawn(seed, options), strategy, options)
    ]


def _drawn(seed: int, options: argparse.Namespace) -> Protocol:
    base = replace(_base(options), seed=seed)
    return base.shuffled() if options.shuffle_tasks else base


def _variants(base: Protocol, strategy: str, options: argparse.Namespace) -> list[Protocol]:
    names = [name for name in _CHOICES if name in all_strategies()[strategy].settings]
    return [
        base.with_strategy(strategy, **dict(zip(names, values, strict=True)))
        for values in product(*(getattr(options, name) for name in names))
    ]


def stronger(options: argparse.Namespace) -> list[Protocol]:
    """IMDB, then AG News as two classes."""
    options.tasks = [find_task("imdb"), AG_NEWS_BINARY]
    return benchmarks(options)


def _base(options: argparse.Namespace) -> Protocol:
    settings = {name: value for name in _SETTINGS if (value := getattr(options, name)) is not None}
    if options.tasks is not None:
        settings["tasks"] = tuple(options.tasks)
    return replace(PRESETS[options.preset], **settings)


def one_run(protocol: Protocol, options: argparse.Namespace) -> list[str]:
    """What Python is given to do this one run: ``benchmarks`` the other way round."""
    settings = {name: getattr(options, name) for name in ("preset", *_SETTINGS, "device", "output")}
    settings |= {name: getattr(protocol, name) for name in ("strategy", *_CHOICES)}
    settings |= {"tasks": ",".join(task.name for task in protocol.tasks), "seeds": protocol.seed}
    given = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items() if v is not None]
    return ["-m", "bitstack_nb", "run", *given, "--verbose" if options.verbose else "--quiet"]


# Options ----------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Everything the command line understands; ``command`` names what is to be done."""
    program = argparse.ArgumentParser(
        prog="bitstack_nb",
        description="Command line: python -m bitstack_nb " + " | ".join(COMMANDS),
    )
    commands = program.add_subparsers(required=True, metavar="COMMAND")
    _add_command(
        commands,
        "run",
        "train on the tasks in sequence and compare strategies (the main job)",
        protocols=benchmarks,
        strategy=["finetune", "bitstack"],
    )
    _add_command(
        commands,
        "ablation",
        "BitStack over sparsities; 0 is plain fine-tuning",
        protocols=benchmarks,
        strategy=["bitstack"],
        sparsity=list(ABLATION_SPARSITIES),
    )
    _add_command(
        commands,
        "stronger",
        "IMDB, then AG News as two classes, on a stronger backbone",
        protocols=stronger,
        strategy=["finetune", "bitstack"],
        preset="quick",
        model="distilbert-base-uncased",
        tasks=None,
    )
    _add_sweep(commands)
    _add_figures(commands)
    _add_cost(commands)
    return program


def _add_cost(commands: argparse._SubParsersAction) -> None:
    what = "measure what locking costs in time and memory, on GPT-2's architecture"
    parser = commands.add_parser("cost", help=what, description=what)
    add = parser.add_argument
    parts = "costs if not given; growth: over sizes and tasks"
    add("part", choices=PARTS, nargs="?", default="costs", help=parts)
    add("--rounds", type=int, metavar="N", help="how often works take turns")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
    add(
        "--output",
        type=Path,
        default=Path("results/cost-here"),
        help="results/cost-here if not given",
    )
    add("--quiet", action="store_true", help="no progress bar")
    add("--verbose", action="store_true", help="log what happens")
    parser.set_defaults(command="cost")


def _add_sweep(commands: argparse._SubParsersAction) -> None:
    parser = _add_command(
        commands,
        "sweep",
        "run, with many runs at once, on this machine or on a cluster",
        protocols=benchmarks,
        strategy=["finetune", "bitstack"],
    )
    add = parser.add_argument
    where = "loky: this machine; dask: the cluster of DASK_SCHEDULER_ADDRESS; ray: of RAY_ADDRESS"
    add("--backend", choices=BACKENDS, default="loky", help=where)
    many = "runs at once; not for dask; if not given as many as cores, on a GPU one"
    add("--jobs", type=int, metavar="N", help=many)
    parser.set_defaults(command="sweep")


def _add_figures(commands: argparse._SubParsersAction) -> None:
    what = "draw recorded results as PNG files, and write their tables"
    parser = commands.add_parser("figures", help=what, description=what)
    add = parser.add_argument
    recorded = (
        f"each of {', '.join(map(str, RECORDED))}, and the costs in {RECORDED_COSTS}, to a folder "
        "of its own if not given"
    )
    add("results", nargs="*", type=Path, metavar="RESULTS", help=f"drawn together; {recorded}")
    add("--output", type=Path, default=Path("results/figures"), help="results/figures if not given")
    add("--verbose", action="store_true", help="log what happens")
    parser.set_defaults(command="figures", quiet=True)


def _add_command(
    commands: argparse._SubParsersAction, name: str, what: str, **defaults
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=what, description=what)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="smoke", help="settings that the options below change")
    known = ", ".join(task.name for task in (*FIVE_TASKS, AG_NEWS_BINARY))
    if "tasks" not in defaults:
        text = f"in training order: {known}, some labels of one as dbpedia_2-3, or five or twenty"
        add("--tasks", type=_tasks, metavar="A,B", help=text)
    add(
        "--strategy",
        type=_list(_one_of(strategy_names())),
        metavar="A,B",
        help=", ".join(strategy_names()),
    )
    for name, (kind, default, text) in _CHOICES.items():
        option = f"--{name.replace('_', '-')}"
        add(option, type=_list(kind), default=[default], metavar="X,X", help=text)
    add("--seeds", type=_list(int), metavar="N,N", help="one run each; the preset's if not given")
    order = "each seed but 0 trains on the tasks in an order of its own"
    add("--shuffle-tasks", action="store_true", help=order)
    group = parser.add_argument_group("settings", "what is not given is as in the preset")
    for name, (kind, text) in _SETTINGS.items():
        values = {"choices": kind} if isinstance(kind, tuple) else {"type": kind, "metavar": "X"}
        group.add_argument(f"--{name.replace('_', '-')}", help=text, **values)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
    add(
        "--output",
        type=Path,
        default=Path("results/runs"),
        help="folder; results/runs if not given",
    )
    add("--quiet", action="store_true", help="no progress bar")
    add("--verbose", action="store_true", help="log what happens")
    parser.set_defaults(command="run", **defaults)
    return parser


def size(text: str) -> int | float:
    """Examples (an int) or a fraction; argparse names this function in its messages."""
    return int(text) if text.isdigit() else float(text)


def _tasks(text: str) -> list[Task]:
    return list(SEQUENCES[text]) if text in SEQUENCES else _list(find_task)(text)


def _list(kind):
    def parse(text: str) -> list:
        try:
            return [kind(part.strip()) for part in text.split(",")]
        except ValueError as error:  # argparse would leave out what it says
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def _one_of(known: Sequence[str]):
    def parse(name: str) -> str:
        if name not in known:
            raise ValueError(f"{name!r} is none of {', '.join(known)}")
        return name

    return parse


_IMPORTANCES = (*IMPORTANCES, RANDOM)
# Options of which each combination is a run, for the strategies that have them.
_CHOICES = {
    "importance": (
        _one_of((*IMPORTANCES, RANDOM)),
        "gradient",
        " or ".join((*IMPORTANCES, RANDOM)),
    ),
    "budget": (_one_of(BUDGETS), "union", " or ".join(BUDGETS)),
    "sparsity": (float, Protocol.sparsity, "share a task locks"),
    "n_batches": (int, Protocol.n_batches, "batches that importance is measured on"),
    "strength": (float, Protocol.strength, "of the penalty of ewc"),
    "rank": (int, Protocol.rank, "of the adapters of lora"),
    "replay_size": (int, Protocol.replay_size, "examples that replay keeps of a task"),
    "head_steps": (int, Protocol.head_steps, "steps on a new task's head alone, before all"),
}
_SETTINGS = {
    "model": (str, "Hub name or folder of a sequence classifier; tiny-gpt2 is made on the spot"),
    "data": (str, "embedded (synthetic), hub, or a folder with <dataset>/train.parquet"),
    "train_size": (size, "training examples per task, or a fraction such as 0.05"),
    "test_size": (size, "test examples per task, or a fraction such as 0.01"),
    "max_length": (int, "tokens a text is cut at"),
    "epochs": (float, "passes over each task's sample"),
    "batch_size": (int, "examples per step"),
    "learning_rate": (float, "of AdamW"),
    "head_learning_rate": (float, "of the heads; the same if not given"),
    "warmup_steps": (int, "steps at the start of a task in which the rates rise"),
    "sampling": (SAMPLINGS, "drawn by class, or the published slices"),
    "evaluate_on": (EVALUATIONS, "the test split, or held-out training data to choose settings on"),
}
