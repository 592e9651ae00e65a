"""Signals are answered while a run trains, and are the process's own again after it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from disttempnet import distributed
from disttempnet.compare.display import GridDisplay
from disttempnet.compare.pool import Pool
from disttempnet.errors import Preempted
from disttempnet.training.signals import STOPPING, StopSignal


@pytest.fixture(autouse=True)
def handlers() -> Iterator[dict[signal.Signals, object]]:
    """What answers each signal before; put back."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def now() -> dict[signal.Signals, object]:
    return {number: signal.getsignal(number) for number in STOPPING}


@pytest.mark.parametrize(("ranks", "error"), [(1, None), (2, None), (2, Preempted), (1, RuntimeError)])
def test_handlers_are_put_back(
    ranks: int, error: type[Exception] | None, handlers: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    try:
        with StopSignal():
            assert now() != handlers
            if error:
                raise error
    except (Preempted, RuntimeError):
        pass
    assert now() == handlers


def test_a_closed_terminal_asks_for_the_end_unless_nohup_ignores_it(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {1: True, 2: True}
    moved: list[int] = []
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    monkeypatch.setattr(os, "isatty", there.get)
    monkeypatch.setattr(os, "dup2", lambda null, stream: moved.append(stream))
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.code == 143
        assert moved == [], "the terminal is there: kill -HUP"
        there[2] = False
        os.kill(os.getpid(), signal.SIGHUP)
        assert moved == [2], "what is written there from now on is lost, and ends nothing"
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.code == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_second_hangup_kills_no_run_of_a_comparison(tmp_path: Path) -> None:
    """The shell and the kernel both send one."""
    stopped: list[str] = []
    with GridDisplay(1, 0) as display:
        pool = Pool([], 1, [], display, tmp_path / "workers.log")
        process = SimpleNamespace(
            is_alive=lambda: True, terminate=lambda: stopped.append("asked"), kill=lambda: stopped.append("killed")
        )
        pool._workers.append(SimpleNamespace(process=process))
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
            pool._on_signal(number, None)
    assert stopped == ["asked", "killed"]
    assert pool.outcome.stopped


def test_a_rank_that_lost_another_is_not_ended_by_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM of torchrun comes while the rank still has to say what happened; Ctrl-C ends it all the same."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(RuntimeError), StopSignal() as stop:
        raise RuntimeError("connection closed by peer")
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.code == 143
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_larger_code_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told to save and start again, then to end: it ends."""
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.code == 138
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.code == 143
