"""Resources of this machine: cores, open files, memory; one clear line where they do not suffice.

Imports nothing heavy: the command line uses it before it loads torch.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from disttempnet.errors import UserError

HOST_ALLOCATION = ("can't allocate memory", "not enough memory", "Cannot allocate memory")  # in torch's RuntimeErrors
GPU_ALLOCATION = ("CUDA out of memory", "CUDA error: out of memory", "ALLOC_FAILED")
MOST_FILES = 65_536  # the limit of open files is raised to this, where that is allowed


def open_files() -> int:
    """Raise the limit of open files as far as allowed and return it. Workers inherit the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):  # macOS allows less than it reports
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    return MOST_FILES if soft == resource.RLIM_INFINITY else soft


def cause(error: OSError) -> str:
    """Return why a file cannot be opened, and what to do where too many are open."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"too many open files: this process may open {open_files()}; raise the limit (ulimit -n 4096)"
    return error.strerror or str(error)


@contextmanager
def open_files_named() -> Iterator[None]:
    """Turn a lack of file descriptors inside into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        raise UserError(f"{cause(error)}, or use fewer workers") from None
    except RuntimeError as error:  # of torch
        if os.strerror(errno.EMFILE) not in str(error):
            raise
        raise UserError(f"{cause(OSError(errno.EMFILE, ''))}, or use fewer workers") from None


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def out_of_memory(error: BaseException) -> str:
    """Return which memory was exhausted, `GPU` or `main`; empty for any other error."""
    text = str(error)
    if isinstance(error, RuntimeError):
        if type(error).__name__ == "OutOfMemoryError" or any(words in text for words in GPU_ALLOCATION):
            return "GPU"
        return "main" if any(words in text for words in HOST_ALLOCATION) else ""
    full = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    return "main" if full else ""


@contextmanager
def memory_named(advice: str) -> Iterator[None]:
    """Turn a failed allocation inside into a UserError that says what to lower."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        whose = out_of_memory(error)
        if not whose:
            raise
        what = (str(error).strip().splitlines() or ["no more can be had"])[0][:200].rstrip(".")
        raise UserError(f"out of {whose} memory: {advice} ({what})") from None
