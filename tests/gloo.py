"""Real gloo processes for tests: started once, asked often.

A pool keeps K worker processes that have joined one process group. A test sends them a top-level function with
arguments; every worker calls it and sends back its result, so `pool.run(step, batch)[2]` is what rank 2 returned.
Starting a process and importing torch costs seconds, a call costs milliseconds: hence pools, not processes, per test.

Nothing here hangs: a worker that fails, dies or does not answer in time ends the whole pool (its process group is of no
use any more) and the test fails with the traceback of each rank that had one. The next call starts a new pool.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import multiprocessing.connection
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

COLLECTIVE_TIMEOUT_S = 180.0  # a rank alone in a collective gives up after this; busy machines stall for a minute
CALL_TIMEOUT_S = 240.0  # and the test process after this


class WorkerError(AssertionError):
    """A rank raised, died or did not answer; the message carries the tracebacks."""


def _worker(rank: int, size: int, store: str, connection: Any) -> None:
    """One rank: join the group, then call what comes through the connection until it closes or sends nothing."""
    os.environ["OMP_NUM_THREADS"] = "1"
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while (message := connection.recv_bytes()) != b"":
            try:
                function, args, kwargs = pickle.loads(message)
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    answer = pickle.dumps((True, function(*args, **kwargs)))
            except BaseException:
                answer = pickle.dumps((False, traceback.format_exc()))
            connection.send_bytes(answer)
    dist.destroy_process_group()
    os._exit(0)  # nothing is left to do: taking the interpreter down would cost seconds


class GlooPool:
    """K persistent ranks. Arguments and results travel by pickle: functions must be importable from tests/."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="gloo-")
        context = multiprocessing.get_context("spawn")
        self._connections, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_worker, args=(rank, size, str(Path(self._folder.name, "store")), theirs), daemon=True
            )
            process.start()
            theirs.close()  # so that a dead worker reads as end of file here
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, function: Callable, *args: Any, **kwargs: Any) -> list:
        """`function(*args, **kwargs)` on every rank at once; the results in rank order."""
        message = pickle.dumps((function, args, kwargs))
        answers: dict[int, tuple[bool, Any]] = {}
        for rank, connection in enumerate(self._connections):
            try:
                connection.send_bytes(message)
            except OSError:
                answers[rank] = (False, f"the process had ended, exit code {self._processes[rank].exitcode}")
        deadline = time.monotonic() + CALL_TIMEOUT_S
        while len(answers) < self.size and (left := deadline - time.monotonic()) > 0:
            waiting = {c: rank for rank, c in enumerate(self._connections) if rank not in answers}
            for connection in multiprocessing.connection.wait(list(waiting), timeout=left):
                rank = waiting[connection]
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    self._processes[rank].join(5)
                    answers[rank] = (False, f"the process ended, exit code {self._processes[rank].exitcode}")
                if not answers[rank][0]:  # the others may wait for this rank in a collective: a moment, no more
                    deadline = min(deadline, time.monotonic() + 2)
        failed = {rank: text for rank, (fine, text) in answers.items() if not fine}
        silent = [rank for rank in range(self.size) if rank not in answers]
        if failed or silent:
            self.close(kill=True)
            parts = [f"rank {rank} of {self.size}:\n{text}" for rank, text in sorted(failed.items())]
            parts += [f"no answer from ranks {silent} of {self.size}"] if silent else []
            raise WorkerError(f"{getattr(function, '__name__', function)} failed\n" + "\n".join(parts))
        return [answers[rank][1] for rank in range(self.size)]

    @property
    def alive(self) -> bool:
        return bool(self._processes)

    def ask_to_end(self) -> None:
        """Tell the workers to leave the group, without waiting for them."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send_bytes(b"")

    def close(self, kill: bool = False) -> None:
        """End the workers: they leave the group together, or are killed where that does not work."""
        if not kill:
            self.ask_to_end()
        for process in self._processes:
            if not kill:
                process.join(10)
            if process.is_alive():
                process.kill()
                process.join(10)
            process.close()
        for connection in self._connections:
            connection.close()
        self._connections, self._processes = [], []
        self._folder.cleanup()


class Pools:
    """The pools of a test session, one a world size, each started at its first use."""

    def __init__(self) -> None:
        self._pools: dict[int, GlooPool] = {}

    def __call__(self, size: int, function: Callable, *args: Any, **kwargs: Any) -> list:
        """Results of `function(*args, **kwargs)` on `size` ranks, in rank order."""
        pool = self._pools.get(size)
        if pool is None or not pool.alive:
            pool = self._pools[size] = GlooPool(size)
        return pool.run(function, *args, **kwargs)

    def close(self) -> None:
        for pool in self._pools.values():
            pool.ask_to_end()
        for pool in self._pools.values():
            pool.close()
