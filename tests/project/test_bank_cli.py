"""The command line of task banks: files in, JSON lines out, and one line for each mistake."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from bitstack_nb import TaskBank
from bitstack_nb.cli import main
from bitstack_nb.cli_bank import read_table

ROWS = [("red sun", "warm"), ("blue moon", "cold"), ("red rain", "warm"), ("blue, snow", "cold")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The same rows as CSV, JSONL and Parquet."""
    folder = tmp_path_factory.mktemp("data")
    lines = ["text,label", *(f'"{text}",{label}' for text, label in ROWS * 4)]
    (folder / "train.csv").write_text("\ufeff" + "\n".join(lines))
    rows = [{"text": text, "label": label} for text, label in ROWS * 4]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    features = Features({"text": Value("string"), "label": ClassLabel(names=["cold", "warm"])})
    Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture(scope="module")
def bank(data, folders, tmp_path_factory):
    """The folder of a bank that three commands have filled, one of them a process of its own."""
    folder = str(tmp_path_factory.mktemp("bank") / "bank")
    learn = ["bank", "learn", folder, "--epochs", "1", "--quiet"]
    base = ["--base", str(folders["bert"]), "--sparsity", "0.05"]
    first = [*learn, "--name", "csv", "--data", str(data / "train.csv"), *base]
    command = [sys.executable, "-m", "bitstack_nb", *first, "--held", str(data / "train.jsonl")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "csv: learnt from 16 texts, held-out accuracy" in done.stdout
    for kind in ("jsonl", "parquet"):
        assert main([*learn, "--name", kind, "--data", str(data / f"train.{kind}")]) == 0
    return folder


def test_predictions_are_json_lines(bank, capsys, monkeypatch, data):
    expected = TaskBank.from_pretrained(bank).predict(["red", "blue, moon"], task="csv")
    predict, task = ["bank", "predict", bank], ["--task", "csv"]
    assert main([*predict, "red", "blue, moon", *task]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("red\nblue, moon\n"))
    assert main([*predict, *task]) == 0
    assert list(map(json.loads, capsys.readouterr().out.splitlines())) == expected * 2
    assert main(["bank", "predict", bank, "--data", str(data / "train.parquet")]) == 0
    found = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert len(found) == 16 and {answer["task"] for answer in found} <= {"csv", "jsonl", "parquet"}


def test_list_and_remove(bank, capsys):
    assert main(["bank", "list", bank]) == 0
    said = capsys.readouterr().out
    assert "3 tasks on" in said and "parquet: cold, warm (" in said
    assert main(["bank", "remove", bank, "--name", "jsonl"]) == 0
    assert main(["bank", "list", bank, "--json"]) == 0
    record = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert [task["name"] for task in record["tasks"]] == ["csv", "parquet"]
    assert record["tasks"][0]["digest"] == TaskBank.from_pretrained(bank).digests["csv"]


def test_columns_and_names_of_labels(data, folders, tmp_path, capsys):
    rows = [{"a": "red", "b": "sun", "right": "1"}, {"a": "blue", "b": "moon", "right": "0"}] * 4
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder, file = str(tmp_path / "bank"), str(tmp_path / "pairs.jsonl")
    options = ["--base", str(folders["roberta"]), "--sparsity", "0.05", "--epochs", "1", "--quiet"]
    options += ["--text", "a,b", "--label", "right", "--labels", "no,yes", "--max-length", "12"]
    assert main(["bank", "learn", folder, "--name", "pairs", "--data", file, *options]) == 0
    assert main(["bank", "predict", folder, "--data", file, "--text", "a,b"]) == 0
    answers = list(map(json.loads, capsys.readouterr().out.splitlines()[1:]))
    assert len(answers) == 8 and {answer["label"] for answer in answers} <= {"no", "yes"}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("learn {folder}/new --name a --data {data}/train.csv", "no bank: name a backbone"),
        ("learn {bank} --name csv --data {data}/train.csv --quiet", "a task 'csv' already"),
        ("learn {bank} --name a --data {data}/train.txt", "expected a .csv"),
        ("learn {bank} --name a --data {data}/none.csv", "No such file"),
        ("learn {bank} --name a --data {data}/train.csv --text body", "no column 'body'"),
        ("predict {bank} red --task news", "no task 'news'"),
        ("predict {bank} --data {data}/train.csv --text body", "no column 'body'"),
        ("remove {bank} --name news", "no task 'news'"),
        ("remove me/bank --name csv", "me/bank holds no bank"),
        ("list {folder}", "the folder has no bank.json"),
    ],
)
def test_mistakes_get_one_line(bank, data, tmp_path, capsys, command, message):
    words = command.format(bank=bank, data=data, folder=tmp_path).split()
    assert main(["bank", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,label\nx", "row 0 has more or fewer columns"),
        ("a.csv", b"text,label\nx,y,z", "row 0 has more or fewer columns"),
        ("a.csv", b"text,label\n\xff,y", "is not UTF-8"),
        ("a.jsonl", b'{"text": 1}\n{"text', "line 2 is no JSON"),
    ],
)
def test_damaged_files_are_named_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / name)


def test_measured_accuracies_are_kept_as_json(folders, tmp_path, capsys):
    options = ["--model", str(folders["bert"]), "--data", "embedded", "--tasks", "imdb,ag_news"]
    options += ["--train-size", "16", "--test-size", "16", "--epochs", "1", "--max-length", "8"]
    output = ["--output", str(tmp_path), "--quiet", "--seeds", "3"]
    assert main(["bank", "measure", *options, "--sparsity", "0.05", *output]) == 0
    assert "| all tasks |" in capsys.readouterr().out
    found = json.loads((tmp_path / "bank-seed3.json").read_text())
    assert found["settings"]["seed"] == 3 and found["provenance"]["command"]
    assert {*found["tasks"]} == {"imdb", "ag_news"}
    for task in found["tasks"].values():
        assert task["chosen"] <= task["routed"] and task["texts"] == 16 and task["bytes"] > 1000
        assert {"known", "chosen", "routed", "lost", "found"} < {*task}


def test_the_code_of_the_page_runs(folders, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "bank.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    code = code.replace("distilbert-base-uncased", str(folders["distilbert"]))
    texts = [text for text, _ in ROWS]
    given = {"train": ROWS, "held_out": ROWS, "test": ROWS, "texts": texts}
    monkeypatch.chdir(tmp_path)
    exec(code, {**given, "tasks": ["reviews", None, "reviews", None]})
