"""What loader workers hand over to the process that they work for: through shared memory and open files, both of which
can run out, and a worker can die."""

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
MORE_ROOM = "give it more (docker run --shm-size=8g), or set data.workers lower, or to 0"
# what torch says where it finds none: at its own allocation, or by the signal that a worker dies of
NO_ROOM = re.compile(r"unable to \w+.{0,40}(/torch_|shared memory)|killed by signal: Bus error|out of shared memory")
WORKER_DIED = ": out of memory, as a rule. Set data.workers lower, then --resume auto goes on from the last checkpoint"
OWN_FILES = 64  # that a process has open apart from batches: shards, logs, pipes of workers
FILES_A_BATCH = 3  # each tensor is one, from the worker that makes it until it is used up


def share_tensor(tensor: Tensor) -> Tensor:
    """In shared memory where this is a worker. Left to the thread that sends it, a lack of room would be an error that
    nobody hears of, and the batch would be waited for without end."""
    return tensor.share_memory_() if get_worker_info() is not None else tensor


def fit_prefetch(most: int, batch_bytes: int, workers: int) -> int:
    """How many batches each worker may hold ready, so that all have room in shared memory, and the one in use.

    Args:
        most: to hold, where there is room enough.
        batch_bytes: of one batch of this rank.
        workers: of this rank.

    Raises:
        UserError: there is no room for one each, or the environment says what cannot be.
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
        f"{SHM} is small: each loader worker holds {fits} batches ready, not {most}; {MORE_ROOM} ({found})",
        UserNotice,
        stacklevel=2,
    )
    return fits


def check_open_files(batches: int) -> None:
    """Raise UserError where this process may not open the files of so many batches that are ready at a time."""
    needed, allowed = OWN_FILES + FILES_A_BATCH * batches, open_files()
    if allowed < needed:
        raise UserError(
            f"data.workers: so many need {needed} open files, and this process may open {allowed}: raise the limit "
            "(ulimit -n 4096), or set data.workers lower, or to 0"
        )


@contextmanager
def lost_workers_named() -> Iterator[None]:
    """Tell in one line of a loader worker that died.

    torch raises where the signal of its death arrives: anywhere in the training loop, not only in the loader. Where it
    died while a batch was handed over, the connection to it breaks before the signal comes.
    """
    try:
        try:
            yield
        except (OSError, EOFError) as error:
            places = traceback.extract_tb(error.__traceback__)
            if not any(Path(place.filename).name == "resource_sharer.py" for place in places):
                raise
            raise UserError(f"a loader worker died while it handed over a batch{WORKER_DIED}") from None
    except RuntimeError as error:  # the signal may come in the lines above, too
        if NO_ROOM.search(str(error)):
            raise UserError(f"{SHM} is full, where loader workers hand over batches: {MORE_ROOM}") from None
        if "Pin memory thread exited" in str(error):  # it was handing over what the worker gave
            raise UserError(f"a loader worker died while it handed over a batch{WORKER_DIED}") from None
        found = re.search(r"DataLoader worker \(pid\D*([\d, ]+)\)", str(error))
        if found is None:
            raise
        how = re.search(r"killed by signal: ([^.]+)", str(error))
        raise UserError(f"loader worker {found[1]} died" + (f" ({how[1]})" if how else "") + WORKER_DIED) from None
