"""Ranks hear of one that stands still, and of none that is only busy or was suspended with them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import pytest

from disttempnet.watch import BEATS, Watch

SILENCE = 1.2  # seconds
SOON = 60.0  # on a busy machine


@contextmanager
def peer_of(watch: Watch) -> Iterator[socket.socket]:
    """A rank 1 that introduces itself."""
    with socket.create_connection(("localhost", watch.port), 10) as connection:
        connection.sendall(json.dumps({"token": watch.token, "rank": 1, "host": "node02"}).encode() + b"\n")
        yield connection


def test_a_silent_rank_is_lost() -> None:
    watch = Watch(0, 2, silence=SILENCE)
    with peer_of(watch) as connection:
        began = time.monotonic()
        news = watch.news(SOON)
        watch.leave()
        assert news == "rank 1 on node02 has not been heard for 1 seconds: stopped, or its node is gone"
        assert time.monotonic() - began > SILENCE * 5 / 6
        heard = connection.recv(4096).split(b"\n")
        assert heard.count(b"{}") >= BEATS, "its own beats"


def test_a_rank_that_sends_beats_is_not() -> None:
    watch = Watch(0, 2, silence=SILENCE)
    with peer_of(watch) as connection:
        for _ in range(20):
            connection.sendall(b"{}\n")
            assert watch.news(SILENCE / BEATS) == ""
        watch.leave()


def rank_1(place: tuple[int, str], answers: Connection) -> None:
    watch = Watch(1, 2, "localhost", *place, silence=SILENCE)
    answers.send(None)
    answers.recv()  # the main thread is busy for as long as it takes
    answers.send(watch.news(0))
    watch.leave()


def rank_0(answers: Connection) -> None:
    watch = Watch(0, 2, silence=SILENCE)
    answers.send((watch.port, watch.token))
    answers.recv()
    answers.send(watch.news(0))
    answers.recv()
    answers.send(watch.news(SOON))
    watch.leave()


@pytest.fixture
def both() -> Iterator[list[tuple[Any, Connection]]]:
    """Two processes that watch each other, and the connections to them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["disttempnet.training.trainer", "disttempnet.cli"])  # as tests/srun.py does
    ranks: list[tuple[Any, Connection]] = []
    for function in (rank_0, rank_1):
        ours, theirs = context.Pipe()
        arguments = (theirs,) if not ranks else (ranks[0][1].recv(), theirs)
        process = context.Process(target=function, args=arguments, daemon=True)
        process.start()
        ranks.append((process, ours))
    ranks[1][1].recv()
    yield ranks
    for process, _ in ranks:
        process.kill()
        process.join()


def test_a_job_that_was_suspended_as_a_whole_goes_on(both: list[tuple[Any, Connection]]) -> None:
    """And then one rank alone is stopped."""
    (first, to_first), (second, to_second) = both
    for number, seconds in ((signal.SIGSTOP, 3 * SILENCE), (signal.SIGCONT, SILENCE)):
        for process in (first, second):
            os.kill(process.pid, number)
        time.sleep(seconds)
    to_first.send("news?")
    assert to_first.recv() == ""
    os.kill(second.pid, signal.SIGSTOP)
    to_first.send("news?")
    assert to_first.recv().startswith("rank 1 on ")
    to_second.close()
