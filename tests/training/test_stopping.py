"""Signals are answered while a run trains, and are the process's own again after it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from disttempnet import distributed
from disttempnet.errors import Preempted
from disttempnet.training.stopping import STOPPING, StopSignal


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
