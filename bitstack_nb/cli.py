"""Command line: ``python -m bitstack_nb run | ablation | stronger | sweep | figures | cost``.

The command ``bank`` is in ``cli_bank``.

A command imports torch, transformers and the rooms when it starts, so ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bitstack_nb.benchmark.protocol import PRESETS, PUBLISHED_CODE, Protocol
from bitstack_nb.benchmark.strategies import all_strategies, strategy_names
from bitstack_nb.cli_bank import add_bank
from bitstack_nb.data.tasks import SEQUENCES, TASKS, Task, find_task

if TYPE_CHECKING:
    from bitstack_nb.results.result import Result

logger = logging.getLogger(__name__)

# ``figures`` draws each of these by itself: their protocols differ in more than labels can say.
_DRAWN = (
    "mixed five-small ablation stronger twenty/all-tests twenty/200-tests twenty/40-tests "
    "earlier/plain-heads earlier/same-rate earlier/more-texts"
)
# The methods that ``run`` compares if none is named.
COMPARED = ["probe", "finetune", "bitstack", "recall", "single"]
RECORDED = tuple(Path("results", name) for name in _DRAWN.split())
EXPLORED = (Path("results", "ablation"), Path("results", "five-small"))
RECORDED_COSTS = Path("results", "cost")  # a file per device
SYNTHETIC = (
    "Data: embedded, synthetic. These numbers show that the program works, not how well the method "
    "does on real text (README.md has those numbers)."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, 2 for an error of the user, 130 if interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # some terminals' encodings lack signs such as ±
            stream.reconfigure(errors="replace")
    options = parser().parse_args(arguments)
    level = logging.INFO if options.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(name)s: %(message)s")
    for client in ("httpx", "httpx2"):  # they would log each request of the Hub client
        logging.getLogger(client).setLevel(logging.WARNING)
    try:
        options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError) as error:
        logger.info("in full:", exc_info=True)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        print(
            "error: out of GPU memory: take a smaller --batch-size or --max-length, or the CPU",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command continues after the last finished task", file=sys.stderr)
        return 130
    return 0


# Commands ---------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> None:
    from bitstack_nb.benchmark.runner import run

    todo = protocols(options)
    if options.quiet:
        import datasets

        datasets.disable_progress_bars()
    how = {"output": options.output, "device": options.device, "progress": not options.quiet}
    _report([run(protocol, **how) for protocol in todo], options.output)


def _sweep(options: argparse.Namespace) -> None:
    from bitstack_nb.benchmark.sweeps import sweep
    from bitstack_nb.results.result import load_results

    # A batch system ends a sweep so; it ends its runs then, as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    names = {protocol.name: protocol for protocol in protocols(options)}
    failed = sweep(
        list(names.values()),
        output=options.output,
        device=options.device,
        backend=options.backend,
        jobs=options.jobs,
        progress=not options.quiet,
    )
    if done := [options.output / f"{name}.json" for name in names if name not in failed]:
        _report(load_results(*done), options.output)
    for name, why in failed.items():
        print(f"{name}: {why}", file=sys.stderr)
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(names)} runs have failed: the same command tries them again"
        )


def _figures(options: argparse.Namespace) -> None:
    from bitstack_nb.cost.plots import write_cost_figures
    from bitstack_nb.cost.report import CostReport

    if options.explorer:
        _write_explorer(options.results or EXPLORED, options.output)
        return
    if options.results:
        _draw(options.results, options.output)
        return
    for folder in RECORDED:
        _draw([folder], options.output / folder.relative_to("results"))
    for recorded in sorted(RECORDED_COSTS.glob("*.json")):
        folder = options.output / f"cost-{recorded.stem}"
        print(*write_cost_figures(CostReport.load(recorded), folder), sep="\n")


def _draw(results: Sequence[Path], output: Path) -> None:
    from bitstack_nb.figures import write_figures
    from bitstack_nb.results.result import load_results

    files, left_out = write_figures(load_results(*results), output)
    print(*files, sep="\n")
    for name, why in left_out.items():
        print(f"no {name}: {why}")


def _write_explorer(results: Sequence[Path], output: Path) -> None:
    """Write the explorer of the run whose settings are nearest the defaults."""
    from bitstack_nb.files import replacing
    from bitstack_nb.notebook import explore, nearest_runs
    from bitstack_nb.results.result import load_results

    runs = load_results(*results)
    with_importance = [run for run in runs if run.importance]
    nearest, _ = nearest_runs(with_importance, Protocol.sparsity, Protocol.budget)
    with replacing(output / "explorer.html") as temporary:
        temporary.write_text(explore(nearest, results=runs).to_html(), "utf-8")
    print(output / "explorer.html")


def _cost(options: argparse.Namespace) -> None:
    from bitstack_nb import cost
    from bitstack_nb.benchmark.training import find_device
    from bitstack_nb.results.tables import format_table, markdown

    device = find_device(options.device).type
    path = options.output / f"{device}.json"
    report = cost.CostReport.load(path) if path.exists() else cost.CostReport(device=device)
    names = ("rounds", "model", "data")
    given = {name: v for name in names if (v := getattr(options, name)) is not None}
    if options.part != "bank" and given.keys() & {"model", "data"}:
        raise ValueError(f"cost {options.part} takes no --model and no --data, cost bank does")
    getattr(cost, f"measure_{options.part}")(report, progress=not options.quiet, **given)
    report.save(path)
    if report.costs:
        print(f"\n{format_table(cost.cost_table(report).round(3))}\n")
    if report.bank:
        print(f"\n{markdown(cost.bank_table(report))}\n")
    print(f"In full: {path}")


def _report(done: list[Result], output: Path) -> None:
    from bitstack_nb.figures import brief, conclusions
    from bitstack_nb.results.tables import format_table

    print(f"\n{format_table(brief(done))}\n")
    if found := conclusions(done):
        print(*found, sep="\n", end="\n\n")
    if any(result.protocol["data"] == "embedded" for result in done):
        print(SYNTHETIC)
    print(f"Each run is a JSON file in {output}:")
    for name in sorted({Protocol.from_dict(result.protocol).name for result in done}):
        print(f"  {output / name}.json")


def protocols(options: argparse.Namespace) -> list[Protocol]:
    """A protocol for every combination of the values that the options list.

    A setting of some strategies only, such as sparsity, makes no further runs of the others.
    """
    given = {f.name: v for f in fields(Protocol) if (v := getattr(options, f.name)) is not None}
    preset = options.preset
    if preset == "published-code":
        preset, given = "published", {name: [v] for name, v in PUBLISHED_CODE.items()} | given
    chosen = PRESETS[preset].with_chosen  # each method at its own rate, if none is given
    strategies = given.pop("strategy")
    owned = {name for strategy in all_strategies().values() for name in strategy.settings}
    found = []
    for shared in _combinations({name: v for name, v in given.items() if name not in owned}):
        for strategy in strategies:
            settings = getattr(all_strategies().get(strategy), "settings", ())
            for own in _combinations({name: v for name, v in given.items() if name in settings}):
                make = PRESETS[preset].with_strategy if "learning_rate" in given else chosen
                protocol = make(strategy, **shared, **own)
                found.append(protocol.shuffled() if options.shuffle_tasks else protocol)
    return found


def _combinations(values: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


# Options ----------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Leave with one line; argparse would print all options before it."""
        self.exit(2, f"error: {message} ({self.prog} --help lists the options)\n")


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; ``command`` is the function to call with the options."""
    program = _Parser(prog="python -m bitstack_nb", description="BitStack's benchmark.")
    commands = program.add_subparsers(required=True, metavar="COMMAND")
    text = "train on the tasks in sequence and compare strategies (the main job)"
    _add_runs(commands, "run", text, strategy=COMPARED)
    _add_runs(
        commands,
        "ablation",
        "BitStack over sparsities; 0 is plain fine-tuning",
        strategy=["bitstack"],
        sparsity=[0.0, 0.05, 0.10, 0.12, 0.20, 0.40],
    )
    _add_runs(
        commands,
        "stronger",
        "AG News, then DBpedia, on a stronger backbone; each new head first trains alone",
        preset="quick",
        model=["distilbert-base-uncased"],
        tasks=[(find_task("ag_news"), find_task("dbpedia"))],
        head_steps=[32],
    )
    _add_sweep(commands)
    _add_figures(commands)
    _add_cost(commands)
    add_bank(commands)
    return program


def _add(
    commands: argparse._SubParsersAction, name: str, text: str, command: Callable, output: str
) -> argparse.ArgumentParser:
    """Add a command with the options that all commands have."""
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=command)
    folder = f"folder; {output} if not given"
    parser.add_argument("--output", type=_path, default=Path(output), help=folder)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--verbose", action="store_true", help="log each step, and errors in full")
    return parser


def _add_runs(
    commands: argparse._SubParsersAction,
    name: str,
    text: str,
    command: Callable = _run,
    **defaults: Any,
) -> argparse.ArgumentParser:
    """Add a command that makes runs; its settings are the fields of ``Protocol``.

    transformers' HfArgumentParser makes options of fields too, but imports torch, and takes no
    lists of values.
    """
    parser = _add(commands, name, text, command, "results/runs")
    add = parser.add_argument
    presets = [*PRESETS, "published-code"]
    add("--preset", choices=presets, default="smoke", help="the settings that are not given")
    order = "each seed but 0 trains on the tasks in a random order of its own"
    add("--shuffle-tasks", action="store_true", help=order)
    _add_device(parser)
    settings = parser.add_argument_group(
        "settings",
        "Commas between values make several runs, one for each combination. A setting that is not "
        "given is as in the preset.",
    )
    for item in fields(Protocol):
        option, parse, text = _OWN_WORDS.get(item.name, (None, None, None))
        settings.add_argument(
            option or f"--{item.name.replace('_', '-')}",
            dest=item.name,
            type=parse or _several(_kind(item)),
            metavar="X,X",
            help=text or item.metadata["help"],
        )
    parser.set_defaults(**{"strategy": ["finetune", "bitstack"], **defaults})
    return parser


def _add_sweep(commands: argparse._SubParsersAction) -> None:
    text = "run, with many runs at once, on this machine or on a cluster"
    parser = _add_runs(commands, "sweep", text, _sweep)
    where = "loky: this machine; dask: the cluster of DASK_SCHEDULER_ADDRESS; ray: of RAY_ADDRESS"
    parser.add_argument("--backend", default="loky", metavar="NAME", help=where)
    many = "runs at once with loky; if not given as many as cores, on a GPU one"
    parser.add_argument("--jobs", type=int, metavar="N", help=many)


def _add_figures(commands: argparse._SubParsersAction) -> None:
    text = "draw recorded results as PNG files, and write their tables"
    parser = _add(commands, "figures", text, _figures, "results/figures")
    recorded = (
        "files or folders to draw together; if not given, each of "
        f"{', '.join(map(str, RECORDED))}, and the costs in {RECORDED_COSTS}, to its own folder"
    )
    parser.add_argument("results", nargs="*", type=_path, metavar="RESULTS", help=recorded)
    page = f"write only explorer.html, a page with a slider; of {', '.join(map(str, EXPLORED))}"
    parser.add_argument("--explorer", action="store_true", help=f"{page} if no RESULTS are given")


def _add_cost(commands: argparse._SubParsersAction) -> None:
    text = "measure what locking costs in time and memory, on GPT-2's architecture"
    parser = _add(commands, "cost", text, _cost, "results/cost-here")
    text = (
        "costs (of locking) if not given; recall: exact recall's; bank: a task bank beside peft's "
        "adapters; growth: over sizes and tasks"
    )
    parts = ("costs", "recall", "bank", "growth")
    parser.add_argument("part", choices=parts, nargs="?", default="costs", help=text)
    text = "of bank: a folder or a Hub name; MiniLM's architecture if not given"
    parser.add_argument("--model", metavar="NAME", help=text)
    text = "of bank: hub, embedded or a folder; embedded if not given"
    parser.add_argument("--data", metavar="NAME", help=text)
    parser.add_argument("--rounds", type=int, metavar="N", help="measurements of each time")
    _add_device(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    devices = ("auto", "cpu", "cuda")
    parser.add_argument("--device", choices=devices, default="auto", help="auto: a GPU if any")


# Values of options ------------------------------------------------------------------------------


def _path(text: str) -> Path:
    return Path(text).expanduser()  # the shell does not in --output=~/runs


def _several(kind: Callable[[str], Any]) -> Callable[[str], list]:
    def parse(text: str) -> list:
        try:
            return [kind(part.strip()) for part in text.split(",")]
        except ValueError as error:  # argparse would leave out its text
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def _kind(item: Field) -> Callable[[str], Any]:
    """The function that reads a value of a field, by the field's annotation."""
    names = str(item.type)
    if "int" in names:
        return _size if "float" in names else int
    return float if "float" in names else str


def _size(text: str) -> int | float:
    """A number of examples, or a fraction of them."""
    return int(text) if text.isdigit() else float(text)


def _tasks(text: str) -> list[tuple[Task, ...]]:
    """One sequence of tasks."""
    return [SEQUENCES[text] if text in SEQUENCES else tuple(_several(find_task)(text))]


# Fields with another option, reader or help than their own.
_OWN_WORDS = {
    "strategy": ("--strategy", None, ", ".join(strategy_names())),
    "seed": ("--seeds", None, None),
    "tasks": (
        "--tasks",
        _tasks,
        f"in training order: {', '.join(TASKS)}, some labels of one as dbpedia_2-3, or "
        f"{' or '.join(SEQUENCES)}",
    ),
}
