"""Results: round trips, files that are damaged or cannot be written, tables, provenance."""

from __future__ import annotations

import json
import math
import random
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch

import bitstack_nb
from bitstack_nb.results.metrics import mean_interval, summarize
from bitstack_nb.results.provenance import git_state, provenance
from bitstack_nb.results.result import FORMAT, Result, ResultError, load_results
from bitstack_nb.results.tables import format_table, provenance_table, readable, table

TASKS = [{"name": "imdb", "num_labels": 2}, {"name": "ag_news", "num_labels": 4}]


def make(strategy="bitstack", *, last=60.0, published=None, locked=20.0, **settings) -> Result:
    """A result of two tasks; ``last`` is task 1 after the last, ``settings`` go to the protocol."""
    masks = {"sparsity": 0.12, "budget": "union", "n_batches": 4} if strategy == "bitstack" else {}
    protocol = {"strategy": strategy, "model": "tiny", "data": "hub", "tasks": TASKS, "seed": 0}
    protocol |= masks | settings
    matrix = [[80.0, math.nan], [last, 90.0]]
    stats = [{"frozen_pct": locked / 2, "locked_pct": 5.0}, {"frozen_pct": locked, "locked_pct": 9}]
    record = {"layer": 0, "module": "attn", "task": 1, "eligible": np.int64(9), "locked": 3}
    return Result(
        protocol=protocol,
        matrix=matrix,
        metrics=summarize(matrix),
        locks=[record, record | {"layer": None}] if masks else [],
        lock_stats=stats if masks else [],
        times={"train": [1.0, 2.5], "total": np.float32(3.5)},
        peak_memory={"process": 100.0},
        provenance={"published": published} if published else {"command": "x"},
    )


def test_a_saved_result_comes_back_equal(tmp_path):
    result = make(note="naïve – ünïcode")
    path = tmp_path / "new" / "run.json"
    result.save(path)
    assert Result.load(path) == result
    Result.load(path).save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_the_file_is_strict_json_a_record_a_line(tmp_path):
    result = make(extra=[math.inf, np.nan], array=np.arange(3))
    result.save(tmp_path / "run.json")
    text = (tmp_path / "run.json").read_text()

    def refuse(constant):
        raise AssertionError(constant)

    data = json.loads(text, parse_constant=refuse)
    assert data["format"] == FORMAT
    assert data["protocol"]["extra"] == [None, None] and data["protocol"]["array"] == [0, 1, 2]
    lines = [line.strip().rstrip(",") for line in text.splitlines()]
    for record in [
        *data["matrix"],
        *data["locks"],
        *data["lock_stats"],
        *data["protocol"]["tasks"],
    ]:
        assert json.dumps(record) in lines


def test_a_failing_write_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")  # not on Windows
    path = tmp_path / "run.json"
    make().save(path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as a full disk would stop it
    try:
        with pytest.raises(OSError, match=r"cannot write the result.*room") as caught:
            make(seed=1).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


def test_a_path_that_is_a_folder_is_named(tmp_path):
    path = tmp_path / "run.json"
    path.mkdir()
    with pytest.raises(OSError, match=r"cannot write the result.*run\.json"):
        make().save(path)
    assert [*tmp_path.iterdir()] == [path]


def change(**entries):
    return lambda text: json.dumps(json.loads(text) | entries)


def without(key):
    return lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != key})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], "truncated"),
        (lambda text: "", "truncated"),
        (lambda text: b"\xff\xfe\x00", "not JSON"),
        (lambda text: "[1, 2]", "not a result of bitstack_nb"),
        (lambda text: '{"accuracy": 3}', "not a result of bitstack_nb"),
        (change(format=FORMAT + 1), f"format {FORMAT + 1}, this version reads {FORMAT}"),
        (without("matrix"), "missing .*matrix"),
        (without("locks"), "missing .*locks"),
        (change(colour="red"), "not known here .*colour"),
        (change(protocol=[]), "protocol must be a dict"),
        (change(protocol={"seed": 1}), "needs a strategy"),
        (change(protocol={"strategy": "x", "tasks": ["imdb"]}), "dicts with a name.*imdb"),
        (change(metrics={"forgetting": "3 %"}), "metrics.forgetting must be a number"),
        (change(matrix=None), "published"),
        (change(matrix=[[1.0]]), "1 rows.*2 tasks"),
        (change(matrix=[[1.0, None], [101, 2]]), "101"),
    ],
)
def test_a_damaged_file_is_named_with_its_problem(tmp_path, damage, words):
    path = tmp_path / "run.json"
    make().save(path)
    damaged = damage(path.read_text())
    path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    with pytest.raises(ResultError, match=words) as caught:
        Result.load(path)
    assert str(path) in str(caught.value)


def test_values_that_json_cannot_hold_are_named():
    with pytest.raises(TypeError, match=r"protocol\.dtypes\[0\] is a dtype"):
        make(dtypes=[torch.float32])


def test_published_numbers_need_no_matrix(tmp_path):
    path = tmp_path / "published.json"
    content = {
        "format": FORMAT,
        "protocol": {"strategy": "bitstack", "model": "gpt2"},
        "matrix": None,
        "metrics": {"forgetting": 3.8},
        "provenance": {"published": "the paper, table 1"},
    }
    path.write_text(json.dumps(content))
    result = Result.load(path)
    assert result.matrix is None and result.metrics == {"forgetting": 3.8}
    result.save(path)
    assert Result.load(path) == result
    row = table([result]).iloc[0]
    assert row["forgetting"] == 3.8 and math.isnan(row["average_accuracy"])
    assert row["published"] == "the paper, table 1"


def test_load_results_is_recursive_and_sorted(tmp_path):
    for seed, name in enumerate(["b/one.json", "a.json", "b/c/two.json"]):
        make(seed=seed).save(tmp_path / name)
    # An unfinished run's state is no result.
    state = tmp_path / "b" / "x.state" / "stage-1" / "numbers.json"
    state.parent.mkdir(parents=True)
    state.write_text("{}")
    (tmp_path / "notes.txt").write_text("no result")
    seeds = [result.protocol["seed"] for result in load_results(tmp_path)]
    assert seeds == [1, 2, 0]
    again = load_results(tmp_path / "b" / "c" / ".." / "one.json", tmp_path)
    assert [result.protocol["seed"] for result in again] == [0, 1, 2]


def test_load_results_names_what_is_wrong(tmp_path):
    with pytest.raises(ResultError, match="no result"):
        load_results(tmp_path)
    with pytest.raises(ResultError, match=r"nowhere"):
        load_results(tmp_path / "nowhere")
    make().save(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ResultError, match=r"b\.json"):
        load_results(tmp_path)


def test_a_row_holds_the_seeds_of_one_configuration():
    lasts = [60.0, 66.0, 63.0]
    results = [make(seed=seed, last=last) for seed, last in enumerate(lasts)]
    results += [make("finetune", last=40.0), make(sparsity=0.4, locked=50.0)]
    frame = table(results)
    assert list(frame["strategy"]) == ["bitstack", "bitstack", "finetune"]
    assert list(frame["sparsity"])[:2] == [0.12, 0.4] and math.isnan(frame["sparsity"][2])
    assert list(frame["seeds"]) == [3, 1, 1]
    row = frame.iloc[0]
    assert (row["first_task_after_last"], row["first_task_after_last_interval"]) == pytest.approx(
        mean_interval(lasts)
    )
    assert row["forgetting"] == pytest.approx(80 - 63)
    assert (row["locked_of_eligible"], row["locked_of_all"]) == (20, 9)
    assert math.isnan(frame["forgetting_interval"][1])
    assert math.isnan(frame["locked_of_eligible"][2])
    # Equal everywhere, or a setting that fine-tuning does not have: nothing to show.
    assert not {"model", "data", "tasks", "n_batches", "seed", "published"} & set(frame.columns)


def test_only_settings_that_differ_are_shown():
    results = [make(learning_rate=5e-5), make(learning_rate=2e-4), make(learning_rate=5e-5, seed=1)]
    frame = table(results)
    assert list(frame["learning_rate"]) == [5e-5, 2e-4] and list(frame["seeds"]) == [2, 1]
    assert "model" not in frame
    frame = table([make(epochs=1), make()])
    assert list(frame["seeds"]) == [1, 1] and frame["epochs"].notna().tolist() == [False, True]
    # Absent and null are the same setting.
    assert list(table([make("joint", budget=None), make("joint", seed=1)])["seeds"]) == [2]


def test_the_order_of_tasks_belongs_to_the_seed():
    turned = make(tasks=TASKS[::-1])
    assert list(table([make(), turned])["seeds"]) == [2]
    other = make(tasks=[TASKS[0], {"name": "yelp", "num_labels": 5}])
    frame = table([make(), turned, other])
    assert list(zip(frame["tasks"], frame["seeds"], strict=True)) == [
        ("ag_news, imdb", 2),
        ("imdb, yelp", 1),
    ]


def test_one_seed_counts_once():
    frame = table([make(), make()])
    assert list(frame["seeds"]) == [1]
    with pytest.raises(ResultError, match=r"seed 0 .*bitstack.* two different results"):
        table([make(), make(last=61.0)])


def test_published_rows_stay_apart_and_are_marked():
    frame = table([make(), make(last=78.0, published="the paper")])
    assert list(frame["seeds"]) == [1, 1]
    assert "the paper" in format_table(frame)


def test_embedded_data_is_called_synthetic():
    assert "embedded (synthetic)" in format_table(table([make(data="embedded")]))


def test_an_average_is_missing_where_a_seed_lacks_it():
    lacking = make(seed=1)
    lacking.metrics["forgetting"] = None
    row = table([make(), lacking]).iloc[0]
    assert math.isnan(row["forgetting"]) and row["average_accuracy"] == 75


def test_storage_is_shown_where_a_run_has_recorded_it():
    assert "storage_per_task" not in table([make()])
    stored = make("lora", budget=None)
    stored.storage = {"bytes": 6000}
    frame = table([make(), stored]).set_index("strategy")["storage_per_task"]
    assert frame["lora"] == 6 / len(stored.protocol["tasks"]) and math.isnan(frame["bitstack"])
    assert "kB per task" in format_table(table([stored]))


def test_time_per_step_is_shown_where_a_run_has_counted_its_steps():
    timed = make("lora", budget=None)
    timed.times = {"train": [1.0, 3.0], "step": [0.1, 0.3]}
    assert table([timed])["time_per_step"].item() == pytest.approx(200)  # ms
    others = [make("lora", budget=None, seed=seed) for seed in (1, 2)]
    others[0].metrics["average_accuracy"] = None
    means = table([timed, *others]).iloc[0]
    assert means["time_per_step"] == pytest.approx(200) and math.isnan(means["average_accuracy"])
    assert "time_per_step" not in table([timed, make()])  # which has none to compare it with
    timed.times["step"][0] = None  # begun by a version that did not count
    assert "time_per_step" not in table([make(), timed])


def test_a_table_needs_results():
    with pytest.raises(ResultError, match="at least one"):
        table([])


def test_format_table_is_aligned_markdown():
    results = [make(last=60.0), make(last=62.0, seed=1), make("joint", model="a|b")]
    lines = format_table(table(results)).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    cells = [[c.strip() for c in line.replace(r"\|", "/").split("|")[1:-1]] for line in lines]
    assert len({len(row) for row in cells}) == 1 and set("".join(cells[1])) == {"-"}
    rows = [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
    mean, half = mean_interval([60.0, 62.0])
    assert rows[0]["task 1 after the last"] == f"{mean:.1f} ± {half:.1f}"
    assert rows[0]["sparsity"] == "0.12" and rows[0]["seeds"] == "2"
    assert rows[1]["model"] == "a/b" and rows[1]["sparsity"] == "–"
    assert rows[1]["average accuracy"] == "75.0" and rows[1]["locked % of all"] == "–"


def test_readable_says_what_format_table_prints():
    results = [make(seed=seed, last=60.0 + seed) for seed in range(3)] + [make("finetune")]
    shown = readable(table(results))
    lines = format_table(table(results)).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == list(shown.columns)
    for line, row in zip(lines[2:], shown.to_numpy().tolist(), strict=True):
        assert [cell.strip() for cell in line.strip("|").split("|")] == row


def test_origins_are_told_apart_and_published_numbers_have_none():
    here, elsewhere = provenance(command="x"), {**provenance(command="x"), "cpu": "another"}
    results = [make(seed=seed) for seed in range(4)]
    for result, origin in zip(results, [here, here, elsewhere, here], strict=True):
        result.provenance = origin
    found = provenance_table([*results, make("finetune", published="a paper")])
    assert found.loc["runs"].tolist() == [3, 1]
    assert found.loc["seeds"].tolist() == ["0, 1, 3", "2"]
    assert found.loc["hardware", 1].startswith("another")
    assert found.loc["torch", 0] == here["packages"]["torch"]


def test_provenance_describes_this_process_and_leaves_the_rng():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    found = provenance()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"] == torch.__version__
    assert found["packages"]["numpy"] == np.__version__
    assert found["packages"]["bitstack_nb"] == bitstack_nb.__version__
    assert found["torch_threads"] == torch.get_num_threads()
    assert found["cpu"] and found["cores"] >= 1
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert shlex.split(found["command"]) == ["python", *sys.orig_argv[1:]]
    assert found["date"].endswith("+00:00")
    assert provenance(command="python -m bitstack_nb run")["command"].endswith("run")


def test_provenance_knows_the_commit_and_whether_the_code_differs(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True)

    file = tmp_path / "package" / "code.py"
    file.parent.mkdir()
    file.write_text("x = 1")
    assert git_state(file) is None  # no repository
    git("init", "-q")
    assert git_state(file) is None  # not tracked: some other project's repository
    git("add", "package/code.py")
    git("commit", "-q", "-m", "one")
    clean = git_state(file)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "result.json").write_text("{}")
    assert git_state(file) == clean
    (file.parent / "more.py").write_text("y = 2")
    assert git_state(file) == clean | {"dirty": True}
