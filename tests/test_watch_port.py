"""The watch at its port: ranks that fail or are killed, connections that cannot be made, and strangers."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from disttempnet import distributed, watch
from disttempnet.cli import main
from disttempnet.watch import Watch
from srun import Srun
from test_launch import is_rank, trained

HERE = "127.0.0.1"
SOON = 20.0


@pytest.fixture
def main_watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Rank 0 of three."""
    monkeypatch.setattr(watch, "GRACE_SECONDS", 600.0)  # nobody ends this process
    made = Watch(0, 3)
    yield made
    made.leave()


def said(port: int, *lines: bytes) -> bytes:
    """What rank 0 answers to who says these lines; at once where it hangs up, else empty after a second."""
    with socket.create_connection((HERE, port), 5) as stranger:
        stranger.settimeout(1.0)
        try:
            for line in lines:
                stranger.sendall(line)
            return stranger.recv(100)
        except TimeoutError:
            return b"listens"
        except ConnectionError:
            return b""


STRANGERS = {
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "bytes": b"\xff\xfe\x00\n",
    "a number": b"17\n",
    "a list": b"[1, 2]\n",
    "nested": b"[" * 6000 + b"\n",
    "another rank": b'{"rank": "one"}\n',
    "another run": b'{"token": "0123", "rank": 1, "host": "elsewhere"}\n',
    "a verdict": b'{"failed": "rank 1 on nowhere failed"}\n',
    "no end of line": b"x" * 40_000,
}


@pytest.mark.parametrize("words", STRANGERS.values(), ids=STRANGERS.keys())
def test_a_stranger_is_not_listened_to(words: bytes, main_watch: Watch) -> None:
    assert said(main_watch.port, words) == b"", "rank 0 hangs up"
    assert main_watch.news(0) == ""
    # and it goes on watching
    rank = Watch(1, 3, HERE, main_watch.port, main_watch.token)
    rank.leave("out of memory")
    assert main_watch.news(SOON).endswith("failed: out of memory")


def test_a_stranger_that_says_nothing_keeps_nobody_waiting(main_watch: Watch) -> None:
    with socket.create_connection((HERE, main_watch.port), 5):
        rank = Watch(1, 3, HERE, main_watch.port, main_watch.token)
        other = Watch(2, 3, HERE, main_watch.port, main_watch.token)
        rank.leave()
        other.leave("boom")
        news = main_watch.news(SOON)
    assert news.startswith("rank 2 on ")
    assert news.endswith(" failed: boom")


def test_a_rank_that_falls_silent_is_told_to_the_others(main_watch: Watch) -> None:
    other = Watch(2, 3, HERE, main_watch.port, main_watch.token)
    with socket.create_connection((HERE, main_watch.port), 5) as rank:
        hello = {"token": main_watch.token, "rank": 1, "host": "node07"}
        rank.sendall(json.dumps(hello).encode() + b"\n")
    assert other.news(SOON) == "rank 1 on node07 ended without a word: killed, or out of memory"
    assert main_watch.news(SOON) == other.news(0)
    other.leave()


def test_connections_that_cannot_be_opened_are_asked_for_again(
    main_watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept, refused = socket.socket.accept, []

    def too_many(self: socket.socket) -> tuple:
        if len(refused) < 3:
            refused.append(1)
            raise OSError(24, "Too many open files")
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", too_many)
    rank = Watch(1, 3, HERE, main_watch.port, main_watch.token)
    rank.leave("boom")
    assert main_watch.news(SOON).endswith("failed: boom")
    assert len(refused) == 3


def test_without_an_address_of_ipv6_it_listens_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    create = socket.create_server

    def no_ipv6(address: tuple, **options: object) -> socket.socket:
        if options.get("family") == socket.AF_INET6:
            raise OSError(99, "Cannot assign requested address")
        return create(address, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "create_server", no_ipv6)
    with watch._listen(2) as listener:
        assert listener.family == socket.AF_INET


def finds_no_way(arguments: list[str]) -> int:
    """Rank 1 meets the others, but a firewall keeps it from the watch's port."""
    if is_rank(1):

        def blocked(*_: object, **__: object) -> Watch:
            raise OSError("Connection timed out")

        distributed.Watch = blocked  # type: ignore[assignment, misc]
    return main(arguments)


def test_a_rank_that_cannot_reach_rank_0_ends_all(tmp_path: Path) -> None:
    with Srun(2, tmp_path, finds_no_way, trained(tmp_path)) as ranks:
        ends = ranks.wait()
    assert [end.code for end in ends] == [2, 2]
    for end in ends:
        (line,) = end.printed.splitlines()
        assert line.startswith("disttempnet: rank 1 cannot reach rank 0 at localhost:")
        assert line.endswith(": Connection timed out")


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_process_keeps_no_connection_open(main_watch: Watch) -> None:
    """A loader worker outlives a rank that is killed: its copies of the sockets must not speak for the rank."""
    rank = Watch(1, 3, HERE, main_watch.port, main_watch.token)
    child = os.fork()
    if child == 0:
        time.sleep(SOON + 10)
        os._exit(0)
    try:
        for connection in list(rank._peers):
            connection.close()  # as the kernel does when the rank is killed
        assert "ended without a word" in main_watch.news(SOON)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        rank.leave()
