"""A pool of worker processes: results arrive as they are yielded, and a dead worker is one clear line."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch

from disttempnet.errors import TERMINATED, UserError

JobArgument = TypeVar("JobArgument")


class LostWorker(UserError):
    """A worker process died while it worked on a task."""


class _Item(NamedTuple):
    """A value that a job yielded."""

    value: Any


class _Failure(NamedTuple):
    """An exception of a job; `users` marks a UserError."""

    message: str
    users: bool


def run_jobs(
    job: Callable[[JobArgument], Iterator[Any]], tasks: Sequence[JobArgument], workers: int
) -> Generator[tuple[JobArgument, Any]]:
    """Run a job on every task; tasks start in order, several at a time.

    Args:
        job: a generator function, or a partial of one; pickled once for each worker.
        tasks: arguments of the job.
        workers: number of processes; 1 runs everything in this one.

    Yields:
        (task, item) for every item that `job(task)` yields, in the order of arrival.

    Raises:
        UserError: the job raised one.
        LostWorker: a worker was killed.
        RuntimeError: any other exception of a job, with its traceback.
    """
    if workers <= 1 or not tasks:
        yield from ((task, item) for task in tasks for item in job(task))
        return
    pool = _Pool(job, min(workers, len(tasks)))
    try:
        yield from pool.run(deque(tasks))
    finally:
        pool.close()


class _Pool:
    def __init__(self, job: Callable[[Any], Iterator[Any]], workers: int) -> None:
        # the fork server has the modules loaded: workers start fast, and safely beside threads
        context = multiprocessing.get_context("forkserver")
        function = job.func if isinstance(job, partial) else job
        context.set_forkserver_preload([__name__, function.__module__])
        self._processes: dict[Connection, BaseProcess] = {}
        self._tasks: dict[Connection, Any] = {}
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, job), daemon=True)
            process.start()
            theirs.close()
            self._processes[ours] = process

    def run(self, waiting: deque[Any]) -> Iterator[tuple[Any, Any]]:
        for connection in self._processes:
            self._deal(connection, waiting)
        while self._tasks:
            ready = wait(list(self._tasks))
            for connection in [one for one in self._tasks if one in ready]:
                task = self._tasks[connection]
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    raise LostWorker(self._death(connection, task)) from None
                if isinstance(message, _Item):
                    yield task, message.value
                elif isinstance(message, _Failure):
                    raise UserError(message.message) if message.users else RuntimeError(message.message)
                else:
                    self._deal(connection, waiting)

    def _deal(self, connection: Connection, waiting: deque[Any]) -> None:
        self._tasks.pop(connection, None)
        if waiting:
            self._tasks[connection] = waiting.popleft()
            with suppress(OSError):  # a dead worker is noticed when its pipe closes
                connection.send(self._tasks[connection])

    def _death(self, connection: Connection, task: Any) -> str:
        process = self._processes[connection]
        process.join()
        hint = " (out of memory? use fewer --workers)" if process.exitcode == -signal.SIGKILL else ""
        return f"a worker process died while it worked on {task}: {exit_reason(process)}{hint}"

    def close(self) -> None:
        for connection, process in self._processes.items():
            connection.close()
            process.kill()
        for process in self._processes.values():
            process.join()


def _work(connection: Connection, job: Callable[[Any], Iterator[Any]]) -> None:
    """Serve as a worker: receive tasks and send items until the parent closes the connection or dies."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # for the parent, which stops its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with suppress(EOFError, OSError):
        while True:
            task = connection.recv()
            try:
                for item in job(task):
                    connection.send(_Item(item))
            except BrokenPipeError:
                return
            except UserError as error:
                connection.send(_Failure(str(error), True))
            except Exception:
                connection.send(_Failure(traceback.format_exc(), False))
            else:
                connection.send(None)


def _end_with_parent() -> None:
    """End this process as soon as its parent has ended, even in the middle of a long task."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def exit_reason(process: BaseProcess) -> str:
    """Return the signal that ended a process, or its exit code."""
    code = process.exitcode or 0
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Turn SIGTERM into SystemExit inside the block, so that unfinished work is cleaned up."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
