"""What this machine has, and the line that says when memory is not enough. Imports nothing heavy: the command line asks
before it loads torch."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from disttempnet.errors import UserError

HOST_ALLOCATION = ("can't allocate memory", "not enough memory", "Cannot allocate memory")  # in torch's RuntimeErrors
GPU_ALLOCATION = ("CUDA out of memory", "CUDA error: out of memory", "ALLOC_FAILED")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def out_of_memory(error: BaseException) -> str:
    """Whose memory was not enough: `GPU` or `main`; empty where the error is another."""
    text = str(error)
    if isinstance(error, RuntimeError):
        if type(error).__name__ == "OutOfMemoryError" or any(words in text for words in GPU_ALLOCATION):
            return "GPU"
        return "main" if any(words in text for words in HOST_ALLOCATION) else ""
    full = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    return "main" if full else ""


@contextmanager
def memory_named(advice: str) -> Iterator[None]:
    """Inside, an allocation that fails ends in a UserError of one line, which says what to lower."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        whose = out_of_memory(error)
        if not whose:
            raise
        what = (str(error).strip().splitlines() or ["no more can be had"])[0][:200].rstrip(".")
        raise UserError(f"out of {whose} memory: {advice} ({what})") from None
