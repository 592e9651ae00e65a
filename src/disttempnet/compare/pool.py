"""A pool of worker processes for the runs of a grid: a failed run or a dead worker never ends the others."""

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

from disttempnet.compare.display import GridDisplay
from disttempnet.compare.worker import RunEnd, RunProgress, WorkerSettings, work
from disttempnet.config import Config
from disttempnet.io.jobs import exit_reason
from disttempnet.io.machine import cores
from disttempnet.training.signals import Terminal, stop_signals

END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class GridOutcome:
    """The outcome of a grid: failed runs (name → reason in one line), and whether a signal stopped it."""

    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


@dataclass
class _Worker:
    settings: WorkerSettings
    process: BaseProcess
    connection: Connection
    run: Config | None = None
    begun: float = 0.0


class Pool:
    """A pool of `jobs` workers that train a list of runs.

    Args:
        configs: the runs, in the order in which they start.
        jobs: number of runs at a time.
        gpus: GPU names for CUDA_VISIBLE_DEVICES, assigned to the workers in turn; empty without a GPU.
        display: shows progress.
        log: file for everything that the workers print.
    """

    def __init__(
        self, configs: Sequence[Config], jobs: int, gpus: Sequence[str], display: GridDisplay, log: Path
    ) -> None:
        self._waiting = deque(configs)
        self._jobs, self._gpus, self._display, self._log = min(jobs, len(configs)), gpus, display, log
        self._workers: list[_Worker] = []
        self._signals, self._terminal = 0, Terminal()
        self.outcome = GridOutcome()

    def run(self) -> GridOutcome:
        """Train all runs. After a stop signal every running one saves a checkpoint and ends."""
        before = {number: signal.signal(number, self._on_signal) for number in stop_signals(END)}
        try:
            for number in range(self._jobs):
                self._start(number)
            for worker in list(self._workers):  # _deal removes idle workers from the list
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
        """Start a worker process, which then waits for `_deal`."""
        # its share of the cores and of the GPUs
        threads = max(1, cores() // self._jobs)
        limit = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # may be a list, for nesting levels
        if limit.isdecimal():
            threads = min(threads, max(1, int(limit)))
        gpu = self._gpus[number % len(self._gpus)] if self._gpus else ""
        settings = WorkerSettings(number, threads, gpu, self._log)

        # its process, with a pipe for configs and messages
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, settings), name=f"worker-{number}")
        worker = _Worker(settings, process, ours)
        self._workers.append(worker)  # before it starts, so that a signal from now on stops it
        process.start()
        theirs.close()
        return worker

    def _deal(self, worker: _Worker) -> None:
        """Send a free worker its next run, or dismiss it."""
        worker.run = self._waiting.popleft() if self._waiting and not self._signals else None
        worker.begun = time.monotonic()
        if worker.run is not None:
            self._display.began(worker.run.name)
        try:
            worker.connection.send(worker.run)
        except OSError:
            return  # it died: _watch notices
        if worker.run is None:
            worker.process.join()
            worker.connection.close()
            self._workers.remove(worker)

    def _watch(self) -> None:
        """Handle the next messages of the workers."""
        for connection in wait([worker.connection for worker in self._workers], timeout=0.5):
            worker = next(worker for worker in self._workers if worker.connection is connection)
            try:
                message: Any = worker.connection.recv()
            except (EOFError, OSError):
                self._lost(worker)
                continue
            if isinstance(message, RunProgress) and worker.run is not None:
                self._display.progress(worker.run.name, message.step, message.steps, message.metrics)
            elif isinstance(message, RunEnd):
                self._ended(worker, message)
                self._deal(worker)
        self._display.tick()

    def _ended(self, worker: _Worker, end: RunEnd) -> None:
        assert worker.run is not None
        name = worker.run.name
        if end.outcome == "failed":
            self.outcome.failed[name] = end.reason
        self._display.ended(name, end.outcome, end.reason, time.monotonic() - worker.begun)

    def _lost(self, worker: _Worker) -> None:
        """Handle a dead worker: it was stopped before its run began, or killed. Another one takes its place."""
        worker.process.join()
        worker.connection.close()
        self._workers.remove(worker)
        if worker.run is None:
            return
        if self._signals:
            self._ended(worker, RunEnd("stopped"))
            return
        why = exit_reason(worker.process)
        reason = f"its process ended unexpectedly ({why}); its checkpoints are kept, see {self._log}"
        self._ended(worker, RunEnd("failed", reason))
        if self._waiting:
            self._deal(self._start(worker.settings.number))

    def _on_signal(self, number: int, frame: object) -> None:
        """Stop all workers: the first signal lets them save, the second kills them.

        A closed terminal may send SIGHUP twice, by the shell and by the kernel; it never counts as a second signal.
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
