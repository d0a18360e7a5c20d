"""Samples from a Hub that runs on this machine, by the real clients.

They read HF_ENDPOINT when imported, so each question is asked in a process of its own, of a server
that answers the few requests it takes to find and read Parquet files.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import datasets
import pytest
from toy_data import SIZES, TASK, write_toy

from bitstack_nb.tasks import load_task

SHA = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import json, sys, time
from bitstack_nb.tasks import Task, load_task

task = Task(name="toy", dataset=sys.argv[1], text=("title", "body"), label="kind", num_labels=3)
for change in json.loads(sys.argv[2]):
    start = time.monotonic()
    try:
        drawn = load_task(task, "hub", **{"train_size": 30, "test_size": 12, "seed": 0, **change})
        record = {s: getattr(drawn, s).to_list() for s in ("train", "test")}
        record["provenance"] = drawn.provenance
    except ValueError as error:
        record = {"error": str(error), "kind": type(error).__name__}
    print(json.dumps({**record, "seconds": time.monotonic() - start}))
"""


class HubHandler(http.server.BaseHTTPRequestHandler):
    """One dataset, someone/toy, in `root`; every other is unknown."""

    protocol_version = "HTTP/1.1"
    root: Path

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""

    def reply(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        headers = {"X-Repo-Commit": SHA, "Content-Length": str(len(body)), **headers}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        """paths-info: which of the named paths there are."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.reply(200, json.dumps([f for f in self.files() if f["path"] in body]).encode())

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        file = self.root / path.rpartition("/")[2]
        if "/someone/toy" not in path:
            self.reply(404, X_Error_Code="RepoNotFound")
        elif "/resolve/" in path and file.is_file():
            self.reply_file(file.read_bytes())
        elif re.search(r"/tree/[^/]+$", path):
            self.reply(200, json.dumps(self.files()).encode())
        elif re.search(r"/api/datasets/someone/toy(/revision/[^/]+)?$", path):
            siblings = [{"rfilename": f["path"]} for f in self.files()]
            info = {"id": "someone/toy", "sha": SHA, "siblings": siblings, "tags": []}
            self.reply(200, json.dumps(info).encode())
        else:
            self.reply(404, X_Error_Code="EntryNotFound")

    def reply_file(self, data: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            self.reply(200, data, ETag=f'"{hash(data)}"')
            return
        first, last = int(asked[1]), int(asked[2] or len(data) - 1)
        part = data[first : last + 1]
        self.reply(206, part, Content_Range=f"bytes {first}-{last}/{len(data)}", ETag='"part"')

    def files(self) -> list[dict]:
        return [
            {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40}
            for f in sorted(self.root.iterdir())
        ]


def ask_hub(endpoint: str, home: Path, dataset: str, changes: list[dict]) -> list[dict]:
    """What `load_task` gives or raises for each change of the request, in a fresh process."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, dataset, json.dumps(changes)],
        env={**environment, "HF_ENDPOINT": endpoint, "HF_HOME": str(home)},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture
def hub(tmp_path):
    """The address of a Hub that knows one dataset."""
    write_toy(tmp_path)
    handler = type("Toy", (HubHandler,), {"root": tmp_path / "toy"})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_hub_is_streamed_or_fetched_and_pinned_to_its_commit(hub, tmp_path, monkeypatch):
    streamed, same, held, head, fetched, large = ask_hub(
        hub,
        tmp_path,
        "someone/toy",
        [
            {},
            {"train_size": 60},
            {"evaluate_on": "heldout"},
            {"sampling": "head"},
            {"train_size": 0.25, "test_size": 0.2},
            {"train_size": 121},
        ],
    )
    assert streamed["provenance"]["source"] == "hub"
    assert streamed["provenance"]["revision"] == SHA
    assert Counter(row["label"] for row in streamed["train"]) == {0: 10, 1: 10, 2: 10}
    assert same["test"] == streamed["test"]
    assert held["train"] == streamed["train"]
    trained_on = {row["text"] for row in held["train"]}
    assert len(held["test"]) == 12
    assert all(row["text"] not in trained_on for row in held["test"])
    assert all(row["text"].startswith("train") for row in held["test"])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # Where no order is drawn, or a whole table is, Hub and folder give the same rows.
    local = load_task(TASK, str(tmp_path), **SIZES, sampling="head")
    assert head["train"] == local.train.to_list()
    local = load_task(TASK, str(tmp_path), train_size=0.25, test_size=0.2, seed=0)
    assert fetched["train"] == local.train.to_list()
    assert "121" in large["error"]
    assert "120" in large["error"]


def test_an_unknown_dataset_is_one_line(hub, tmp_path):
    (answer,) = ask_hub(hub, tmp_path, "someone/else", [{}])
    assert answer["kind"] == "DataError"
    assert re.fullmatch(r"no dataset 'someone/else' on the Hub.*owner/name", answer["error"])


def test_no_network_is_one_line_at_once_with_two_ways_out(tmp_path):
    (answer,) = ask_hub("http://127.0.0.1:9", tmp_path, "someone/toy", [{}])
    assert answer["kind"] == "DataError"
    assert "\n" not in answer["error"]
    assert "--data embedded" in answer["error"]
    assert "toy/train.parquet" in answer["error"]
    assert answer["seconds"] < 5
