"""A small Hugging Face Hub on this machine, for the real clients (HF_ENDPOINT).

It describes repositories, lists their files and sends them, whole or in part. Models can be
uploaded, a commit each. Some names are
refused as the Hub refuses them. `GET /stop` ends the listening: from then on there is no network.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSED = {  # status, X-Error-Code and X-Error-Message by owner
    "gated": (403, "GatedRepo", "You are not in the authorized list."),
    "expired": (401, "", 'User Access Token "colab" is expired'),
    "busy": (503, "", "Service unavailable"),
    "nobody": (401, "RepoNotFound", "Repository not found"),
}


def serve(folder: Path) -> str:
    """Serve folder/models/<owner>/<name> and folder/datasets/<owner>/<name>; return the URL."""
    handler = type("Handler", (_Handler,), {"folder": folder})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    folder: Path

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET(self.rfile.read(int(self.headers["Content-Length"])).decode())

    def do_GET(self, body: str = "") -> None:
        path = unquote(self.path.partition("?")[0])
        if re.search(r"^/api/(repos/create|validate-yaml)$|/(preupload|commit)/\w+$", path):
            self.take(path, body)
            return
        if path == "/stop":
            self.send(b"")
            self.server.server_close()
            threading.Thread(target=self.server.shutdown).start()
            return
        kinds = r"(?P<api>/api)?/((?P<kind>datasets|models)/)?"
        form = rf"{kinds}(?P<owner>[^/]+)/(?P<name>[^/]+)(?P<rest>.*)"
        asked = re.fullmatch(form, path)
        # Like the Hub, describe a gated repository to everybody.
        if asked["owner"] in REFUSED and not (asked["owner"] == "gated" and asked["api"]):
            status, code, message = REFUSED[asked["owner"]]
            self.send(b"", status, X_Error_Code=code, X_Error_Message=message)
            return
        folder = self.folder / (asked["kind"] or "models") / asked["owner"] / asked["name"]
        files = {str(f.relative_to(folder)): f for f in folder.rglob("*") if f.is_file()}
        if not asked["api"]:
            self.send_file(files.get(asked["rest"].split("/", 3)[-1]))
        elif asked["rest"].startswith(("/tree", "/paths-info")):
            listed = [_entry(name, file) for name, file in files.items()]
            self.send_json([entry for entry in listed if not body or entry["path"] in body])
        else:
            siblings = [{"rfilename": name} for name in files]
            about = {"id": f"{asked['owner']}/{asked['name']}", "sha": COMMIT, "tags": []}
            self.send_json({**about, "siblings": siblings})

    def take(self, path: str, body: str) -> None:
        """Make a repository, or put the files of a commit into it."""
        at = f"http://{self.headers['Host']}"
        *_, owner, name, kind, _ = ["", *path.split("/")]
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.send_json({"url": f"{at}/{asked['organization']}/{asked['name']}"})
        elif path == "/api/validate-yaml":
            self.send_json({"errors": [], "warnings": []})
        elif kind == "preupload":
            how = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": file["path"], **how} for file in json.loads(body)["files"]]
            self.send_json({"files": files})
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    file = self.folder / "models" / owner / name / line["value"]["path"]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(base64.b64decode(line["value"]["content"]))
            commit = f"{at}/{owner}/{name}/commit/{COMMIT}"
            self.send_json({"commitUrl": commit, "commitOid": COMMIT})

    def send_file(self, file: Path | None) -> None:
        if file is None:
            self.send(b"", 404, X_Error_Code="EntryNotFound")
            return
        data = file.read_bytes()
        etag = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept_Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not part:
            self.send(data, **etag)
            return
        first, last = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
        where = f"bytes {first}-{last}/{len(data)}"
        self.send(data[first : last + 1], 206, Content_Range=where, **etag)

    def send_json(self, answer: object) -> None:
        self.send(json.dumps(answer).encode(), Content_Type="application/json")

    def send(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        headers |= {"X_Repo_Commit": COMMIT, "Content_Length": str(len(data))}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entry(name: str, file: Path) -> dict[str, object]:
    data = file.read_bytes()
    oid = hashlib.sha1(data).hexdigest()
    return {"type": "file", "path": name, "size": len(data), "oid": oid}
