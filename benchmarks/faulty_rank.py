"""One rank of a training run, with a fault inside it that SIGUSR2 sets off.

`python faulty_rank.py train …` is `python -m disttempnet train …`; `FAULT` in the environment is JSON: the rank that
has the fault, its kind, and for some a number. Nothing of the package knows of this file.

    raise    an exception in the next function of the package that is called
    commit   SIGKILL ahead of the N-th operation on a file from then on: make, open, fsync, rename, remove
    write    SIGKILL's twin SIGXFSZ, as soon as a file has as many bytes as the limit that the harness sets

It is also what the harness forks ranks from: importing torch takes longer than a run.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import signal
import sys
from collections.abc import Callable
from json import loads
from types import FrameType
from typing import Any

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
PACKAGE = f"{os.sep}disttempnet{os.sep}"
WRITES = os.O_WRONLY | os.O_RDWR


class Injected(Exception):
    """What the harness raises."""


def rank() -> int:
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def install(kind: str, number: int) -> None:
    """Make ready what SIGUSR2 sets off."""
    if kind == "write":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it: the write would fail
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if kind == "raise":
        signal.signal(signal.SIGUSR2, _raise)
    if kind == "commit":
        _kill_at_operation(number)


def _raise(number: int, frame: FrameType | None) -> None:
    def at_the_next_call(frame: FrameType, event: str, argument: Any) -> None:
        if PACKAGE in frame.f_code.co_filename:  # not inside a lock or a queue of Python's own: none raises there
            sys.settrace(None)
            raise Injected("a fault of the program")

    sys.settrace(at_the_next_call)


def _kill_at_operation(number: int) -> None:
    owner, left = os.getpid(), [0]

    def begin(*_: object) -> None:
        left[0] = number

    def operation() -> None:
        if left[0] and os.getpid() == owner:
            left[0] -= 1
            if not left[0]:
                os.kill(owner, signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS and (event != "open" or (arguments[2] or 0) & WRITES):
            operation()

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            operation()
            return function(*arguments)

        return called

    signal.signal(signal.SIGUSR2, begin)
    sys.addaudithook(hook)
    os.fsync = before(os.fsync)  # the one that is not audited


def main(arguments: list[str]) -> None:
    fault = loads(os.environ.get("FAULT") or "{}")
    if fault and fault["rank"] == rank():
        install(fault["kind"], fault["number"])
    sys.argv = ["disttempnet", *arguments]
    runpy.run_module("disttempnet", run_name="__main__", alter_sys=True)


def forked(environment: dict[str, str], log: str, arguments: list[str]) -> None:
    """The same in a process that has the imports behind it; what it prints goes to a file."""
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    import torch

    multiprocessing.set_start_method(None, force=True)  # loader workers start as they do in a program of its own
    torch.set_num_threads(1)
    main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
