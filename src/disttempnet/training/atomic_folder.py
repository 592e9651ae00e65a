"""Atomic folders, which all ranks write together, and which survive killed ranks and full disks.

The files are written to a hidden folder, flushed to disk and listed with their sizes and checksums in `files.json`.
Only then the folder gets its name. A folder that is removed loses its name first. The listing allows verification
later: a file that was cut off, changed or lost is named.
"""

from __future__ import annotations

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
from disttempnet.io.files import DISK_IS_FULL, WRITING, follow_umask, write_atomically

LISTING = "files.json"
REMOVING = ".removing-"
CHECKSUM_BYTES = 8 << 20  # read at a time
TORCH_COULD_NOT_WRITE = ("inline_container", "iostream error")  # torch.save's messages


def write_folder(target: Path, write: Callable[[Path], list[Path]]) -> None:
    """Write a folder from all ranks, atomically; an existing one is replaced.

    Args:
        target: the folder.
        write: called on every rank with the folder to write to; returns the files that this rank wrote.

    Raises:
        UserError: a rank could not write; every rank raises, and nothing is left behind.
    """
    # The name is unique: a rank of an earlier start that still writes must not write in here.
    folder = target.with_name(f"{WRITING}{target.name}-{distributed.gather_objects(uuid.uuid4().hex[:8])[0]}")
    main = distributed.is_main()

    def begin() -> None:
        # Rank 0 makes the hidden folder.
        if main:
            folder.mkdir(parents=True)

    def own_files() -> dict[str, tuple[int, int]]:
        # Every rank writes its files, flushes them to disk and returns name → (size, checksum).
        files = write(folder)
        for file in files:
            follow_umask(file)
        for path in (*files, *{file.parent for file in files}, folder):
            _to_disk(path)
        return {file.relative_to(folder).as_posix(): _size_and_sum(file) for file in files}

    def publish() -> None:
        # Rank 0 writes the listing, then gives the folder its name.
        if main:
            write_atomically(folder / LISTING, json.dumps(listing, indent=1) + "\n")
            _to_disk(folder)
            remove_folder(target)
            os.rename(folder, target)
            _to_disk(target.parent)

    # The steps one after the other; each ends on all ranks before the next begins.
    try:
        with _unwritable_named(target):
            distributed.together(begin)
            parts = distributed.gather_objects(distributed.together(own_files))
            listing = {name: facts for part in parts for name, facts in part.items()}
            distributed.together(publish)
    except BaseException:
        if main:
            shutil.rmtree(folder, ignore_errors=True)  # frees the disk
        raise


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it exists. It is renamed first, so that no partly removed one keeps its name."""
    if not folder.exists():
        return
    gone = folder.with_name(f"{REMOVING}{folder.name}-{uuid.uuid4().hex[:8]}")
    os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)  # NFS keeps open files: `remove_leftovers` removes them


def remove_leftovers(parent: Path) -> None:
    """Remove files and folders that killed ranks were writing or removing in a folder."""
    for left in [*parent.glob(f"{WRITING}*"), *parent.glob(f"{REMOVING}*")]:
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def damage(folder: Path) -> str:
    """Verify a folder of `write_folder`; return its first fault, or an empty text.

    Older folders have no listing: their files are verified by their own formats alone, with a notice. The ranks read
    different files, and all return the same.
    """
    found = ""
    try:
        listing = json.loads((folder / LISTING).read_text(encoding="utf-8"))
        for name in sorted(listing)[distributed.rank() :: distributed.world_size()]:
            size, checksum = listing[name]
            path = folder / name
            if not path.is_file():
                found = f"{name} is missing"
            elif path.stat().st_size != size:
                found = f"{name} has {path.stat().st_size:,} bytes of {size:,}"
            elif _size_and_sum(path)[1] != checksum:
                found = f"{name} has changed"
    except FileNotFoundError:
        found = _damage_without_listing(folder)
    except OSError as error:
        found = str(error)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        found = f"{LISTING} cannot be used ({type(error).__name__})"
    return next(filter(None, distributed.gather_objects(found)), "")


def _damage_without_listing(folder: Path) -> str:
    """Verify files by their own formats: tensors that end early, checksums inside archives, JSON.

    A missing file, or a changed byte of the towers, cannot be found without a listing.
    """
    if not folder.is_dir():
        return f"{folder.name} is missing"
    if distributed.is_main():
        notice(
            f"{folder}: has no {LISTING}, so sizes and checksums cannot be compared: its files are verified by their "
            "own formats alone (checkpoints of early versions have none)"
        )
    for path in sorted(folder.iterdir())[distributed.rank() :: distributed.world_size()]:
        try:
            fault = FORMAT_CHECKS[path.suffix](path) if path.suffix in FORMAT_CHECKS and path.is_file() else ""
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, zipfile.BadZipFile):
            fault = "is not a valid file"
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
        return "has changed" if archive.testzip() else ""


def _inside_json(path: Path) -> str:
    json.loads(path.read_bytes())
    return ""


FORMAT_CHECKS: dict[str, Callable[[Path], str]] = {
    ".safetensors": _inside_tensors,
    ".pt": _inside_archive,
    ".json": _inside_json,
}


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Turn the OSError of a full disk into a UserError of one line, for files besides checkpoints."""
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
    return f"{path}: cannot be written: {why}; {free}. --resume auto continues from the last checkpoint"


def _size_and_sum(path: Path) -> tuple[int, int]:
    checksum = size = 0
    with path.open("rb") as file:
        while piece := file.read(CHECKSUM_BYTES):
            checksum, size = zlib.crc32(piece, checksum), size + len(piece)
    return size, checksum


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
