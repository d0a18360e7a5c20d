"""Runs and samples from a Hub that runs on this machine, by the real clients, while it fails.

They read HF_ENDPOINT when imported: one process of its own (`hub_client`) answers for most tests.
Each test finds empty caches.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import datasets
import pytest
from hub_server import HubServer, make_five, make_gpt2
from toy_data import SIZES, TASK, write_toy

from bitstack_nb.data.loading import load_task
from bitstack_nb.data.tasks import FIVE_TASKS, Task, find_task
from bitstack_nb.results.result import Result, load_results

ROOT = Path(__file__).parents[2]
RUN = ["run", "--strategy", "finetune", "--max-length", "8", "--data", "hub", "--model", "gpt2"]
ONE_TASK = [*RUN, "--tasks", "imdb", "--train-size", "8", "--test-size", "8", "--quiet"]
STREAMED = {"train_size": 1500, "test_size": 20, "seed": 0}  # of Yahoo's: into its second file
FETCHED = {"train_size": 0.1, "test_size": 0.04, "seed": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def server(folder: Path) -> HubServer:
    repositories = {**make_five(), "models/openai-community/gpt2": make_gpt2(folder / "gpt2")}
    write_toy(folder)
    toy = {file.name: file.read_bytes() for file in (folder / "toy").iterdir()}
    return HubServer({**repositories, "datasets/someone/toy": toy})


@pytest.fixture(scope="module", autouse=True)
def given_up(folder: Path) -> Iterator[subprocess.Popen]:
    """A command line that asks a Hub that always fails, with the real waits, beside the tests."""
    failing = HubServer()
    failing.fail("", 500)
    with failing.running():
        output = ["--output", str(folder / "never")]
        with start([*ONE_TASK, *output], failing, folder / "home") as run:
            yield run
            run.kill()


@pytest.fixture(scope="module")
def process(server: HubServer, folder: Path) -> Iterator[subprocess.Popen]:
    with server.running():  # for its port
        pass
    script = str(ROOT / "tests" / "hub_client.py")
    with popen([script], server, folder / "client") as client:
        yield client
        client.stdin.close()


@pytest.fixture
def forget(server: HubServer, folder: Path) -> Callable[[], None]:
    """Empties the caches; to those in memory a new commit is unknown."""

    def empty() -> None:
        server.renew()
        shutil.rmtree(folder / "client", ignore_errors=True)

    return empty


@pytest.fixture
def unplugged(server: HubServer, forget: Callable[[], None]) -> HubServer:
    """A Hub that cannot be reached, and nothing in the caches."""
    forget()
    return server


@pytest.fixture
def hub(unplugged: HubServer) -> Iterator[HubServer]:
    with unplugged.running():
        yield unplugged


@pytest.fixture
def ask(process: subprocess.Popen) -> Callable[..., dict]:
    """A command line (`main`), or a sample (`task`, `sizes`), with waits of split seconds."""

    def answer(**request: object) -> dict:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, "hub_client.py ended: see its traceback above"
        return json.loads(line)

    return answer


def popen(arguments: list[str], server: HubServer, home: Path) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if arguments[0] == "-m" else None,
        text=True,
    )


def start(arguments: list[str], server: HubServer, home: Path) -> subprocess.Popen:
    return popen(["-m", "bitstack_nb", *arguments], server, home)


def draw(ask: Callable[..., dict], name: str, sizes: dict) -> dict:
    return ask(task=asdict(find_task(name)), sizes=sizes)


def samples(result: Result) -> dict[str, dict]:
    return {name: data["sample"] for name, data in result.provenance["data"].items()}


def assert_one_line(answer: dict, *parts: str) -> None:
    assert answer["code"] == 2, answer
    (line,) = answer["stderr"].splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


# When all is well -------------------------------------------------------------------------------


def test_five_tasks_streamed(hub: HubServer, tmp_path: Path):
    sizes = ["--train-size", "28", "--test-size", "14"]
    run = start([*RUN, *sizes, "--output", str(tmp_path / "out")], hub, tmp_path / "home")
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert "| finetune " in out
    (result,) = load_results(tmp_path / "out")
    assert result.provenance["model"]["source"] == "hub"
    assert result.provenance["model"]["revision"] == hub.commit
    for task in FIVE_TASKS:
        data = result.provenance["data"][task.name]
        assert (data["source"], data["dataset"]) == ("hub", task.dataset)
        assert data["revision"] == hub.commit
        assert data["rows"] == {"train": 28, "test": 14}
        assert data["missing_classes"] == {"train": [], "test": []}
    # Neither whole splits nor weights in a second format were fetched.
    fetched = {file.suffix for file in (tmp_path / "home").rglob("*.*") if file.is_file()}
    assert ".safetensors" in fetched
    assert not fetched & {".arrow", ".parquet", ".bin"}


def test_five_tasks_fetched_whole_are_drawn_as_from_any_table(hub, ask, tmp_path):
    sizes = ["--train-size", "0.014", "--test-size", "0.03", "--output", str(tmp_path)]
    answer = ask(main=[*RUN, *sizes])
    assert answer["code"] == 0, answer["stderr"]
    (result,) = load_results(tmp_path)
    for task in FIVE_TASKS:
        made = load_task(task, "embedded", train_size=0.014, test_size=0.03, seed=0)
        assert samples(result)[task.name] == made.provenance["sample"]


def test_samples_are_pinned_to_their_commit_and_like_a_folders(hub, ask, folder, monkeypatch):
    def toy(**change: object) -> dict:
        return ask(task=asdict(TASK), sizes={**SIZES, **change})

    streamed, head = toy(), toy(sampling="head")
    assert streamed["provenance"]["source"] == "hub"
    assert streamed["provenance"]["revision"] == hub.commit
    assert Counter(row["label"] for row in streamed["train"]) == {0: 10, 1: 10, 2: 10}
    assert toy(train_size=60)["test"] == streamed["test"]
    held = toy(evaluate_on="heldout")
    assert held["train"] == streamed["train"]
    trained_on = {row["text"] for row in held["train"]}
    assert len(held["test"]) == 12
    assert all(row["text"] not in trained_on for row in held["test"])
    assert all(row["text"].startswith("train") for row in held["test"])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    # Where no order is drawn, or a whole table is, Hub and folder give the same rows.
    local = load_task(TASK, str(folder), **SIZES, sampling="head")
    assert head["train"] == local.train.to_list()
    local = load_task(TASK, str(folder), train_size=0.25, test_size=0.2, seed=0)
    assert toy(train_size=0.25, test_size=0.2)["train"] == local.train.to_list()
    large = toy(train_size=121)["error"]
    assert "121" in large
    assert "120" in large


# Failures that pass -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "status", "headers"),
    [
        (r"GET /api/datasets/stanfordnlp/imdb$", 500, {}),
        (r"README.md", 429, {"Retry_After": "0"}),
        (r"GET /cdn/datasets", 429, {"Retry_After": "1"}),
        (r"GET /api/models/gpt2", 500, {}),
        (r"HEAD .*/gpt2/resolve/.*/tokenizer_config.json", 500, {}),
        (r"GET /cdn/models", 429, {}),
        (r"GET /cdn/models", None, {}),
    ],
)
def test_a_run_outlasts_two_failures(hub, ask, tmp_path, pattern, status, headers):
    if status:
        hub.fail(pattern, status, times=2, **headers)
    else:
        hub.cut(pattern, times=2)
    answer = ask(main=[*ONE_TASK, "--verbose", "--output", str(tmp_path)])
    assert len(hub.failed) == 2
    assert answer["code"] == 0, answer["stderr"]
    # Of a broken download the client says so itself, and goes on where it was.
    expected = rf"HTTP {status} .*; trying again in" if status else "Trying to resume download"
    assert len(re.findall(expected, answer["stderr"])) >= 2
    (result,) = load_results(tmp_path)
    assert result.provenance["model"]["revision"] == hub.commit
    assert result.provenance["data"]["imdb"]["revision"] == hub.commit


@pytest.mark.parametrize("sizes", [STREAMED, FETCHED], ids=["streamed", "fetched"])
def test_the_sample_is_that_of_an_unbroken_stream_or_download(hub, ask, forget, sizes):
    whole = draw(ask, "yahoo", sizes)
    for fail_once in (
        lambda: hub.fail("GET .*train-00001", 500, times=1),
        lambda: hub.fail("GET .*train-00001", 503, times=3),
        lambda: hub.cut("GET /cdn/.*train-00001", times=1),
        lambda: hub.cut("GET /cdn/.*train-00000", times=1),
        lambda: hub.fail("GET .*test-00000", 429, times=1),
        lambda: hub.fail("GET .*/tree/", 500, times=1),
    ):
        forget()
        fail_once()
        again = draw(ask, "yahoo", sizes)
        assert hub.failed
        assert (again["train"], again["test"]) == (whole["train"], whole["test"])


# Failures that stay -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "status", "said"),
    [
        ("/api/datasets/stanfordnlp", 429, ("stanfordnlp/imdb", "HTTP 429", "--data embedded")),
        ("/api/datasets/stanfordnlp", 500, ("stanfordnlp/imdb", "HTTP 500", "--data embedded")),
        ("GET .*train-00000", 429, ("stanfordnlp/imdb", "HTTP 429", "--data FOLDER")),
        ("GET /cdn/datasets", 500, ("stanfordnlp/imdb", "HTTP 500", "--data FOLDER")),
        ("GET /cdn/datasets", 404, ("stanfordnlp/imdb", "404", "--data embedded")),
        ("/api/models/gpt2", 429, ("gpt2:", "HTTP 429", "tiny-gpt2")),
        ("/gpt2/resolve/.*/config.json", 500, ("gpt2:", "HTTP 500", "tiny-gpt2")),
        ("GET /cdn/models", 500, ("gpt2:", "HTTP 500", "tiny-gpt2")),
        ("/gpt2/resolve/.*/config.json", 404, ("gpt2:", "404", "tiny-gpt2")),
    ],
)
def test_what_keeps_failing_is_one_line(hub, ask, tmp_path, pattern, status, said):
    hub.fail(pattern, status, **({"X_Error_Code": "EntryNotFound"} if status == 404 else {}))
    output = tmp_path / "out"
    assert_one_line(ask(main=[*ONE_TASK, "--output", str(output)]), *said)
    assert len(hub.failed) == (1 if status == 404 else 5)
    assert not output.exists()


def test_a_split_that_cannot_be_fetched_leaves_nothing_and_is_one_line(hub, ask, tmp_path):
    hub.fail("GET /cdn/datasets", 500)
    sizes = ["--train-size", "0.5", "--test-size", "0.5", "--output", str(tmp_path / "out")]
    assert_one_line(ask(main=[*ONE_TASK, *sizes]), "stanfordnlp/imdb", "HTTP 500")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("pattern", "name"), [("/api/datasets", "stanfordnlp/imdb"), ("/cdn/models", "gpt2")]
)
def test_a_wait_beyond_patience_is_named_at_once(hub, ask, tmp_path, pattern, name):
    hub.fail(pattern, 429, Retry_After="300")
    answer = ask(main=[*ONE_TASK, "--output", str(tmp_path / "out")])
    assert_one_line(answer, name, "HTTP 429 too many requests, asks to wait 300 s")
    assert len(hub.failed) == 1


def test_an_unknown_dataset_or_model_is_one_line_at_once(hub, ask, tmp_path):
    unknown = Task(name="mine", dataset="someone/else", text=("text",), label="label", num_labels=2)
    answer = ask(task=asdict(unknown), sizes=SIZES)
    assert answer["kind"] == "DataError"
    assert re.fullmatch(r"no dataset 'someone/else' on the Hub.*owner/name", answer["error"])
    model = [*ONE_TASK, "--model", "someone/else", "--output", str(tmp_path / "out")]
    answer = ask(main=[*model, "--data", "embedded"])
    assert_one_line(answer, "someone/else", "check the name", "tiny-gpt2")
    assert answer["seconds"] < 5


def test_no_network_is_one_line_at_once(unplugged, ask, tmp_path):
    run = [*ONE_TASK, "--output", str(tmp_path / "out")]
    for change, said in (
        (["--tasks", "ag_news"], ("fancyzhx/ag_news", "--data embedded", "ag_news/train.parquet")),
        (["--model", "me/mine", "--data", "embedded"], ("me/mine", "connect", "tiny-gpt2")),
    ):
        answer = ask(main=[*run, *change])
        assert_one_line(answer, *said)
        assert answer["seconds"] < 5
    assert not (tmp_path / "out").exists()


# What is cached ---------------------------------------------------------------------------------


def test_without_network_a_run_repeats_from_the_caches(unplugged, ask, tmp_path):
    """The whole split is cached, and a streamed sample can be drawn from it, too."""
    run = [*ONE_TASK, "--tasks", "dbpedia", "--train-size", "28", "--test-size", "14", "--output"]
    with unplugged.running():
        sizes = ["--train-size", "0.02", "--test-size", "0.04"]
        assert ask(main=[*run, str(tmp_path / "whole"), *sizes])["code"] == 0
        assert ask(main=[*run, str(tmp_path / "streamed")])["code"] == 0
    for name, change in (("whole", sizes), ("streamed", [])):
        answer = ask(main=[*run, str(tmp_path / f"{name}-again"), *change])
        assert answer["code"] == 0, answer["stderr"]
        assert "fancyzhx/dbpedia_14: read from the local cache" in answer["stderr"]
        (before,), (after,) = (load_results(tmp_path / f"{name}{s}") for s in ("", "-again"))
        for what in ("data", "model"):
            assert after.provenance[what] == before.provenance[what]
        assert after.matrix == before.matrix


def test_an_old_copy_is_used_only_where_the_hub_keeps_failing(hub, ask):
    """datasets, at the first failure, would take what it fetched last, and not say so."""
    before = draw(ask, "ag_news", FETCHED)["provenance"]["revision"]
    hub.renew()
    hub.fail("README.md", 500, times=2)
    after = draw(ask, "ag_news", FETCHED)
    assert len(hub.failed) == 2
    assert after["provenance"]["revision"] == hub.commit != before
    assert "local cache" not in after["stderr"]
    fetched = hub.commit
    hub.renew()
    hub.fail("README.md", 500)
    after = draw(ask, "ag_news", FETCHED)
    assert "read from the local cache" in after["stderr"]
    assert after["provenance"]["revision"] == fetched


# With the real waits ----------------------------------------------------------------------------


def test_the_command_gives_up_in_good_time(given_up, folder):
    out, err = given_up.communicate(timeout=60)
    assert given_up.returncode == 2
    assert out == ""
    assert re.fullmatch(r"error: cannot read stanfordnlp/imdb .*HTTP 500.*--data embedded.*\n", err)
    assert not (folder / "never").exists()
