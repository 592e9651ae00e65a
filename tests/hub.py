"""A local stand-in for the HTTP API of the Hugging Face Hub: commits, LFS uploads, downloads of data sets."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

TOKEN = "hf_secret"
REVISION = "5" * 40  # of every data set


class Hub(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        files: ORG/NAME → path → content, of everything that was committed.
        created: bodies of the requests that made a repository.
        private: repositories that were made private.
        commits: summaries of commits.
        failures: how many of the next downloads are answered with 503.
        cut: how many of the next downloads end in the middle.
        sent: bytes of files that were sent.
        broken: whether uploads of large files are refused.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.private: set[str] = set()
        self.commits: list[str] = []
        self.broken = False
        self.failures = self.cut = self.sent = 0
        self.objects: dict[str, bytes] = {}  # LFS: sha256 → content

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        self._get(body=False)

    def do_GET(self) -> None:
        self._get(body=True)

    def _get(self, body: bool) -> None:
        """Answer about a model, or a data set: the commit, its files, and their content with ranges."""
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)", path):
            self._answer({"id": found[1], "sha": REVISION}, 200 if found[1] in self.server.files else 404)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            known = found[1] in self.server.files
            self._answer({"id": found[1], "private": found[1] in self.server.private}, 200 if known else 404)
        elif found := re.fullmatch(rf"/api/datasets/([^/]+/[^/]+)/tree/{REVISION}", path):
            self._answer([self._entry(name, content) for name, content in self.server.files[found[1]].items()])
        elif found := re.fullmatch(rf"/datasets/([^/]+/[^/]+)/resolve/{REVISION}/(.+)", path):
            self._send_file(self.server.files[found[1]][found[2]], body)
        else:
            self._answer({"error": f"no such place: {path}"}, 404)

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
        return entry | ({"lfs": lfs} if name.endswith(".tar") else {})

    def _send_file(self, content: bytes, body: bool) -> None:
        server, start = self.server, 0
        if body and server.failures:
            server.failures -= 1
            self._answer({"error": "busy"}, 503)
            return
        if given := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(given[1])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not body:
            return
        part = content[start:]
        if server.cut:
            server.cut -= 1
            part = part[: len(part) // 2]
            self.close_connection = True
        server.sent += len(part)
        self.wfile.write(part)

    def do_PUT(self) -> None:
        content = self._body()
        digest = self.path.rpartition("/")[2]
        if self.server.broken or hashlib.sha256(content).hexdigest() != digest:
            self._answer({"error": "wrong digest"}, 400)
            return
        self.server.objects[digest] = content
        self._answer({})

    def do_POST(self) -> None:
        body, path = self._body(), self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            self._answer({"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._answer({"objects": objects, "transfer": "basic"})
        elif "/commit/" in path:
            self._commit(path.removeprefix("/api/models/").partition("/commit/")[0], body)
        else:
            self._answer({"error": f"no such place: {path}"}, 404)

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
        self.server.created.append(wanted)
        new = name not in self.server.files
        self.server.files.setdefault(name, {})
        if new and wanted.get("visibility") == "private":  # one that exists stays as it is
            self.server.private.add(name)
        self._answer({"url": f"{self.server.url}/{name}", "name": name, "id": name}, 200 if new else 409)

    def _commit(self, name: str, body: bytes) -> None:
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                self.server.commits.append(value["summary"])
            elif item["key"] == "file":
                self.server.files[name][value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                self.server.files[name][value["path"]] = self.server.objects[value["oid"]]
        self._answer({"commitUrl": f"{self.server.url}/{name}/commit/abc", "commitOid": "abc", "pullRequestUrl": None})


@contextmanager
def serving_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve a hub, and let huggingface_hub ask it alone; without a token of any user."""
    from huggingface_hub import constants

    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
