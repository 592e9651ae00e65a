"""Ranks hear of one that stands still or is waited for, and of none that is only busy or was suspended with them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest

from disttempnet.distributed.watchdog import BEATS, Watch
from tests.distributed.watching import Rank

SILENCE = 1.6  # seconds
SOON = 60.0  # on a busy machine


def test_a_silent_rank_is_lost_within_the_time_that_is_promised() -> None:
    watch = Watch(0, 2, silence=SILENCE)
    with Rank(watch) as rank:
        rank.send({"at": 1})
        began = time.monotonic()
        news = watch.news(SOON)
        seconds = time.monotonic() - began
        watch.leave()
        assert news == "rank 1 on node02 has sent no heartbeat for 2 seconds: stopped, or its node is gone"
        assert SILENCE * 6 / 8 < seconds < SILENCE + 0.5, "no more than was promised, on a busy machine"
        heard = [line.partition(b" ")[2] for line in rank.lines]
        assert heard.count(b'{"at": 0}\n') >= BEATS - 1, "its own beats"
        assert [json.loads(line) for line in heard[-2:]] == [{"failed": news}, {"done": True}]


def test_a_rank_that_sends_beats_is_not() -> None:
    watch = Watch(0, 2, silence=SILENCE)
    with Rank(watch) as rank:
        for _ in range(20):
            rank.send({"at": 1})
            assert watch.news(SILENCE / BEATS) == ""
        rank.send({"done": True})
        watch.leave()


@pytest.mark.parametrize(
    ("own", "other", "blamed"),
    [
        (7, 6, "rank 2 on node03"),  # it has not come to the collective that 0 and 1 wait in
        (6, 7, "rank 0 on "),
        (7, 7, ""),  # all wait in the same: nobody is to blame
    ],
)
def test_who_keeps_the_others_waiting_is_named(own: int, other: int, blamed: str) -> None:
    """All processes run and send beats; the main thread of one is caught in a loop."""
    timeout = 2.0
    watch = Watch(0, 3, silence=timeout / 5, timeout=timeout, progress=lambda: own)
    began = time.monotonic()
    with Rank(watch, 1) as first, Rank(watch, 2, "node03") as second:
        while not (news := watch.news(timeout / 80)) and time.monotonic() - began < timeout + 1:
            first.send({"at": 7})
            second.send({"at": other})
        seconds = time.monotonic() - began
        watch.leave()
    assert news.startswith(blamed) if blamed else news == ""
    if blamed:
        assert news.endswith(
            " has kept the others waiting for 0.0333 minutes: it is in an endless loop, or needs a larger "
            "train.timeout_minutes"
        )
        assert 0.85 * timeout < seconds < timeout + 0.5


def test_a_rank_that_is_slow_and_moves_is_not_named() -> None:
    timeout = 1.0
    watch = Watch(0, 2, silence=timeout / 5, timeout=timeout, progress=lambda: 1000)
    with Rank(watch) as rank:
        for at in range(100):
            rank.send({"at": at // 10})
            assert watch.news(timeout / 50) == ""
        rank.send({"done": True})
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
    context.set_forkserver_preload(["disttempnet.training.trainer", "disttempnet.cli.main"])  # as in srun.py
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
