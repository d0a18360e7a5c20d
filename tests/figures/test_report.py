"""The summary table, and the files that ``python -m bitstack_nb figures`` writes."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from toy_figures import BITSTACK, FINETUNE, OF_RESULTS, PAPER, SINGLE, UNION, run, runs

from bitstack_nb.cli import RECORDED, RECORDED_COSTS, main
from bitstack_nb.cost.report import CostReport, cost_table
from bitstack_nb.figures import comparison, summary
from bitstack_nb.figures.style import png
from bitstack_nb.results import format_table, load_results, readable
from bitstack_nb.results.metrics import mean_interval


def test_the_summary_is_in_the_order_of_methods_and_paired_with_separate_models():
    frame = summary([*SINGLE, *BITSTACK, *FINETUNE])
    assert list(frame["method"]) == ["fine-tuning", "BitStack", "separate models"]
    assert list(readable(frame).columns) == [
        "method",
        "seeds",
        "average accuracy",
        "learning accuracy",
        "forgetting",
        "kB per task",
        "minus separate models",
    ]
    row = frame.set_index("method").loc["BitStack"]
    own, single = ([r.metrics["average_accuracy"] for r in runs] for runs in (BITSTACK, SINGLE))
    mean, half = mean_interval([a - b for a, b in zip(own, single, strict=True)])
    assert row["average_accuracy"] == pytest.approx(mean_interval(own)[0])
    assert row["minus_separate_models"] == pytest.approx(mean)
    assert row["minus_separate_models_interval"] == pytest.approx(half)
    assert math.isnan(frame["minus_separate_models"].iloc[-1])
    for without in (FINETUNE, [*FINETUNE, *BITSTACK]):
        assert "minus_separate_models" not in summary(without)


def test_the_summary_names_settings_where_nothing_else_tells_rows_apart():
    rates = [run("bitstack", 0, learning_rate=rate) for rate in (1e-5, 3e-5)]
    expected = ["BitStack, learning rate 1e-05", "BitStack, learning rate 3e-05"]
    assert list(summary(rates)["method"]) == expected
    others = summary([rates[0], run("finetune", 0, learning_rate=3e-5)])
    assert list(others["method"]) == ["fine-tuning", "BitStack"]


@pytest.fixture
def recorded(tmp_path):
    for at, result in enumerate([*BITSTACK, *UNION[0.4], *FINETUNE, *SINGLE]):
        small = result.storage | {"best_bytes": result.storage.get("bytes", 0) // 2}
        made = replace(result, storage=small)
        made.save(tmp_path / "recorded" / f"{at}.json")
    return tmp_path / "recorded"


def test_the_command_writes_every_figure_and_says_so(recorded, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["figures", str(recorded), "--output", str(out)]) == 0
    files = sorted(out.iterdir())
    assert sorted(capsys.readouterr().out.split()) == [str(file) for file in files]
    of_a_run = {"lock_heatmaps", "mask_weight", "task_overlap"}
    names = {draw.__name__ for draw in OF_RESULTS} | {f"{name}_bitstack_union" for name in of_a_run}
    names |= {"accuracy_for_smallest_storage"}
    assert {file.name for file in files} == {f"{name}.png" for name in names} | {"tables.md"}
    expected = png(comparison(load_results(recorded)))
    assert (out / "comparison.png").read_bytes() == expected
    tables = (out / "tables.md").read_text()
    assert format_table(summary(load_results(recorded))) in tables
    assert "separate models, task by task" in tables and "random mask" not in tables
    assert "| fine-tuning " in tables and "finetune" not in tables


def test_many_tasks_have_a_row_each(tmp_path):
    tasks = [f"task{number}" for number in range(9)]
    for name in ("recall", "single"):
        for result in runs(name, sparsity=0.05 if name == "recall" else None, tasks=tasks):
            first = [record for record in BITSTACK[0].locks if record["task"] == 1]
            locks = [record | {"task": task} for task in range(1, 10) for record in first]
            made = replace(result, locks=locks if name == "recall" else [])
            made.save(tmp_path / "in" / f"{name}-{made.protocol['seed']}.json")
    assert main(["figures", str(tmp_path / "in"), "--output", str(tmp_path / "out")]) == 0
    lines = (tmp_path / "out" / "tables.md").read_text().splitlines()
    at = lines.index("## Difference to separate models, task by task, the same seeds paired")
    assert "exact recall" in lines[at + 2] and lines[at + 5].startswith("| task0")


def test_the_command_says_what_cannot_be_drawn(tmp_path, capsys):
    for result in PAPER:
        result.save(tmp_path / f"{result.protocol['strategy']}.json")
    assert main(["figures", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert "no capacity: no result has locks" in capsys.readouterr().out
    assert not (tmp_path / "out" / "capacity.png").exists()


def test_without_names_all_that_is_recorded_is_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in RECORDED:
        PAPER[0].save(folder / "one.json")
    point = {"what": "update", "parameters": 10, "tasks": 5, "ratio": 1.0}
    costs = CostReport(device="cpu", costs={"update": {"value": 1.04}}, growth=[point])
    costs.save(RECORDED_COSTS / "cpu.json")
    assert main(["figures"]) == 0
    figures = Path("results", "figures")
    drawn = {"results" / f.parent.relative_to(figures) for f in figures.rglob("*.png")}
    assert drawn == {*RECORDED, Path("results", "cost-cpu")}
    assert format_table(cost_table(costs)) in (figures / "cost-cpu" / "tables.md").read_text()
    said = capsys.readouterr().out
    assert all(f"{folder.name}/comparison.png" in said for folder in RECORDED)


@pytest.mark.parametrize("missing", [["nowhere"], []])  # no folder of that name; none recorded here
def test_without_results_the_command_says_so_in_one_line(tmp_path, capsys, monkeypatch, missing):
    monkeypatch.chdir(tmp_path)
    assert main(["figures", *missing]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot read the result") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_results_that_contradict_each_other_are_refused(recorded, tmp_path, capsys):
    again = replace(BITSTACK[0], metrics=BITSTACK[1].metrics)
    again.save(recorded / "again.json")
    assert main(["figures", str(recorded), "--output", str(tmp_path / "out")]) == 2
    assert "two different results" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_figure_that_cannot_be_written_is_named_and_nothing_half_is_left(tmp_path, capsys):
    resource = pytest.importorskip("resource")  # not on Windows
    PAPER[0].save(tmp_path / "in.json")
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as a full disk would stop it
    try:
        assert main(["figures", str(tmp_path / "in.json"), "--output", str(out)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search(r"error: .*cannot write the file.*comparison\.png", capsys.readouterr().err)
    assert not list(out.iterdir())
