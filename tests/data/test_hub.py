"""A model and a dataset from a Hub on this machine, by the real clients, and what they refuse.

The clients read HF_ENDPOINT when they are imported, so a process of its own asks everything once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel
from hub_server import COMMIT, serve
from toy_data import SIZES, TASK, write_toy

from bitstack_nb.data import find_task, load_backbone, load_task

FETCHED = {"train_size": 0.25, "test_size": 0.2, "seed": 0}
WHOLE = {"train_size": 1.0, "test_size": 1.0}
# One seed has to name the same streamed rows with every version of datasets.
STREAMED = "79f5e7976383c8ceec74f4da878d0d38631e1f6cceea0768779d1bcd3b64278d"


def client() -> None:
    """Asks the Hub for models and datasets and prints the answers as JSON."""
    answers: dict[str, dict] = {}

    def model(key: str, name: str) -> None:
        ask(key, lambda: load_backbone(name, max_length=8, seed=0))

    def dataset(key: str, name: str, changes: dict | None = None, **sizes: object) -> None:
        task = replace(TASK, dataset=name, **(changes or {}))
        ask(key, lambda: load_task(task, "hub", **(SIZES | sizes)))

    def ask(key: str, load) -> None:
        start = time.monotonic()
        try:
            got = load()
            answers[key] = {"provenance": got.provenance}
            if hasattr(got, "train"):
                answers[key] |= {"train": got.train.to_list(), "test": got.test.to_list()}
        except ValueError as error:
            answers[key] = {"error": str(error), "kind": type(error).__name__}
        answers[key]["seconds"] = time.monotonic() - start

    model("model", "someone/model")
    dataset("streamed", "someone/toy")
    home = Path(os.environ["HF_HOME"])
    answers["files"] = {"names": [file.name for file in home.rglob("*.*")]}
    dataset("more", "someone/toy", train_size=60)
    dataset("head", "someone/toy", sampling="head")
    dataset("held", "someone/toy", evaluate_on="heldout")
    dataset("fetched", "someone/toy", **FETCHED)
    dataset("too large", "someone/toy", train_size=121)
    for owner in ("gated", "expired", "busy", "nobody"):
        model(f"model of {owner}", f"{owner}/it")
        dataset(f"dataset of {owner}", f"{owner}/it")
    dataset("configurations", "someone/several")
    dataset("no test", "someone/untested")
    dataset("no test, whole", "someone/untested", **FETCHED)
    dataset("named test", "someone/untested", {"test_split": "validation", "pair": True})
    for kind in ("swapped", "latin", "csv"):
        for how in ({"train_size": 120}, WHOLE):
            dataset(f"{kind}{' whole' if how is WHOLE else ''}", f"someone/{kind}", **how)
    urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/stop").read()
    model("cached model", "someone/model")
    dataset("cached fetched", "someone/toy", **FETCHED)
    dataset("cached head", "someone/toy", sampling="head")
    model("model without network", "someone/other")
    ask("dataset without network", lambda: load_task(find_task("imdb"), "hub", **SIZES))
    json.dump(answers, sys.stdout)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the Hub."""
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def answers(root: Path, folders: dict[str, Path]) -> dict[str, dict]:
    model = root / "models" / "someone" / "model"
    shutil.copytree(folders["gpt2"], model)
    (model / "onnx").mkdir()
    for unused in ("pytorch_model.bin", "onnx/other.json"):
        (model / unused).write_bytes(b"never read")
    write_toy(root / "datasets" / "someone")
    untested = shutil.copytree(root / "datasets/someone/toy", root / "datasets/someone/untested")
    (untested / "test.parquet").rename(untested / "validation.parquet")
    several = shutil.copytree(root / "datasets/someone/toy", root / "datasets/someone/several")
    configs = [{"config_name": n, "data_files": "*.parquet"} for n in ("de", "en")]
    (several / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    write_faulty(root / "datasets" / "someone")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    environment |= {"HF_ENDPOINT": serve(root), "HF_HOME": str(root / "home"), "PYTHONPATH": path}
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def write_faulty(root: Path) -> None:
    """Datasets whose test file has other classes, or text that is not UTF-8 (in two formats)."""
    for name in ("swapped", "latin", "csv"):
        shutil.copytree(root / "toy", root / name)
    for split, names in (("train", ["a", "b", "c"]), ("test", ["c", "b", "a"])):
        file = str(root / "swapped" / f"{split}.parquet")
        data = datasets.Dataset(pq.read_table(file)).cast_column("kind", ClassLabel(names=names))
        data.to_parquet(file)
    rows = pq.read_table(root / "latin" / "train.parquet").to_pydict()
    texts = [text.encode() for text in rows["title"][:-1]] + ["né".encode("latin-1")]
    rows["title"] = pa.array(texts, pa.binary()).view(pa.string())
    pq.write_table(pa.table(rows), root / "latin" / "train.parquet")
    for split in ("train", "test"):
        (root / "csv" / f"{split}.parquet").unlink()
        text = "title,body,kind\n" + "né,,0\nno,,1\nyes,,2\n" * 20
        (root / "csv" / f"{split}.csv").write_bytes(text.encode("latin-1"))


def test_a_model_is_downloaded_with_weights_of_one_kind(answers):
    made = answers["model"]["provenance"]
    assert (made["source"], made["revision"]) == ("hub", COMMIT)
    names = answers["files"]["names"]
    assert "model.safetensors" in names
    assert not {"pytorch_model.bin", "other.json"} & set(names)


def test_a_streamed_sample_is_named_by_its_seed(answers):
    streamed = answers["streamed"]
    record = streamed["provenance"]
    assert (record["source"], record["revision"]) == ("hub", COMMIT)
    assert record["sample"]["train"] == STREAMED
    assert Counter(row["label"] for row in streamed["train"]) == {0: 10, 1: 10, 2: 10}
    assert answers["more"]["test"] == streamed["test"]
    assert not [name for name in answers["files"]["names"] if name.endswith(".parquet")]


def test_held_out_rows_are_of_the_training_split(answers):
    held = answers["held"]
    assert held["train"] == answers["streamed"]["train"]
    trained_on = {row["text"] for row in held["train"]}
    assert len(held["test"]) == 12
    assert all(row["text"].startswith("train") for row in held["test"])
    assert all(row["text"] not in trained_on for row in held["test"])


def test_hub_and_folder_give_the_same_rows(answers, root, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    folder = str(root / "datasets" / "someone")
    head = load_task(TASK, folder, **SIZES, sampling="head")
    assert answers["head"]["train"] == head.train.to_list()
    assert answers["fetched"]["train"] == load_task(TASK, folder, **FETCHED).train.to_list()
    assert re.search("121 rows asked for.* holds 120", answers["too large"]["error"])


@pytest.mark.parametrize(
    ("owner", "said"),
    [
        ("gated", "gated/it is gated: accept its licence on https://.*gated/it and log in"),
        ("expired", "expired/it: the Hub refused your token .*expired.*: renew it or unset"),
        ("busy", "busy/it: the Hub answered HTTP 503: try again later, or "),
        ("nobody", "no {kind} 'nobody/it' on the Hub.*: check the name on https://"),
    ],
)
@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_refusal_is_one_line_with_a_way_out(answers, kind, owner, said):
    answer = answers[f"{kind} of {owner}"]
    assert answer["kind"] == {"model": "BackboneError", "dataset": "DataError"}[kind]
    assert re.fullmatch(said.format(kind=kind) + ".*", answer["error"])


def test_several_configurations_are_named(answers):
    said = r"someone/several has several configurations: choose with Task\(config.* 'de', 'en'"
    assert re.fullmatch(said, answers["configurations"]["error"])


def test_without_a_test_split_the_way_out_is_held_out(answers):
    for key in ("no test", "no test, whole"):
        said = r"no test split, only train, validation: name .*Task\(test_split=\.\.\.\)\), or eval"
        assert re.search(said, answers[key]["error"])


def test_another_split_can_be_the_test_split(answers):
    made, streamed = answers["named test"], answers["streamed"]
    for split in ("train", "test"):
        joined = [f"{row['text']} {row['text_pair']}".strip() for row in made[split]]
        assert joined == [row["text"] for row in streamed[split]]


@pytest.mark.parametrize("how", ["", " whole"])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("swapped", r".*train.parquet numbers the classes of 'kind' as \['a', 'b', 'c'\], .*\['c'"),
        ("latin", r"someone/latin: column 'title' is not UTF-8 in row 119 of train: save the"),
        ("csv", r"someone/csv: a file on the Hub is not UTF-8 \(.*0xe9.*\): save it as UTF-8, or"),
    ],
)
def test_a_dataset_with_a_fault_says_where(answers, kind, how, said):
    assert re.match(said, answers[f"{kind}{how}"]["error"])


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_without_network_the_error_comes_at_once(answers, kind):
    answer = answers[f"{kind} without network"]
    assert re.fullmatch(
        r".*: no connection to the Hub and no copy in the cache: .*", answer["error"]
    )
    assert answer["seconds"] < 5  # the clients alone retry for 20 s


def test_without_network_the_caches_are_read(answers):
    assert answers["cached model"]["provenance"] == answers["model"]["provenance"]
    for name in ("fetched", "head"):
        for what in ("provenance", "train", "test"):
            assert answers[f"cached {name}"][what] == answers[name][what]
    assert answers["cached model"]["seconds"] < 5


if __name__ == "__main__":
    client()
