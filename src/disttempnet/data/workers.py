"""Limits and failures of loader workers: shared memory, open files, and a worker that dies."""

from __future__ import annotations

import os
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from torch.utils.data import get_worker_info

from disttempnet.distributed.launcher import local_processes
from disttempnet.errors import UserError, UserNotice
from disttempnet.io.machine import open_files

SHM = "/dev/shm"
MORE_ROOM = "make it larger (docker run --shm-size=8g), or set data.workers lower, or to 0"
# torch's messages for a lack of shared memory: at its own allocation, or by the signal that kills a worker
NO_ROOM = re.compile(r"unable to \w+.{0,40}(/torch_|shared memory)|killed by signal: Bus error|out of shared memory")
WORKER_DIED = ", usually out of memory. Lower data.workers; --resume auto continues from the last checkpoint"
OWN_FILES = 64  # open files of a process beside batches: shards, logs, pipes of workers
FILES_A_BATCH = 3  # one for each tensor, from its worker until it is freed


def share_tensor(tensor: Tensor) -> Tensor:
    """Move a tensor to shared memory if this process is a loader worker.

    Otherwise the thread that sends the batch would do it. An error there is lost, and training would wait forever.
    """
    return tensor.share_memory_() if get_worker_info() is not None else tensor


def fit_prefetch(most: int, batch_bytes: int, workers: int) -> int:
    """Return the number of batches that each worker may prefetch, so that all fit into shared memory.

    Args:
        most: batches per worker where there is room.
        batch_bytes: bytes of a batch of this rank.
        workers: loader workers of this rank.

    Raises:
        UserError: there is no room for one batch per worker.
    """
    if not workers or not os.path.isdir(SHM):
        return most
    disk = os.statvfs(SHM)
    room = disk.f_bavail * disk.f_frsize // local_processes()
    fits = (room // batch_bytes - 1) // workers
    if fits >= most:
        return most
    free, size = (f"{count / 1e6:,.1f} MB" for count in (room, batch_bytes))
    found = f"{free} are free for this process, and a batch takes {size}"
    if fits < 1:
        raise UserError(f"{SHM} is too small for {workers} loader workers: {MORE_ROOM} ({found})")
    warnings.warn(
        f"{SHM} is small: each loader worker prefetches {fits} batches, not {most}; {MORE_ROOM} ({found})",
        UserNotice,
        stacklevel=2,
    )
    return fits


def check_open_files(batches: int) -> None:
    """Raise UserError if this process may not open enough files for so many prefetched batches."""
    needed, allowed = OWN_FILES + FILES_A_BATCH * batches, open_files()
    if allowed < needed:
        raise UserError(
            f"data.workers: they need {needed} open files, and this process may open {allowed}: raise the limit "
            "(ulimit -n 4096), or set data.workers lower, or to 0"
        )


@contextmanager
def lost_workers_named() -> Iterator[None]:
    """Turn the death of a loader worker into a UserError of one line.

    torch raises wherever the signal arrives: anywhere in the training loop, not only in the loader. If the worker died
    while it sent a batch, the connection breaks before the signal arrives.
    """
    try:
        try:
            yield
        except (OSError, EOFError) as error:
            places = traceback.extract_tb(error.__traceback__)
            if not any(Path(place.filename).name == "resource_sharer.py" for place in places):
                raise
            raise UserError(f"a loader worker died while it sent a batch{WORKER_DIED}") from None
    except RuntimeError as error:  # the signal may come in the lines above, too
        if NO_ROOM.search(str(error)):
            raise UserError(f"{SHM} is full; loader workers send batches through it: {MORE_ROOM}") from None
        if "Pin memory thread exited" in str(error):  # it was receiving a batch of the worker
            raise UserError(f"a loader worker died while it sent a batch{WORKER_DIED}") from None
        found = re.search(r"DataLoader worker \(pid\D*([\d, ]+)\)", str(error))
        if found is None:
            raise
        how = re.search(r"killed by signal: ([^.]+)", str(error))
        raise UserError(f"loader worker {found[1]} died" + (f" ({how[1]})" if how else "") + WORKER_DIED) from None
