"""A local stand-in for the HTTP API of the Hugging Face Hub, as huggingface_hub speaks it: commits and LFS uploads."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

TOKEN = "hf_secret"


class Hub(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        files: ORG/NAME → path → content, of everything that was committed.
        created: bodies of the requests that made a repository.
        commits: summaries of commits.
        broken: whether uploads of large files are refused.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.commits: list[str] = []
        self.broken = False
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
