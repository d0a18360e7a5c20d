"""A Hugging Face Hub on this machine, for the real clients (HF_ENDPOINT), that fails when told to.

It serves what it takes to find and read datasets and models: their descriptions, lists of files,
and the files, of which the large ones lie elsewhere ("cdn") as on the Hub. `make_five` and
`make_gpt2` make what a run of the benchmark asks for, under the real names.
"""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import datasets
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bitstack_nb.data.embedded import embedded_split, embedded_vocabulary
from bitstack_nb.data.tasks import FIVE_TASKS, Task

# As on the Hub: the configuration, which is the folder too ("data" where it is the default one).
CONFIGURATIONS = {
    "imdb": "plain_text",
    "ag_news": "default",
    "dbpedia": "dbpedia_14",
    "yelp": "yelp_review_full",
    "yahoo": "yahoo_answers_topics",
}
SHARDS = {"yahoo": 2}  # files of the training split; one where not named
RENAMED = {"gpt2": "openai-community/gpt2"}
_LARGE = (".parquet", ".safetensors", ".bin")


@dataclass
class Fault:
    """Requests that match `pattern` ("GET /path") fail: with a status, or the file is cut short."""

    pattern: str
    status: int | None
    times: float
    headers: dict[str, str]


@dataclass
class HubServer:
    """Repositories by "models/<id>" or "datasets/<id>": their files by path."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commit: str = "0" * 40
    faults: list[Fault] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    connections: set[socket.socket] = field(default_factory=set)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def renew(self) -> None:
        """Make a new commit of everything, so that no cache knows it, and forget all faults."""
        self.commit = hashlib.sha1(self.commit.encode()).hexdigest()
        self.faults, self.failed = [], []

    def fail(self, pattern: str, status: int, *, times: float = float("inf"), **headers: str):
        self.faults.append(Fault(pattern, status, times, headers))

    def cut(self, pattern: str, *, times: float = float("inf")) -> None:
        """Break connections in the middle of an answer."""
        self.faults.append(Fault(pattern, None, times, {}))

    def find_fault(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.pattern, request):
                fault.times -= 1
                self.failed.append(request)
                return fault
        return None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Listen, from the second time on at the same port; at the end hang up on everyone."""
        handler = type("Handler", (_Handler,), {"hub": self})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        server.daemon_threads = True
        self.port = server.server_port
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            for connection in list(self.connections):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET(self.rfile.read(int(self.headers["Content-Length"])).decode())

    def do_GET(self, body: str = "") -> None:
        path = unquote(self.path.partition("?")[0])
        self.fault = self.hub.find_fault(f"{self.command} {path}")
        if self.fault and self.fault.status:
            self.reply(self.fault.status, **self.fault.headers)
            return
        for old, new in RENAMED.items():
            if re.match(rf"(/api/models)?/{old}(/|$)", path):
                self.reply(307, Location=self.path.replace(old, new, 1))
                return
        kinds = r"(?P<kind>datasets|models)/(?P<id>[^/]+/[^/]+)"
        for form, answer in (
            (rf"/api/{kinds}(/revision/(?P<revision>.+))?", self.describe),
            (rf"/api/{kinds}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", self.tree),
            (rf"/api/{kinds}/paths-info/(?P<revision>[^/]+)", self.paths_info),
            (r"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+)/resolve/[^/]+/(?P<file>.+)", self.resolve),
            (rf"/cdn/{kinds}/(?P<file>.+)", self.file),
        ):
            if found := re.fullmatch(form, path):
                asked = {**found.groupdict(), "body": body}
                asked["kind"] = (found["kind"] or "models").rstrip("/")
                files = self.hub.repositories.get(f"{asked['kind']}/{asked['id']}")
                if files is not None:
                    answer(files, asked)
                    return
        self.reply(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    def describe(self, files: dict[str, bytes], asked: dict[str, str]) -> None:
        siblings = [{"rfilename": name} for name in files]
        self.json({"id": asked["id"], "sha": self.hub.commit, "siblings": siblings, "tags": []})

    def tree(self, files: dict[str, bytes], asked: dict[str, str]) -> None:
        folder = (asked["folder"] or "").strip("/")
        inside = {f: data for f, data in files.items() if f.startswith(folder and f"{folder}/")}
        if not inside:
            self.reply(404, X_Error_Code="EntryNotFound")
            return
        entries = [_entry(f, data) for f, data in inside.items()]
        depth = folder.count("/") + 1 if folder else 0
        tops = {"/".join(f.split("/")[: depth + 1]) for f in inside if f.count("/") > depth}
        entries += [{"type": "directory", "path": top, "oid": "0" * 40, "size": 0} for top in tops]
        if "recursive=true" not in self.path.lower():
            entries = [entry for entry in entries if entry["path"].count("/") == depth]
        self.json(entries)

    def paths_info(self, files: dict[str, bytes], asked: dict[str, str]) -> None:
        self.json([_entry(f, data) for f, data in files.items() if f in asked["body"]])

    def resolve(self, files: dict[str, bytes], asked: dict[str, str]) -> None:
        name = asked["file"]
        if name not in files:
            self.reply(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        elif name.endswith(_LARGE):
            self.reply(
                302,
                Location=f"{self.hub.url}/cdn/{asked['kind']}/{asked['id']}/{name}",
                X_Linked_ETag=f'"{hashlib.sha256(files[name]).hexdigest()}"',
                X_Linked_Size=str(len(files[name])),
            )
        else:
            self.file(files, asked)

    def file(self, files: dict[str, bytes], asked: dict[str, str]) -> None:
        data = files[asked["file"]]
        etag = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept_Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not part:
            self.reply(200, data, **etag)
            return
        first, last = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
        where = f"bytes {first}-{last}/{len(data)}"
        self.reply(206, data[first : last + 1], Content_Range=where, **etag)

    def json(self, answer: object) -> None:
        self.reply(200, json.dumps(answer).encode(), Content_Type="application/json")

    def reply(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        headers = {"X-Repo-Commit": self.hub.commit, "Content-Length": str(len(body)), **headers}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.status is None:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        self.wfile.write(body)


def _entry(name: str, data: bytes) -> dict[str, object]:
    entry = {"type": "file", "path": name, "size": len(data)}
    entry["oid"] = hashlib.sha1(data).hexdigest()
    if name.endswith(_LARGE):
        sha = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": sha, "size": len(data), "pointerSize": 134}
    return entry


# What it serves ---------------------------------------------------------------------------------


def make_five() -> dict[str, dict[str, bytes]]:
    """The five datasets, written by the embedded grammar, in the layout of the real ones."""
    return {f"datasets/{task.dataset}": _make_dataset(task) for task in FIVE_TASKS}


def _make_dataset(task: Task) -> dict[str, bytes]:
    configuration = CONFIGURATIONS[task.name]
    folder = "data" if configuration == "default" else configuration
    listed = "".join(
        f"  - split: {split}\n    path: {folder}/{split}-*\n" for split in ("train", "test")
    )
    card = f"---\nconfigs:\n- config_name: {configuration}\n  data_files:\n{listed}---\n"
    files = {"README.md": card.encode(), ".gitattributes": b""}
    for split in ("train", "test"):
        rows = embedded_split(task.name, split)
        labels = datasets.ClassLabel(num_classes=task.num_labels)
        rows = rows.cast_column(task.label, labels)
        shards = SHARDS.get(task.name, 1) if split == "train" else 1
        for index in range(shards):
            name = f"{folder}/{split}-{index:05}-of-{shards:05}.parquet"
            part = io.BytesIO()
            rows.shard(shards, index, contiguous=True).to_parquet(part)
            files[name] = part.getvalue()
    return files


def make_gpt2(folder: Path) -> dict[str, bytes]:
    """A small GPT-2 with random weights and a tokenizer of its kind, and files nobody needs."""
    rules = Tokenizer(models.BPE())
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rules.train_from_iterator([" ".join(embedded_vocabulary())], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=rules,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    )
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rules.model.save(str(folder))  # vocab.json and merges.txt
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    return {**files, "pytorch_model.bin": b"never read", "onnx/config.json": b"nor this"}
