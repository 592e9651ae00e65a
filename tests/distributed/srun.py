"""Processes as SLURM's srun starts them: they know each other by SLURM_* variables only.

They are forked from a server that has imported the package, so that a launch costs no imports.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

TIMEOUT_S = 300.0


class Ended(NamedTuple):
    """A rank's exit code (−9: SIGKILL), what it printed, and seconds since the start of all."""

    code: int
    printed: str
    seconds: float


class Srun:
    """K running tasks of one node; a context, at whose end none is left.

    Args:
        tasks: K.
        folder: what rank R prints goes to `rank-R.log`.
        function: top-level, called as `function(*arguments)` in every task; its result is the exit code.
    """

    def __init__(self, tasks: int, folder: Path, function: Callable[..., int], *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["disttempnet.training.trainer", "disttempnet.cli.main"])
        job = random.randrange(1, 10**6)  # the port follows from it
        self.logs = [folder / f"rank-{rank}.log" for rank in range(tasks)]
        self.processes = [
            context.Process(target=_task, args=(variables(rank, tasks, job), str(log), function, arguments))
            for rank, log in enumerate(self.logs)
        ]
        self.started = time.monotonic()
        for process in self.processes:
            process.start()

    def __enter__(self) -> Srun:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def wait(self) -> list[Ended]:
        """The ends of all tasks, in rank order."""
        ends: dict[int, float] = {}
        while len(ends) < len(self.processes):
            assert time.monotonic() - self.started < TIMEOUT_S, f"only {sorted(ends)} ended\n{self.printed()}"
            for rank, process in enumerate(self.processes):
                if rank not in ends and process.exitcode is not None:
                    ends[rank] = time.monotonic() - self.started
            time.sleep(0.02)
        texts = self.printed()
        return [Ended(p.exitcode or 0, texts[rank], ends[rank]) for rank, p in enumerate(self.processes)]

    def printed(self) -> list[str]:
        return [log.read_text(encoding="utf-8") if log.exists() else "" for log in self.logs]


def variables(rank: int, tasks: int, job: int) -> dict[str, str]:
    """What srun sets for a task of a step, as far as it says where the task stands."""
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NTASKS": str(tasks),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    }


def _task(environment: dict[str, str], log: str, function: Callable[..., int], arguments: tuple) -> None:
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    import torch

    torch.set_num_threads(1)
    sys.exit(function(*arguments))
