"""Folders that all ranks write together and that are whole or absent, whenever a rank ends and whatever the disk does.

The files are written under a hidden name, flushed to the disk and listed with their sizes and checksums in
`files.json`; only then the folder gets its name. What is removed loses its name first. A listed folder can be examined
later: a file that was cut off, changed or lost is named.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from disttempnet import distributed
from disttempnet.errors import UserError
from disttempnet.files import WRITING

LISTING = "files.json"
REMOVING = ".removing-"
PIECE = 8 << 20  # bytes that are read at a time
TORCH_COULD_NOT_WRITE = ("inline_container", "iostream error")  # all that torch.save says of it, by where it strikes
DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_whole(target: Path, write: Callable[[Path], list[Path]]) -> None:
    """Make a folder from all ranks at once; one that has its name is replaced.

    Args:
        target: the folder.
        write: called on every rank with the folder to write to; returns the files that this rank wrote.

    Raises:
        UserError: a rank could not write; every rank raises, and nothing is left of it.
    """
    # a name of its own: what a rank of an earlier start may still write must not end up in here
    folder = target.with_name(f"{WRITING}{target.name}-{distributed.gather_objects(uuid.uuid4().hex[:8])[0]}")
    main = distributed.is_main()

    def begin() -> None:
        if main:
            folder.mkdir(parents=True)

    def own_files() -> dict[str, tuple[int, int]]:
        files = write(folder)
        for place in (*files, *{file.parent for file in files}, folder):
            _to_disk(place)
        return {file.relative_to(folder).as_posix(): _size_and_sum(file) for file in files}

    def publish() -> None:
        if main:
            (folder / LISTING).write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
            for written in (folder / LISTING, folder):
                _to_disk(written)
            remove(target)
            os.rename(folder, target)
            _to_disk(target.parent)

    try:
        with _unwritable_named(target):
            distributed.together(begin)
            parts = distributed.gather_objects(distributed.together(own_files))
            listing = {name: facts for part in parts for name, facts in part.items()}
            distributed.together(publish)
    except BaseException:
        if main:
            shutil.rmtree(folder, ignore_errors=True)  # the room is needed
        raise


def remove(folder: Path) -> None:
    """Remove a folder that may be there. Its name goes first, so that no half of it is taken for a whole."""
    if not folder.exists():
        return
    gone = folder.with_name(f"{REMOVING}{folder.name}-{uuid.uuid4().hex[:8]}")
    os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)  # NFS keeps files that somebody reads: `tidy` finds them


def tidy(parent: Path) -> None:
    """Remove what ranks that were killed have left in a folder: files and folders that they wrote or removed."""
    for left in [*parent.glob(f"{WRITING}*"), *parent.glob(f"{REMOVING}*")]:
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def damage(folder: Path) -> str:
    """What is wrong with a folder of `write_whole`; empty if nothing, or if it has no listing as older ones have not.

    The ranks share the reading, and all learn the same.
    """
    found = ""
    try:
        listing = json.loads((folder / LISTING).read_text(encoding="utf-8"))
        for name in sorted(listing)[distributed.rank() :: distributed.world_size()]:
            size, checksum = listing[name]
            path = folder / name
            if not path.is_file():
                found = f"{name} is gone"
            elif path.stat().st_size != size:
                found = f"{name} has {path.stat().st_size:,} bytes of {size:,}"
            elif _size_and_sum(path)[1] != checksum:
                found = f"{name} is not what was written"
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, AttributeError) as error:
        found = f"{LISTING} cannot be used ({type(error).__name__})" if isinstance(error, ValueError) else str(error)
    return next(filter(None, distributed.gather_objects(found)), "")


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Tell in one line of a disk that took no more of what a run writes beside its checkpoints.

    Raises:
        UserError: instead of the OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        raise UserError(_full(Path(error.filename or folder), str(error.strerror))) from None


@contextmanager
def _unwritable_named(target: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(_full(target, getattr(error, "strerror", None) or str(error))) from None
    except RuntimeError as error:
        if not any(words in str(error) for words in TORCH_COULD_NOT_WRITE):
            raise
        raise UserError(_full(target, "a file could not be written to its end")) from None


def _full(path: Path, why: str) -> str:
    try:
        free = f"{shutil.disk_usage(path.parent).free / 1e6:,.1f} MB are free there"
    except OSError as error:
        free = str(error.strerror)
    return f"{path}: cannot be written: {why}; {free}. --resume auto goes on from the last checkpoint"


def _size_and_sum(path: Path) -> tuple[int, int]:
    checksum = size = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            checksum, size = zlib.crc32(piece, checksum), size + len(piece)
    return size, checksum


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
