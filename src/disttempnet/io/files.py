"""Atomic writing, locking and checked reading of files; a file that cannot be written or read is one clear line."""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from disttempnet.errors import UserError, notice
from disttempnet.io.machine import cause

WRITING = ".writing-"  # prefix of files that are still being written
LONGEST_NAME = 255  # bytes, on most file systems
MOST_READ = 1 << 31  # bytes of a file that is read at once: no file of this project is larger
READ_BYTES = 1 << 24  # bytes a call of read()
DESCRIPTOR_PATHS = ("/dev/std", "/dev/fd/", "/proc/")  # paths of files that a process already has open
DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # errors of a write that more room would mend


class UnfitFile(OSError):
    """A path that data cannot be read from: a device, a pipe, a socket, or a file that is too large."""


def open_regular(path: str | Path) -> int:
    """Open a regular file for reading and return its descriptor. Devices and pipes are refused: they may never end.

    Raises:
        UnfitFile: not a regular file.
        OSError: missing, a folder, or not readable.
    """
    _refuse_irregular(os.stat(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # no effect on a regular file
    try:
        _refuse_irregular(os.fstat(descriptor))  # the path may have been replaced meanwhile
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _refuse_irregular(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise UnfitFile(errno.EINVAL, "not a regular file")


def read_regular(path: str | Path, most: int = MOST_READ) -> bytes:
    """Return the content of a regular file. Raises as `open_regular`, and UnfitFile for more than `most` bytes."""
    descriptor = open_regular(path)
    try:
        pieces, size = [], 0
        while piece := os.read(descriptor, min(most - size + 1, READ_BYTES)):
            pieces.append(piece)
            size += len(piece)
            if size > most:
                raise UnfitFile(errno.EFBIG, f"over {most:,} bytes")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
    finally:
        os.close(descriptor)


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """Make a new, empty file beside `path`, and remove it at the end unless it was renamed.

    Its name is random and its permissions follow the umask; an existing file or link is never opened. A process id
    would repeat on nodes that share a disk, and a name that can be guessed could be a link to another user's file.

    Raises:
        OSError: it cannot be made.
    """
    mark = f"-{secrets.token_hex(8)}"
    room = LONGEST_NAME - len(WRITING) - len(mark)
    name = path.name.encode("utf-8", "surrogateescape")[:room].decode("utf-8", "ignore")
    temporary = path.with_name(f"{WRITING}{name}{mark}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    os.close(os.open(temporary, flags, 0o666))
    try:
        yield temporary
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a lock file. It is released however the process ends; the file stays.

    Raises:
        BlockingIOError: another process holds it, and `wait` is False.
        OSError: it cannot be made, or its file system has no locks.
    """
    from filelock import FileLock, Timeout  # half the start of the command line, and few commands lock

    lock = FileLock(path, blocking=wait)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(errno.EAGAIN, "locked by another process", str(path)) from None
    except NotImplementedError:  # older releases of filelock
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(path)) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary file to write to; it replaces `path` when the block ends without an error, flushed to disk.

    A reader, or a kill at any moment, finds the old file or the new one. A path that is no regular file (/dev/stdout)
    is written to directly.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    if is_device(path):
        yield path
        return
    with temporary_beside(path) as temporary:
        yield temporary
        follow_umask(temporary)  # some writers replace it by a file of their own
        _to_disk(temporary)
        os.replace(temporary, path)


def is_device(path: Path) -> bool:
    """Return whether a path exists and is no regular file, or names a file that a process has open (/dev/stdout)."""
    return path.exists() and (not path.is_file() or str(path.absolute()).startswith(DESCRIPTOR_PATHS))


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file by this content; see `atomic`.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode("utf-8"))


def write_output(path: Path, content: str | bytes) -> None:
    """Replace a file that a user asked for, and make its folder.

    Raises:
        UserError: it cannot be written; nothing is left behind.
    """
    with unwritable_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)


@contextmanager
def unwritable_named(path: Path) -> Iterator[None]:
    """Turn an OSError inside into a UserError that names the file and the cause."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


@contextmanager
def unreadable_named(path: Path) -> Iterator[None]:
    """Turn an OSError inside into a UserError that names the file and the cause."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {cause(error)}") from None


def refuse_unwritable(path: Path) -> None:
    """Raise UserError where a file of this path cannot be written, before any work is done.

    Nothing is left there; folders of the path may be missing.
    """
    try:
        folder = next((parent for parent in path.absolute().parents if parent.exists()), path)
        if path.is_dir():
            why = "it is a folder"
        elif not folder.is_dir():
            why = f"{folder} is no folder"
        elif is_device(path):  # written to directly: the permissions of its folder do not matter
            if os.access(path, os.W_OK):
                return
            why = "permission denied"
        elif not os.access(folder, os.W_OK | os.X_OK):
            why = f"no permission to write into {folder}"
        elif len(os.fsencode(path.name)) > LONGEST_NAME:
            why = str(os.strerror(errno.ENAMETOOLONG))
        else:
            return
    except OSError as error:
        why = str(error.strerror)
    raise UserError(f"{path}: cannot be written: {why}")


def follow_umask(path: Path) -> None:
    """Give a file the permissions of a new one in its folder. Some writers of weights make theirs owner-only."""
    with temporary_beside(path) as new:
        path.chmod(stat.S_IMODE(new.stat().st_mode))


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_object(path: Path) -> dict[str, Any]:
    """Return the object of an optional JSON file; an empty one where the file is missing.

    A damaged file gives an empty object as well, and a notice.
    """
    try:
        value = json.loads(read_regular(path))
    except FileNotFoundError:
        return {}
    except OSError as error:
        notice(f"{path}: skipped: it cannot be read: {error.strerror}")
        return {}
    except (ValueError, RecursionError):
        notice(f"{path}: skipped: it is not JSON")
        return {}
    if not isinstance(value, dict):
        notice(f"{path}: skipped: it holds no object")
        return {}
    return value


def read_json_lines(path: Path, check: Callable[[dict[str, Any]], object]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the lines of a JSON Lines file as (text, object); none where the file is missing.

    A damaged line is skipped with a notice that names it. A half-written last line is skipped silently: a running or
    killed process left it.

    Args:
        check: raises KeyError, TypeError, ValueError or AttributeError for an object that does not belong here.
    """
    try:
        lines = read_regular(path).split(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        notice(f"{path}: skipped: it cannot be read: {error.strerror}")
        return
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8")
            value = json.loads(text)
        except (ValueError, RecursionError):
            if number < len(lines):
                notice(f"{path}: line {number} is skipped: it is not JSON")
            continue
        try:
            check(value)
        except (KeyError, TypeError, ValueError, AttributeError):
            notice(f"{path}: line {number} is skipped: it is no line of this file")
            continue
        yield text, value
