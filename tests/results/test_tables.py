"""Frames and tables: rows, means with intervals, the settings shown, and origins."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest
from toy_results import TASKS, published, run

from bitstack_nb.results import (
    ResultError,
    format_table,
    frame,
    load_results,
    provenance_table,
    readable,
    table,
    task_frame,
)
from bitstack_nb.results.frames import averages
from bitstack_nb.results.metrics import mean_interval
from bitstack_nb.results.provenance import provenance

RATES = [(0, 2e-4), (0, 5e-5), (1, 5e-5)]


def changed(result, **metrics):
    result.metrics |= metrics
    return result


def test_a_frame_has_a_row_per_run_and_per_run_and_task():
    results = [run(seed=1), run("joint"), run(seed=0, tasks=TASKS[::-1])]
    runs = frame(results)
    assert runs["seed"].tolist() == [0, 0, 1] and runs["configuration"].nunique() == 2
    for row in runs.to_dict("records"):
        assert row["average_accuracy"] == row["result"].metrics["average_accuracy"]
    tasks = task_frame(results)
    assert tasks["task"].tolist()[3:6] in ([*TASKS], [*TASKS[::-1]]) and len(tasks) == 9
    mine = tasks[(tasks["seed"] == 1) & (tasks["task"] == TASKS[1])].iloc[0]
    assert (mine["learnt"], mine["final"]) == (results[0].matrix[1][1], results[0].matrix[2][1])
    assert tasks[tasks["strategy"] == "joint"]["learnt"].isna().sum() == 2
    nothing = averages(runs[:0], ["forgetting"])
    assert nothing.empty and list(nothing) == ["forgetting", "forgetting_interval"]


def test_a_row_holds_the_seeds_of_one_configuration():
    lasts = [60.0, 66.0, 63.0]
    results = [changed(run(seed=s), first_task_after_last=last) for s, last in enumerate(lasts)]
    found = table([run("finetune"), run(sparsity=0.4), *results])
    assert list(found["strategy"]) == ["bitstack", "bitstack", "finetune"]
    assert list(found["sparsity"])[:2] == [0.12, 0.4] and math.isnan(found["sparsity"][2])
    assert list(found["seeds"]) == [3, 1, 1]
    row = found.iloc[0]
    mean = (row["first_task_after_last"], row["first_task_after_last_interval"])
    assert mean == pytest.approx(mean_interval(lasts))
    locked = [result.lock_stats[-1]["frozen_pct"] for result in results]
    assert row["locked_of_eligible"] == pytest.approx(sum(locked) / 3)
    assert math.isnan(found["forgetting_interval"][1])
    assert math.isnan(found["locked_of_eligible"][2])
    # Equal everywhere, or a setting that fine-tuning does not have: nothing to show.
    assert not {"model", "data", "tasks", "n_batches", "seed", "published"} & {*found.columns}


def test_only_settings_that_differ_are_shown():
    found = table([run(seed=seed, learning_rate=rate) for seed, rate in RATES])
    assert list(found["learning_rate"]) == [5e-5, 2e-4] and list(found["seeds"]) == [2, 1]
    assert "model" not in found
    # Absent and null are the same setting.
    assert list(table([run("joint", budget=None), run("joint", seed=1)])["seeds"]) == [2]
    assert "embedded (synthetic)" in format_table(table([run(data="embedded")]))


def test_a_seed_and_its_order_of_tasks_count_once():
    results = [run(), run(), run(tasks=TASKS[::-1]), run(tasks=(*TASKS[:2], "yelp"))]
    found = table(results)
    assert dict(zip(found["tasks"], found["seeds"], strict=True)) == {
        "ag_news, dbpedia, imdb": 2,
        "ag_news, imdb, yelp": 1,
    }
    with pytest.raises(ResultError, match=r"seed 0 .*bitstack.* two different results"):
        table([run(), changed(run(), forgetting=1.0)])
    with pytest.raises(ResultError, match="at least one"):
        table([])


def test_published_rows_stay_apart_and_need_no_matrix(tmp_path):
    paper = published("bitstack", 3.8)
    paper.save(tmp_path / "paper.json")
    assert load_results(tmp_path) == [paper]
    found = table([run(), paper])
    assert list(found["seeds"]) == [1, 1] and "the paper" in format_table(found)
    row = found[found["published"].notna()].iloc[0]
    assert row["forgetting"] == 3.8 and math.isnan(row["average_accuracy"])


def test_a_missing_number_is_said_or_its_column_left_out():
    row = table([run(), changed(run(seed=1), forgetting=None)]).iloc[0]
    assert math.isnan(row["forgetting"]) and not math.isnan(row["average_accuracy"])
    assert "storage_per_task" not in table([run("joint")])
    lora = run("lora")
    lora.storage = {"bytes": 6000}
    found = table([run("joint"), lora]).set_index("strategy")["storage_per_task"]
    assert found["lora"] == 2 and math.isnan(found["joint"])
    lora.times = {"train": [1.0, 3.0], "step": [0.1, 0.3]}
    assert table([lora, run("lora", seed=1)])["time_per_step"].item() == pytest.approx(200)  # ms
    assert "time_per_step" not in table([lora, run()])  # which has none to compare it with
    lora.times["step"][0] = None
    assert "time_per_step" not in table([lora])


def test_format_table_is_aligned_markdown_of_readable():
    results = [changed(run(seed=s), forgetting=float(s)) for s in range(2)] + [run(model="a|b")]
    shown = readable(table(results))
    lines = format_table(table(results)).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    cells = [[c.strip() for c in line.replace(r"\|", "/").split("|")[1:-1]] for line in lines]
    assert cells[0] == list(shown.columns) and set("".join(cells[1])) == {"-"}
    assert [[c.replace("|", "/") for c in row] for row in shown.to_numpy().tolist()] == cells[2:]
    rows = {row["model"]: row for row in (dict(zip(cells[0], r, strict=True)) for r in cells[2:])}
    mean, half = mean_interval([0.0, 1.0])
    assert rows["tiny"]["forgetting"] == f"{mean:.1f} ± {half:.1f}"
    assert rows["tiny"]["sparsity"] == "0.12" and rows["tiny"]["seeds"] == "2"
    assert rows["a/b"]["forgetting"] == f"{results[2].metrics['forgetting']:.1f}"
    assert readable(pd.DataFrame({"a": [None]})).iloc[0, 0] == "–"


def test_origins_are_told_apart_and_published_numbers_have_none():
    here = provenance(command="x")
    elsewhere = json.loads(json.dumps(here)) | {"cpu": "another"}
    results = [run(seed=seed) for seed in range(4)]
    for result, origin in zip(results, [here, here, elsewhere, here], strict=True):
        result.provenance = origin
    found = provenance_table([*results, published("finetune", 14.5)])
    assert found.loc["runs"].tolist() == [3, 1]
    assert found.loc["seeds"].tolist() == ["0, 1, 3", "2"]
    assert found.loc["hardware", 1].startswith("another")
    assert found.loc["torch", 0] == here["packages"]["torch"]
    assert provenance_table([published("finetune", 14.5)]).empty
