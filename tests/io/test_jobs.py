"""The pool of worker processes: items as they come, exceptions of jobs, and workers that die."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from disttempnet.errors import UserError
from disttempnet.io.jobs import LostWorker, run_jobs, stopped_by_sigterm


def count_to(n: int) -> Iterator[tuple[int, int]]:
    """Yield (1, pid) to (n, pid); 0, −1 and −2 fail in three ways."""
    if n == 0:
        raise UserError("zero: give another")
    if n == -1:
        os.kill(os.getpid(), signal.SIGKILL)
    if n == -2:
        raise ZeroDivisionError("by hand")
    for i in range(1, n + 1):
        yield i, os.getpid()


def test_items_of_every_task_arrive_in_order_from_several_processes() -> None:
    found: dict[int, list[int]] = {}
    processes = set()
    for task, (item, process) in run_jobs(count_to, [3, 1, 2, 4], workers=2):
        found.setdefault(task, []).append(item)
        processes.add(process)
    assert found == {n: list(range(1, n + 1)) for n in (1, 2, 3, 4)}
    assert os.getpid() not in processes


def test_one_worker_is_this_process() -> None:
    assert [(task, item) for task, (item, process) in run_jobs(count_to, [2], workers=1) if process == os.getpid()] == [
        (2, 1),
        (2, 2),
    ]


def test_failures_name_themselves() -> None:
    for task, kind, message in (
        (0, UserError, "^zero: give another$"),
        (-1, LostWorker, r"a worker process died while it worked on -1: SIGKILL \(out of memory\?"),
        (-2, RuntimeError, "ZeroDivisionError: by hand"),
    ):
        with pytest.raises(kind, match=message):
            list(run_jobs(count_to, [task, 1], workers=2))


def test_sigterm_is_an_exit_inside_only() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, stopped_by_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
