"""A local HTTP server of a folder, with the faults of real ones."""

from __future__ import annotations

import gzip
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server(ThreadingHTTPServer):
    """Serves files; what is set on it decides how.

    Attributes:
        ranges: whether parts of files are sent.
        failures: how many of the next requests are answered with 503.
        cut: how many of the next whole files end in the middle.
        gzip: whether whole files come compressed, whatever a request accepts.
        stated: whether the size of a whole file is stated.
        surplus: bytes that follow a whole file, whose size is stated to a HEAD only.
        sent: bytes of bodies that were sent.
        pause: seconds between the pieces of a whole file.
        wholes: names of the files that were sent whole, in order.
        authorization, query: what a request must bring; empty = nothing.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.ranges, self.failures, self.cut, self.pause = folder, True, 0, 0, 0.0
        self.gzip, self.stated = False, True
        self.surplus = self.sent = 0
        self.wholes: list[str] = []
        self.accepted: set[str] = set()  # encodings
        self.authorization = self.query = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        server = self.server
        name, _, query = self.path.lstrip("/").partition("?")
        if self.headers.get("Authorization", "") != server.authorization or query != server.query:
            return self.send_error(403)
        if server.failures:
            server.failures -= 1
            return self.send_error(503)
        server.accepted.add(self.headers.get("Accept-Encoding", ""))
        path = server.folder / name
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        limits = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if server.ranges else None
        if limits:
            first, last = int(limits[1]), int(limits[2])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
        else:
            self.send_response(200)
            if server.gzip:
                data = gzip.compress(data)
                self.send_header("Content-Encoding", "gzip")
        if body and server.surplus and not limits:
            data += bytes(server.surplus)
        elif limits or server.stated:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self._send(name, data, whole=limits is None)

    def _send(self, name: str, data: bytes, whole: bool) -> None:
        if whole:
            self.server.wholes.append(name)
            if self.server.cut:
                self.server.cut -= 1
                data = data[: len(data) // 2]
                self.close_connection = True
        step = max(1, len(data) // 20)
        try:
            for start in range(0, len(data), step):
                self.wfile.write(data[start : start + step])
                self.server.sent += step
                if whole:
                    time.sleep(self.server.pause)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
