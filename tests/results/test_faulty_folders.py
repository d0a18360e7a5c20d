"""Results as they lie on disks: hidden copies, byte order marks, moved and mixed folders."""

from __future__ import annotations

import codecs
import json

import pytest
from toy_results import run

from bitstack_nb.results import Result, ResultError, frame, load_results, paired_table, table
from bitstack_nb.results.packed import RUNS, pack
from bitstack_nb.results.tables import provenance_table


def made(strategy="finetune", seed=0, *, weights="a", texts="b", data="/here/texts", **origin):
    """A run on a folder of data and one of weights, with these digests."""
    result = run(strategy, seed, data=data, model=f"{data}/mini")
    result.provenance = result.provenance | {
        "model": {"source": "folder", "sha256": {"model.safetensors": weights}},
        "data": {name: {"source": "folder", "sha256": {f"{name}.parquet": texts}} for name in "xy"},
        **origin,
    }
    return result


def test_hidden_copies_are_left_out(tmp_path):
    folder = tmp_path / ".hidden" / "runs"
    run().save(folder / "a.json")
    run().save(folder / ".ipynb_checkpoints" / "a-checkpoint.json")
    (folder / "._a.json").write_bytes(b"\0\5\26\7Mac OS X")
    (folder / f"._{RUNS}").write_bytes(b"\0\5\26\7Mac OS X")
    assert load_results(folder) == [run()]


def test_byte_order_marks_do_no_harm(tmp_path):
    run().save(tmp_path / "a.json")
    pack({"b": json.loads((tmp_path / "a.json").read_text())}, tmp_path / "packed")
    for file in (tmp_path / "a.json", tmp_path / "packed" / RUNS):
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    assert load_results(tmp_path) == [run(), run()]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run().save("~/runs/a.json")
    assert (tmp_path / "runs" / "a.json").exists()
    assert load_results("~/runs") == [Result.load("~/runs/a.json")] == [run()]


def test_two_results_of_one_run_are_both_named(tmp_path):
    for name, weights in (("one", 1), ("two", 2)):
        result = run()
        result.times = {"total": weights}
        result.save(tmp_path / name / "a.json")
    with pytest.raises(ResultError, match=r"one/a\.json and .*two/a\.json"):
        frame(load_results(tmp_path))


def test_other_places_of_the_same_files_are_one_configuration():
    runs = [made(seed=0), made(seed=1, data="/there/texts"), made(seed=2, data="texts")]
    assert table(runs)["seeds"].tolist() == [3]


@pytest.mark.parametrize("other", [{"weights": "other"}, {"texts": "other"}])
def test_runs_of_other_files_are_neither_averaged_nor_paired(other):
    rows = table([made(seed=0), made(seed=1), made(seed=2, **other)])
    assert sorted(rows["seeds"]) == [1, 2] and rows["inputs"].nunique() == 2
    with pytest.raises(ResultError, match="nothing to pair"):
        paired_table([made("finetune"), made("replay", **other)])


def test_a_run_that_was_resumed_elsewhere_shows_both_origins():
    later = {"stage": 1, "cpu": "another", "packages": {"torch": "2.14.0"}}
    shown = provenance_table([made(resumed=[later])])[0]
    assert shown["hardware"] == "toy, 2 cores; then another, 2 cores"
    assert shown["torch"] == "2.13.0; then 2.14.0"
