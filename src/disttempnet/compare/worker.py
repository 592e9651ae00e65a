"""A worker process: trains the runs it is given, one after another, and tells the parent how far it is.

A worker leads its own process group, so a Ctrl-C in the terminal reaches the parent alone; the parent sends SIGTERM,
at which a run saves a checkpoint and ends. A worker whose parent is gone does the same by itself.
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


class Progress(NamedTuple):
    """A run has logged `step` of `steps`."""

    step: int
    steps: int
    metrics: Mapping[str, float]


class Ended(NamedTuple):
    """A run's end: `finished`, `stopped` (saved, to be continued) or `failed` for a reason in one line."""

    outcome: str
    reason: str = ""


@dataclass(frozen=True)
class Place:
    """Where a worker works: its number, its share of the processor, its GPU (empty = none), its log file."""

    number: int
    threads: int
    gpu: str
    log: Path


class _Stop(BaseException):
    """A stop signal outside the training loop, where there is nothing to save."""


def work(connection: Connection, place: Place) -> None:
    """The worker's main function: configs come in, `Progress` and `Ended` go out, until None or the parent's end."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, _stop)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        with place.log.open("a", encoding="utf-8") as log:
            os.dup2(log.fileno(), stream.fileno())
    show_notices_plainly()
    if place.gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = place.gpu
    try:
        import torch

        torch.set_num_threads(place.threads)
        while (config := connection.recv()) is not None:
            connection.send(_run(config, connection))
    except (_Stop, EOFError, OSError):
        pass  # the parent sees the closed connection


def _run(config: Config, connection: Connection) -> Ended:
    from disttempnet.training.trainer import train

    def report(step: int, steps: int, metrics: Mapping[str, float]) -> None:
        try:
            connection.send(Progress(step, steps, dict(metrics)))
        except OSError:  # the parent was killed
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        return Ended("finished" if train(config, resume="auto", report=report) else "stopped")
    except Preempted:
        return Ended("stopped")
    except UserError as error:
        return Ended("failed", str(error))
    except Exception as error:  # one run's fault must not end the others; the log holds all of it
        say(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {config.name}", error=True)
        traceback.print_exc()
        sys.stderr.flush()
        return Ended("failed", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stop
