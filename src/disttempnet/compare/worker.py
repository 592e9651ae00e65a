"""A worker process of `compare`: trains one run after another and reports progress to the parent.

A worker leads its own process group, so a Ctrl-C in the terminal reaches the parent alone. The parent sends SIGTERM;
the run then saves a checkpoint and ends. A worker whose parent has died does the same by itself.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from disttempnet.config import Config
from disttempnet.errors import Preempted, UserError, show_notices_plainly
from disttempnet.terminal import say


class RunProgress(NamedTuple):
    """A logged step of a run: `step` of `steps`."""

    step: int
    steps: int
    metrics: Mapping[str, float]


class RunEnd(NamedTuple):
    """The end of a run: `finished`, `stopped` (saved, can be resumed) or `failed`, with a reason in one line."""

    outcome: str
    reason: str = ""


@dataclass(frozen=True)
class WorkerSettings:
    """Settings of a worker: its number, CPU threads, GPU (empty = none) and log file."""

    number: int
    threads: int
    gpu: str
    log: Path


class _Stop(BaseException):
    """A stop signal outside the training loop, where nothing has to be saved."""


def work(connection: Connection, settings: WorkerSettings) -> None:
    """Receive configs and send `RunProgress` and `RunEnd`, until None comes or the parent ends."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, _stop)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        with settings.log.open("a", encoding="utf-8") as log:
            os.dup2(log.fileno(), stream.fileno())
    show_notices_plainly()
    if settings.gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = settings.gpu
    try:
        import torch

        torch.set_num_threads(settings.threads)
        while (config := connection.recv()) is not None:
            connection.send(_run(config, connection))
    except (_Stop, EOFError, OSError):
        pass  # the parent sees the closed connection


def _run(config: Config, connection: Connection) -> RunEnd:
    from disttempnet.training.trainer import train

    def report(step: int, steps: int, metrics: Mapping[str, float]) -> None:
        try:
            connection.send(RunProgress(step, steps, dict(metrics)))
        except OSError:  # the parent was killed
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        return RunEnd("finished" if train(config, resume="auto", report=report) else "stopped")
    except Preempted:
        return RunEnd("stopped")
    except UserError as error:
        return RunEnd("failed", str(error))
    except Exception as error:  # one failed run must not end the others; the log has the traceback
        say(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {config.name}", error=True)
        traceback.print_exc()
        sys.stderr.flush()
        return RunEnd("failed", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stop
