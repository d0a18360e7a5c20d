"""Command line: ``python -m bitstack_nb run | ablation | stronger | sweep | figures | cost``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch

from bitstack_nb import ranks
from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.runner import run
from bitstack_nb.benchmark.sweeps import sweep
from bitstack_nb.benchmark.training import find_device
from bitstack_nb.cost import report as cost_report
from bitstack_nb.options import RECORDED, RECORDED_COSTS, one_run, parser
from bitstack_nb.results.result import Result, load_results
from bitstack_nb.results.tables import format_table, table

SYNTHETIC = (
    "Data: embedded, synthetic. These numbers show that the machinery works, not how well the "
    "method does on real text (README.md, What it is worth)."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, 2 for an error the user can mend, 130 if stopped."""
    options = parser().parse_args(arguments)
    level = logging.INFO if options.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(name)s: %(message)s")
    # Every request the Hub client makes would be logged as well.
    for client in ("httpx", "httpx2"):
        logging.getLogger(client).setLevel(logging.WARNING)
    if options.quiet or ranks.rank():
        datasets.disable_progress_bars()
    try:
        _COMMANDS[options.command](options)
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
        options.output / f"{protocol.name}.json": one_run(protocol, options)
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
    from bitstack_nb.cost.plots import write_cost_figures  # both load matplotlib
    from bitstack_nb.figures.figures import write_figures

    together = {options.output: options.results}
    apart = {options.output / folder.relative_to("results"): [folder] for folder in RECORDED}
    for output, results in (together if options.results else apart).items():
        files, left_out = write_figures(load_results(*results), output)
        for file in files:
            print(file)
        for name, why in left_out.items():
            print(f"no {name}: {why}")
    for recorded in [] if options.results else sorted(RECORDED_COSTS.glob("*.json")):
        report = cost_report.CostReport.load(recorded)
        for file in write_cost_figures(report, options.output / f"cost-{recorded.stem}"):
            print(file)


def _cost(options: argparse.Namespace) -> None:
    device = find_device(options.device).type
    path = options.output / f"{device}.json"
    report = (
        cost_report.CostReport.load(path)
        if path.exists()
        else cost_report.CostReport(device=device)
    )
    settings = {"progress": not options.quiet}
    if options.rounds is not None:
        settings["rounds"] = options.rounds
    if options.part == "costs":
        cost_report.measure_costs(report, **settings)
    else:
        cost_report.measure_growth(report, **settings)
    report.save(path)
    if report.costs:
        print(f"\n{format_table(cost_report.cost_table(report).round(3))}\n")
    print(f"In full: {path}")


def _run(protocol: Protocol, options: argparse.Namespace) -> Result:
    return run(protocol, output=options.output, device=options.device, progress=not options.quiet)


def _report(done: list[Result], output: Path) -> None:
    print(f"\n{format_table(table(done))}\n")
    if any(result.protocol["data"] == "embedded" for result in done):
        print(SYNTHETIC)
    print(f"Each run is a JSON file in {output}:")
    for name in sorted({Protocol.from_dict(result.protocol).name for result in done}):
        print(f"  {output / name}.json")


_COMMANDS = {"run": _train, "sweep": _sweep, "figures": _figures, "cost": _cost}


if __name__ == "__main__":
    try:
        status = main()
    finally:
        ranks.leave()
    sys.exit(status)
