"""Results on disk: round trips, files that are damaged or cannot be written, packed folders."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from toy_results import run

from bitstack_nb.results import Result, ResultError, load_results
from bitstack_nb.results.packed import ARRAYS, RUNS, pack
from bitstack_nb.results.result import FORMAT


def test_a_saved_result_comes_back_equal_as_strict_json_a_record_a_line(tmp_path):
    result = run(note="naïve – ünïcode", extra=[math.inf, np.nan], array=np.arange(3))
    path = tmp_path / "new" / "run.json"
    result.save(path)
    assert Result.load(path) == result
    Result.load(path).save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()

    def refuse(constant):
        raise AssertionError(constant)

    data = json.loads(path.read_text(), parse_constant=refuse)
    protocol = data["protocol"]
    assert (protocol["extra"], protocol["array"]) == ([None, None], [0, 1, 2])
    lines = [line.strip().rstrip(",") for line in path.read_text().splitlines()]
    for record in [*data["matrix"], *data["locks"], *data["lock_stats"], *protocol["tasks"]]:
        assert json.dumps(record) in lines


def test_a_failing_write_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")  # not on Windows
    path = tmp_path / "run.json"
    run().save(path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as a full disk would stop it
    try:
        with pytest.raises(OSError, match=r"cannot write the result.*room") as caught:
            run(seed=1).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


def change(**entries):
    return lambda text: json.dumps(json.loads(text) | entries)


def without(key):
    return lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != key})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], "truncated"),
        (lambda text: "[1, 2]", "not a result of bitstack_nb"),
        (change(format=FORMAT + 1), f"format {FORMAT + 1}, this version reads {FORMAT}"),
        (without("matrix"), "missing .*matrix"),
        (change(colour="red"), "not known here .*colour"),
        (change(protocol={"seed": 1}), "needs a strategy"),
        (change(protocol={"strategy": "x", "seed": []}), "seed must be a number"),
        (change(protocol={"strategy": "x", "tasks": ["imdb"]}), "dicts with a name.*imdb"),
        (change(metrics={"forgetting": "3 %"}), "metrics.forgetting must be a number"),
        (change(matrix=None), "published"),
        (change(matrix=[[1.0]]), "1 rows.*3 tasks"),
        (change(predictions=[{"task": "imdb"}]), "predictions must be dicts of .*final"),
        (
            change(predictions=[{"task": "a", "labels": [1], "learnt": None, "final": "1"}]),
            "predictions.labels must be text",
        ),
    ],
)
def test_a_damaged_file_is_named_with_its_problem(tmp_path, damage, words):
    path = tmp_path / "run.json"
    run().save(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ResultError, match=words) as caught:
        Result.load(path)
    assert str(path) in str(caught.value)


def test_values_that_json_cannot_hold_are_named():
    with pytest.raises(TypeError, match=r"protocol\.dtypes\[0\] is a type"):
        run(dtypes=[float])


def test_load_results_is_recursive_and_sorted(tmp_path):
    for seed, name in enumerate(["b/one.json", "a.json", "b/c/two.json"]):
        run(seed=seed).save(tmp_path / name)
    # An unfinished run's state is no result.
    state = tmp_path / "b" / "x.state" / "stage-1" / "numbers.json"
    state.parent.mkdir(parents=True)
    state.write_text("{}")
    seeds = [result.protocol["seed"] for result in load_results(tmp_path)]
    assert seeds == [1, 2, 0]
    again = load_results(tmp_path / "b" / "c" / ".." / "one.json", tmp_path)
    assert [result.protocol["seed"] for result in again] == [0, 1, 2]


def test_load_results_names_what_is_wrong(tmp_path):
    with pytest.raises(ResultError, match="no result"):
        load_results(tmp_path)
    with pytest.raises(ResultError, match=r"nowhere"):
        load_results(tmp_path / "nowhere")
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ResultError, match=r"b\.json"):
        load_results(tmp_path)


@pytest.fixture
def packed(tmp_path):
    """Three results, packed in a folder."""
    results = {"a": run(seed=0), "b": run(seed=1), "c": run("joint")}
    results["c"].predictions[0]["learnt"] = None  # a stage of all tasks measures at its end only
    for name, result in results.items():
        result.save(tmp_path / name)
    pack({name: json.loads((tmp_path / name).read_text()) for name in results}, tmp_path / "packed")
    return tmp_path / "packed", [*results.values()]


def test_packed_runs_are_loaded_beside_others_and_keep_equal_values_once(packed):
    folder, results = packed
    assert load_results(folder / RUNS) == results
    run(seed=2).save(folder.parent / "one.json")
    assert load_results(folder.parent) == [run(seed=2), *results]
    lines = [json.loads(line) for line in (folder / RUNS).open()]
    assert [line["protocol"]["tasks"] for line in lines[1:]] == [{"as in line": 1}] * 2
    assert lines[0]["locks"]["eligible"] == lines[1]["locks"]["eligible"]
    stored = np.load(folder / ARRAYS)
    assert len({stored[name].tobytes() for name in stored}) == len(stored.files)


@pytest.mark.parametrize("damage", ["cut lines", "cut arrays", "no arrays", "other"])
def test_damaged_packed_runs_are_named(packed, damage):
    runs, arrays = packed[0] / RUNS, packed[0] / ARRAYS
    if damage == "cut lines":
        runs.write_text(runs.read_text()[:-20])
    elif damage == "cut arrays":
        arrays.write_bytes(arrays.read_bytes()[:200])
    elif damage == "no arrays":
        arrays.unlink()
    else:
        np.savez(arrays, other=np.zeros(1))
    with pytest.raises(ResultError, match=r"runs\.jsonl"):
        load_results(packed[0])


def test_results_and_tables_load_neither_torch_nor_transformers():
    code = (
        "import sys; from bitstack_nb.results import frame, load_results, paired_table, table\n"
        "import bitstack_nb.results.provenance as origin; origin.provenance()\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
