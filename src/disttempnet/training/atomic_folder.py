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
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from disttempnet import distributed
from disttempnet.errors import UserError, notice
from disttempnet.io.files import WRITING, follow_umask, write_atomically

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
        for file in files:
            follow_umask(file)
        for place in (*files, *{file.parent for file in files}, folder):
            _to_disk(place)
        return {file.relative_to(folder).as_posix(): _size_and_sum(file) for file in files}

    def publish() -> None:
        if main:
            write_atomically(folder / LISTING, json.dumps(listing, indent=1) + "\n")
            _to_disk(folder)
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
    shutil.rmtree(gone, ignore_errors=True)  # NFS keeps files that somebody reads: `remove_leftovers` finds them


def remove_leftovers(parent: Path) -> None:
    """Remove what ranks that were killed have left in a folder: files and folders that they wrote or removed."""
    for left in [*parent.glob(f"{WRITING}*"), *parent.glob(f"{REMOVING}*")]:
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def damage(folder: Path) -> str:
    """What is wrong with a folder of `write_whole`; empty if nothing.

    One without a listing is examined by what its files say of themselves, and a notice says so: older ones have none.
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
        found = _damage_without_listing(folder)
    except OSError as error:
        found = str(error)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        found = f"{LISTING} cannot be used ({type(error).__name__})"
    return next(filter(None, distributed.gather_objects(found)), "")


def _damage_without_listing(folder: Path) -> str:
    """What a file of the folder says is wrong with it: tensors that end early, a checksum inside that does not fit,
    no JSON. What is gone, and a changed byte of the towers, cannot be seen without a listing."""
    if not folder.is_dir():
        return f"{folder.name} is gone"
    if distributed.is_main():
        notice(
            f"{folder}: has no {LISTING}, so sizes and checksums cannot be compared: only what its files say of "
            "themselves is (checkpoints of early versions have none)"
        )
    for path in sorted(folder.iterdir())[distributed.rank() :: distributed.world_size()]:
        try:
            fault = INSIDE[path.suffix](path) if path.suffix in INSIDE and path.is_file() else ""
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, zipfile.BadZipFile):
            fault = "is not a file of its kind"
        if fault:
            return f"{path.name} {fault}"
    return ""


def _inside_tensors(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length) if length < size else b"")
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    return "" if size == expected else f"has {size:,} bytes of {expected:,}"


def _inside_archive(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        return "is not what was written" if archive.testzip() else ""


def _inside_json(path: Path) -> str:
    json.loads(path.read_bytes())
    return ""


INSIDE: dict[str, Callable[[Path], str]] = {
    ".safetensors": _inside_tensors,
    ".pt": _inside_archive,
    ".json": _inside_json,
}


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
