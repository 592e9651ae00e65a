"""A rank that speaks the watch's protocol by hand: what it says is up to a test."""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
from typing import Any

from disttempnet.distributed.watchdog import Watch


def code(key: str, *parts: object) -> str:
    return hmac.new(key.encode(), json.dumps(parts).encode(), hashlib.sha256).hexdigest()


class Rank:
    """Connects to rank 0 and proves itself; a context, at whose end its connection ends.

    Args:
        token: the run's; another one is refused.
    """

    def __init__(self, watch: Watch, rank: int = 1, host: str = "node02", token: str = "") -> None:
        self.socket = socket.create_connection(("127.0.0.1", watch.port), 10)
        self.lines = self.socket.makefile("rb")
        self.rank, self.sent = rank, 0
        theirs = json.loads(self.lines.readline())["challenge"]
        token, mine = token or watch.token, "c0ffee"
        self.hello = {
            "rank": rank,
            "host": host,
            "challenge": mine,
            "proof": code(token, "rank", rank, host, theirs, mine),
        }
        self.say(json.dumps(self.hello).encode())
        answer = self.lines.readline()
        self.welcome = bool(answer)
        if answer:
            assert json.loads(answer) == {"proof": code(token, "rank 0", theirs, mine)}
        self.key = code(token, "messages", theirs, mine)

    def say(self, line: bytes) -> None:
        self.socket.sendall(line + b"\n")

    def send(self, message: dict[str, Any]) -> None:
        self.sent += 1
        body = json.dumps(message)
        self.say(f"{code(self.key, f'rank {self.rank}', self.sent, body)} {body}".encode())

    def __enter__(self) -> Rank:
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.close()
        self.socket.close()
