"""The watch at its port: ranks that fail or are killed, connections that cannot be made, and strangers."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from disttempnet.cli.main import main
from disttempnet.distributed import collectives
from disttempnet.distributed import watchdog as watch
from disttempnet.distributed.watchdog import Watch
from tests.distributed.srun import Srun
from tests.distributed.test_launcher import is_rank, trained
from tests.distributed.watching import Rank, code

HERE = "127.0.0.1"
SOON = 20.0


@pytest.fixture
def main_watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Rank 0 of three."""
    monkeypatch.setattr(watch, "GRACE_SECONDS", 600.0)  # nobody ends this process
    made = Watch(0, 3)
    yield made
    made.leave()


def wait_until(reached: Callable[[], bool]) -> None:
    until = time.monotonic() + SOON
    while not reached():
        assert time.monotonic() < until
        time.sleep(0.01)


def said(port: int, *lines: bytes) -> bytes:
    """What rank 0 answers to who says these lines after its challenge; empty where it hangs up."""
    with socket.create_connection((HERE, port), 5) as stranger:
        stranger.settimeout(1.0)
        try:
            assert set(json.loads(stranger.recv(100))) == {"challenge"}
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
    "another run": b'{"rank": 1, "host": "elsewhere", "challenge": "1", "proof": "0123"}\n',
    "odd types": b'{"rank": true, "host": 3, "challenge": [], "proof": {}}\n',
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
    with Rank(main_watch, 1, "node07"):
        pass
    assert other.news(SOON) == "rank 1 on node07 ended without a message: killed, or out of memory"
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
    (listener,) = watch._listen(2)
    with listener:
        assert listener.family == socket.AF_INET


def finds_no_way(arguments: list[str]) -> int:
    """Rank 1 meets the others, but a firewall keeps it from the watch's port."""
    if is_rank(1):

        def blocked(*_: object, **__: object) -> Watch:
            raise OSError("Connection timed out")

        collectives.Watch = blocked  # type: ignore[assignment, misc]
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
    time.sleep(0.5)  # its thread listens by now
    child = os.fork()
    if child == 0:
        time.sleep(SOON + 10)
        os._exit(0)
    try:
        for connection in list(rank._peers):
            connection.close()  # as the kernel does when the rank is killed
        assert "ended without a message" in main_watch.news(SOON)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        rank.leave()


# ---- strangers in numbers, and between the lines ----

CROWD = """
import resource, selectors, socket, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, [resource.getrlimit(resource.RLIMIT_NOFILE)[1]] * 2)
port, number = int(sys.argv[1]), int(sys.argv[2])
crowd, let_in, closed, heard = selectors.DefaultSelector(), set(), set(), b""
for _ in range(number):
    one = socket.socket()
    one.setblocking(False)
    one.connect_ex(("127.0.0.1", port))
    crowd.register(one, selectors.EVENT_READ)
print("there", flush=True)
until = time.monotonic() + float(sys.argv[3])
while crowd.get_map() and time.monotonic() < until:
    for key, _ in crowd.select(0.1):
        try:
            data = key.fileobj.recv(4096)
        except OSError:
            data = b""
        heard += data
        if data:
            let_in.add(key.fd)
        else:
            closed.add(key.fd)
            crowd.unregister(key.fileobj)
print(len(let_in), len(let_in - closed), sum(b"challenge" not in line for line in heard.splitlines()), flush=True)
"""


@contextmanager
def few_files(free: int) -> Iterator[None]:
    """Inside, this process may open so many files more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_crowd_of_strangers_keeps_no_rank_away_and_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """600 connections that say nothing, where this process may open some 190 files more."""
    monkeypatch.setattr(watch, "GRACE_SECONDS", 600.0)
    with few_files(60):
        made = Watch(0, 3)  # raises the limit by what it needs
        crowd = subprocess.Popen(
            [sys.executable, "-c", CROWD, str(made.port), "600", "5"], stdout=subprocess.PIPE, text=True
        )
        assert crowd.stdout is not None
        try:
            assert crowd.stdout.readline() == "there\n"
            while len(made._peers) < watch.STRANGERS:
                time.sleep(0.01)
            began = time.monotonic()
            first = Watch(1, 3, HERE, made.port, made.token)
            assert len(made._peers) <= watch.STRANGERS + 2
            with open(os.devnull):  # this process can still open files
                pass
            second = Watch(2, 3, HERE, made.port, made.token)
            assert time.monotonic() - began < SOON
            assert made.news(0) == ""
            let_in, still_open, told = map(int, crowd.stdout.readline().split())
            assert let_in >= watch.STRANGERS
            assert (still_open, told) == (0, 0), "all were hung up on, and heard a challenge at the most"
            second.leave()
            first.leave("boom")
            assert made.news(SOON).endswith("failed: boom")
        finally:
            made.leave()
            crowd.kill()
            crowd.wait()
            crowd.stdout.close()


def test_a_stranger_is_hung_up_on_in_seconds_and_told_nothing(
    main_watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "HELLO_SECONDS", 0.5)
    rank = Watch(1, 3, HERE, main_watch.port, main_watch.token)
    with socket.create_connection((HERE, main_watch.port), 5) as stranger:
        began = time.monotonic()
        rank.leave("/secret/path: boom")
        assert main_watch.news(SOON).endswith("boom")
        main_watch.leave()
        heard = b"".join(iter(lambda: stranger.recv(4096), b""))
        assert time.monotonic() - began < 3
    assert set(json.loads(heard)) == {"challenge"}, "one line, and no reason"


def test_the_port_is_closed_when_all_ranks_are_there(main_watch: Watch) -> None:
    with socket.create_connection((HERE, main_watch.port), 5) as stranger:
        ranks = [Watch(rank, 3, HERE, main_watch.port, main_watch.token) for rank in (1, 2)]
        stranger.settimeout(SOON)
        assert stranger.recv(100)
        assert stranger.recv(100) == b"", "hung up on"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HERE, main_watch.port), 5)
    ranks[0].leave()
    ranks[1].leave("boom")
    assert main_watch.news(SOON).endswith("failed: boom")


def test_the_token_is_never_sent(main_watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    sent, send = bytearray(), socket.socket.sendall

    def sendall(self: socket.socket, data: bytes) -> None:
        sent.extend(data)
        send(self, data)

    monkeypatch.setattr(socket.socket, "sendall", sendall)
    Watch(1, 3, HERE, main_watch.port, main_watch.token).leave("boom")
    assert main_watch.news(SOON).endswith("boom")
    assert b"challenge" in sent
    assert b"boom" in sent
    assert main_watch.token.encode() not in sent


def test_another_token_is_refused_by_both_sides(main_watch: Watch) -> None:
    with pytest.raises(ConnectionError, match="not rank 0 of this run"):
        Watch(1, 3, HERE, main_watch.port, "another")
    with Rank(main_watch, token="another") as rank:
        assert not rank.welcome
    assert main_watch.news(0) == ""


def test_who_answers_in_place_of_rank_0_is_not_believed() -> None:
    """It may pass on a challenge, but cannot show that it knows the token."""
    with socket.create_server((HERE, 0)) as impostor:

        def answer() -> None:
            connection, _ = impostor.accept()
            with connection:
                connection.sendall(b'{"challenge": "00"}\n')
                proof = json.loads(connection.recv(4096))["proof"]
                connection.sendall(json.dumps({"proof": proof}).encode() + b"\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ConnectionError, match="not rank 0 of this run"):
            Watch(1, 2, HERE, impostor.getsockname()[1], "token")
        thread.join()


def test_a_rank_cannot_be_there_twice(main_watch: Watch) -> None:
    with Rank(main_watch, 1) as rank, Rank(main_watch, 1) as again, Rank(main_watch, 0) as zero:
        assert rank.welcome
        assert not again.welcome
        assert not zero.welcome
        rank.send({"done": True})
    assert main_watch.news(0.2) == ""


@pytest.mark.parametrize("how", ["forged", "replayed", "changed"])
def test_a_line_that_the_rank_did_not_send_is_noticed(how: str, main_watch: Watch) -> None:
    with Rank(main_watch, 1, "node07") as rank:
        body = json.dumps({"failed": "rank 2 on node08 failed"})
        if how == "forged":
            rank.say(f"{'0' * 64} {body}".encode())
        elif how == "replayed":
            rank.send({"at": 1})
            rank.sent -= 1
            rank.send({"at": 1})
        else:
            rank.say(f"{code(rank.key, 'rank 1', 1, json.dumps({'at': 1}))} {body}".encode())
        assert main_watch.news(SOON) == (
            "rank 1 on node07 sent a message that fails authentication: its connection is disturbed"
        )


@pytest.mark.parametrize(
    ("address", "found", "expected"),
    [
        ("localhost", ["127.0.0.1"], ["127.0.0.1"]),
        ("127.0.0.1", ["127.0.0.1"], ["127.0.0.1"]),
        (
            "localhost",
            ["127.0.0.1", "203.0.113.7", "127.0.0.2"],
            ["127.0.0.1", "127.0.0.2"],
        ),  # others know some of them
        ("node01", ["127.0.1.1"], []),  # its own name, as Debian's /etc/hosts has it: others are led elsewhere
        ("node01", ["203.0.113.7"], []),  # of another machine: a router before this one
        ("nowhere.invalid", [], []),
        ("", [], []),
    ],
)
def test_rank_0_listens_at_its_own_addresses_only(
    address: str, found: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def getaddrinfo(host: str, *_: object, **__: object) -> list:
        if not found:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 0)) for one in found]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    made = Watch(0, 2, address)
    places = [listener.getsockname() for listener in made._listeners]
    made.leave()
    assert list(made.addresses) == expected
    assert [place[0] for place in places] in ([expected] if expected else [["0.0.0.0"], ["::"]])
    assert {place[1] for place in places} == {made.port}


def test_a_rank_that_its_name_for_rank_0_leads_elsewhere_finds_it() -> None:
    """A machine of two addresses: rank 0 listens at one, the name leads rank 1 to the other."""
    made = Watch(0, 2, "127.0.0.2")
    with pytest.raises(ConnectionRefusedError):
        Watch(1, 2, HERE, made.port, made.token)
    rank = Watch(1, 2, HERE, made.port, made.token, addresses=made.addresses)
    made.leave()
    rank.leave()


def test_what_comes_with_the_proof_of_rank_0_is_heard() -> None:
    """Both lines in one packet."""
    with socket.create_server((HERE, 0)) as rank_0:

        def answer() -> None:
            connection, _ = rank_0.accept()
            with connection:
                connection.sendall(b'{"challenge": "00"}\n')
                own = json.loads(connection.recv(4096))["challenge"]
                proof = json.dumps({"proof": code("token", "rank 0", "00", own)})
                body = json.dumps({"failed": "rank 2 on node03 failed: boom"})
                sealed = f"{code(code('token', 'messages', '00', own), 'rank 0', 1, body)} {body}"
                connection.sendall(f"{proof}\n{sealed}\n".encode())
                connection.recv(4096)

        thread = threading.Thread(target=answer)
        thread.start()
        rank = Watch(1, 3, HERE, rank_0.getsockname()[1], "token")
        assert rank.news(SOON) == "rank 2 on node03 failed: boom"
        rank.leave()
        thread.join()


def test_a_rank_that_leaves_while_rank_0_does_is_no_error(main_watch: Watch) -> None:
    """The watch thread drops its connection while the main thread says goodbye to the ranks, one by one."""
    with Rank(main_watch, 1) as first, Rank(main_watch, 2) as second:
        (_, peer), (connection, leaver) = main_watch._ranks()
        seal = peer.sealed
        second.send({"done": True})
        wait_until(lambda: leaver.done)

        def sealed(message: dict) -> bytes:
            second.__exit__()
            wait_until(lambda: connection not in main_watch._peers)
            return seal(message)

        peer.sealed = sealed  # type: ignore[method-assign]
        main_watch.leave()
        assert json.loads([*first.lines][-1].partition(b" ")[2]) == {"done": True}
