"""Deals runs to worker processes and watches them: a failed run or a dead worker never ends the others."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from disttempnet.compare.display import Display
from disttempnet.compare.worker import Ended, Place, Progress, work
from disttempnet.config import Config
from disttempnet.io.machine import cores
from disttempnet.training.signals import Terminal, stop_signals

END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Outcome:
    """What became of the runs: name → one line of those that failed, and whether all was stopped on the way."""

    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


@dataclass
class _Worker:
    place: Place
    process: BaseProcess
    connection: Connection
    run: Config | None = None
    begun: float = 0.0


class Pool:
    """`jobs` workers over a list of runs.

    Args:
        configs: the runs, in the order in which they are to start.
        jobs: how many run at a time.
        gpus: names of the GPUs for CUDA_VISIBLE_DEVICES, dealt to the workers in turn; empty without a GPU.
        display: shows what happens.
        log: file that takes whatever the workers print.
    """

    def __init__(self, configs: Sequence[Config], jobs: int, gpus: Sequence[str], display: Display, log: Path) -> None:
        self._waiting = deque(configs)
        self._jobs, self._gpus, self._display, self._log = min(jobs, len(configs)), gpus, display, log
        self._workers: list[_Worker] = []
        self._signals, self._terminal = 0, Terminal()
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Train all runs, or until a signal asks for the end; then every run in progress saves a checkpoint first."""
        before = {number: signal.signal(number, self._on_signal) for number in stop_signals(END)}
        try:
            for number in range(self._jobs):
                self._start(number)
            for worker in list(self._workers):  # _deal takes those out that it lets go
                self._deal(worker)
            while self._workers:
                self._watch()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for worker in self._workers:
                if worker.process.is_alive():
                    worker.process.kill()
        return self.outcome

    def _start(self, number: int) -> _Worker:
        """Start a worker's process; it waits for `_deal`."""
        threads = max(1, cores() // self._jobs)
        limit = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # a list: one a level of nesting
        if limit.isdecimal():
            threads = min(threads, max(1, int(limit)))
        gpu = self._gpus[number % len(self._gpus)] if self._gpus else ""
        place = Place(number, threads, gpu, self._log)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, place), name=f"worker-{number}")
        worker = _Worker(place, process, ours)
        self._workers.append(worker)  # before it starts: a signal from now on reaches it, or else _deal lets it go
        process.start()
        theirs.close()
        return worker

    def _deal(self, worker: _Worker) -> None:
        """Give a free worker its next run, or let it go."""
        worker.run = self._waiting.popleft() if self._waiting and not self._signals else None
        worker.begun = time.monotonic()
        if worker.run is not None:
            self._display.began(worker.run.name)
        try:
            worker.connection.send(worker.run)
        except OSError:
            return  # it died; _watch sees that
        if worker.run is None:
            worker.process.join()
            worker.connection.close()
            self._workers.remove(worker)

    def _watch(self) -> None:
        """Wait for word from a worker and act on it."""
        for connection in wait([worker.connection for worker in self._workers], timeout=0.5):
            worker = next(worker for worker in self._workers if worker.connection is connection)
            try:
                message: Any = worker.connection.recv()
            except (EOFError, OSError):
                self._lost(worker)
                continue
            if isinstance(message, Progress) and worker.run is not None:
                self._display.progress(worker.run.name, message.step, message.steps, message.metrics)
            elif isinstance(message, Ended):
                self._ended(worker, message)
                self._deal(worker)
        self._display.tick()

    def _ended(self, worker: _Worker, end: Ended) -> None:
        assert worker.run is not None
        name = worker.run.name
        if end.outcome == "failed":
            self.outcome.failed[name] = end.reason
        self._display.ended(name, end.outcome, end.reason, time.monotonic() - worker.begun)

    def _lost(self, worker: _Worker) -> None:
        """A worker is gone: asked to stop before its run had begun, or killed; then another takes its place."""
        worker.process.join()
        worker.connection.close()
        self._workers.remove(worker)
        if worker.run is None:
            return
        if self._signals:
            self._ended(worker, Ended("stopped"))
            return
        code = worker.process.exitcode or 0
        why = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        reason = f"its process ended unexpectedly ({why}); what it had saved is kept, see {self._log}"
        self._ended(worker, Ended("failed", reason))
        if self._waiting:
            self._deal(self._start(worker.place.number))

    def _on_signal(self, number: int, frame: object) -> None:
        """First signal: every worker saves and ends. Second: they are killed; the last checkpoints stay.

        A terminal that is closed may send SIGHUP twice, by the shell and by the kernel: it never counts as a second.
        """
        if number == signal.SIGHUP:
            self._terminal.leave_if_closed()
            if self._signals:
                return
        self._signals += 1
        self.outcome.stopped = True
        for worker in self._workers:
            if worker.process.is_alive():
                (worker.process.terminate if self._signals == 1 else worker.process.kill)()
