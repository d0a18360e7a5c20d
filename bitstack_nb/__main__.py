"""Command line: ``python -m bitstack_nb run | ablation | stronger | sweep | figures | cost``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import datasets
import torch

from bitstack_nb import ranks
from bitstack_nb.benchmark import run
from bitstack_nb.importance import IMPORTANCE
from bitstack_nb.protocol import OWN_SETTINGS, PRESETS, STRATEGIES, Protocol
from bitstack_nb.results import Result, load_results
from bitstack_nb.sampling import SAMPLINGS
from bitstack_nb.settings import BUDGETS
from bitstack_nb.sweep import BACKENDS, sweep
from bitstack_nb.tables import format_table, markdown, table
from bitstack_nb.tasks import (
    AG_NEWS_BINARY,
    EVALUATIONS,
    FIVE_TASKS,
    SEQUENCES,
    Task,
    find_task,
)
from bitstack_nb.training import find_device

ABLATION_SPARSITIES = (0.0, 0.05, 0.10, 0.12, 0.20, 0.40)
# Each is drawn by itself: their protocols differ in more than a figure's labels can say.
RECORDED = tuple(
    Path("results") / f"minilm-l6{name}"
    for name in ("", "-ablation", "-stronger", "-evidence", "-same-rate")
)
SYNTHETIC = (
    "Data: embedded, synthetic. These numbers show that the machinery works, not how well the "
    "method does on real text (README.md, Results)."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, 2 for an error the user can mend, 130 if stopped."""
    options = _parser().parse_args(arguments)
    level = logging.INFO if options.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(name)s: %(message)s")
    # Every request the Hub client makes would be logged as well.
    for client in ("httpx", "httpx2"):
        logging.getLogger(client).setLevel(logging.WARNING)
    if options.quiet or ranks.rank():
        datasets.disable_progress_bars()
    try:
        options.command(options)
    except (ValueError, OSError, ranks.RankError) as error:
        logging.getLogger(__name__).debug("in full:", exc_info=True)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print(
            "error: out of GPU memory: take a smaller --batch-size or --max-length, or the CPU",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command goes on behind the last finished task", file=sys.stderr)
        return 130
    return 0


def _train(options: argparse.Namespace) -> None:
    protocols = options.protocols(options)
    done = [_run(protocol, options) for protocol in protocols]
    if ranks.rank() == 0:
        _report(done, options.output)


def _sweep(options: argparse.Namespace) -> None:
    commands = {
        options.output / f"{protocol.name}.json": _arguments(protocol, options)
        for protocol in options.protocols(options)
    }
    jobs, backend = options.jobs, options.backend
    if jobs is None and backend == "loky" and find_device(options.device).type == "cuda":
        jobs = 1  # several models seldom fit one GPU
    failed = sweep(commands, backend=backend, jobs=jobs, progress=not options.quiet)
    if done := [Result.load(path) for path in commands if path not in failed]:
        _report(done, options.output)
    for path, why in failed.items():
        print(f"{path.stem}: {why}", file=sys.stderr)
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(commands)} runs have failed: the same command tries them again"
        )


def _figures(options: argparse.Namespace) -> None:
    from bitstack_nb.figures import write_figures  # loads matplotlib

    together = {options.output: options.results}
    apart = {options.output / folder.name: [folder] for folder in RECORDED}
    for output, results in (together if options.results else apart).items():
        files, left_out = write_figures(load_results(*results), output)
        for file in files:
            print(file)
        for name, why in left_out.items():
            print(f"no {name}: {why}")


def _cost(options: argparse.Namespace) -> None:
    from bitstack_nb.cost_report import cost_table, measure_costs, measure_growth

    device = find_device(options.device).type
    shared = {"rounds": options.rounds, "device": device, "progress": not options.quiet}
    report = measure_costs(**shared)
    if options.growth:
        report.growth = measure_growth(**shared)
    report.save(options.output / f"{device}.json")
    print(f"\n{markdown(cost_table(report).round(3).astype(str))}\n")
    print(f"In full: {options.output / device}.json")


def _run(protocol: Protocol, options: argparse.Namespace) -> Result:
    return run(protocol, output=options.output, device=options.device, progress=not options.quiet)


def _report(done: list[Result], output: Path) -> None:
    print(f"\n{format_table(table(done))}\n")
    if any(result.protocol["data"] == "embedded" for result in done):
        print(SYNTHETIC)
    print(f"Each run is a JSON file in {output}:")
    for name in sorted({Protocol.from_dict(result.protocol).name for result in done}):
        print(f"  {output / name}.json")


# From options to protocols ----------------------------------------------------------------------


def _benchmark(options: argparse.Namespace) -> list[Protocol]:
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
    names = [name for name in _CHOICES if name in OWN_SETTINGS.get(strategy, ())]
    return [
        base.with_strategy(strategy, **dict(zip(names, values, strict=True)))
        for values in product(*(getattr(options, name) for name in names))
    ]


def _stronger(options: argparse.Namespace) -> list[Protocol]:
    options.tasks = [find_task("imdb"), AG_NEWS_BINARY]
    return _benchmark(options)


def _base(options: argparse.Namespace) -> Protocol:
    settings = {name: value for name in _SETTINGS if (value := getattr(options, name)) is not None}
    if options.tasks is not None:
        settings["tasks"] = tuple(options.tasks)
    return replace(PRESETS[options.preset], **settings)


def _arguments(protocol: Protocol, options: argparse.Namespace) -> list[str]:
    """What Python is given to do this one run: ``_benchmark`` the other way round."""
    settings = {name: getattr(options, name) for name in ("preset", *_SETTINGS, "device", "output")}
    settings |= {name: getattr(protocol, name) for name in ("strategy", *_CHOICES)}
    settings |= {"tasks": ",".join(task.name for task in protocol.tasks), "seeds": protocol.seed}
    given = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items() if v is not None]
    return ["-m", "bitstack_nb", "run", *given, "--verbose" if options.verbose else "--quiet"]


# Options ----------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bitstack_nb", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_command(
        commands,
        "run",
        "train on the tasks in sequence and compare strategies (the main job)",
        protocols=_benchmark,
        strategy=["finetune", "bitstack"],
    )
    _add_command(
        commands,
        "ablation",
        "BitStack over sparsities; 0 is plain fine-tuning",
        protocols=_benchmark,
        strategy=["bitstack"],
        sparsity=list(ABLATION_SPARSITIES),
    )
    _add_command(
        commands,
        "stronger",
        "IMDB, then AG News as two classes, on a stronger backbone",
        protocols=_stronger,
        strategy=["finetune", "bitstack"],
        preset="quick",
        model="distilbert-base-uncased",
        tasks=None,
    )
    _add_sweep(commands)
    _add_figures(commands)
    _add_cost(commands)
    return parser


def _add_cost(commands: argparse._SubParsersAction) -> None:
    what = "measure what locking costs in time and memory, on GPT-2's architecture"
    parser = commands.add_parser("cost", help=what, description=what)
    add = parser.add_argument
    add("--rounds", type=int, default=7, help="how often works take turns; 7 if not given")
    add("--growth", action="store_true", help="over sizes and tasks too, which takes long")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
    add("--output", type=Path, default=Path("results/cost"), help="results/cost if not given")
    add("--quiet", action="store_true", help="no progress bar")
    add("--verbose", action="store_true", help="log what happens")
    parser.set_defaults(command=_cost)


def _add_sweep(commands: argparse._SubParsersAction) -> None:
    parser = _add_command(
        commands,
        "sweep",
        "run, with many runs at once, on this machine or on a cluster",
        protocols=_benchmark,
        strategy=["finetune", "bitstack"],
    )
    add = parser.add_argument
    where = "loky: this machine; dask: the cluster of DASK_SCHEDULER_ADDRESS; ray: of RAY_ADDRESS"
    add("--backend", choices=BACKENDS, default="loky", help=where)
    many = "runs at once; not for dask; if not given as many as cores, on a GPU one"
    add("--jobs", type=int, metavar="N", help=many)
    parser.set_defaults(command=_sweep)


def _add_figures(commands: argparse._SubParsersAction) -> None:
    what = "draw recorded results as PNG files, and write their tables"
    parser = commands.add_parser("figures", help=what, description=what)
    add = parser.add_argument
    recorded = f"each of {', '.join(map(str, RECORDED))} to a folder of its own if not given"
    add("results", nargs="*", type=Path, metavar="RESULTS", help=f"drawn together; {recorded}")
    add("--output", type=Path, default=Path("results/figures"), help="results/figures if not given")
    add("--verbose", action="store_true", help="log what happens")
    parser.set_defaults(command=_figures, quiet=True)


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
    add("--strategy", type=_list(_one_of(STRATEGIES)), metavar="A,B", help=", ".join(STRATEGIES))
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
    parser.set_defaults(command=_train, **defaults)
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


# Options of which each combination is a run, for the strategies that have them.
_CHOICES = {
    "importance": (_one_of(tuple(IMPORTANCE)), "gradient", " or ".join(IMPORTANCE)),
    "budget": (_one_of(BUDGETS), "union", " or ".join(BUDGETS)),
    "sparsity": (float, Protocol.sparsity, "share a task locks"),
    "n_batches": (int, Protocol.n_batches, "batches that importance is measured on"),
    "strength": (float, Protocol.strength, "of the penalty of ewc"),
    "rank": (int, Protocol.rank, "of the adapters of lora"),
    "replay_size": (int, Protocol.replay_size, "examples that replay keeps of a task"),
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


if __name__ == "__main__":
    sys.exit(main())
