"""Files that are replaced atomically, and such as may be damaged; one line where one cannot be written or read."""

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

WRITING = ".writing-"  # begins the name of what is not whole yet
LONGEST_NAME = 255  # bytes, on most file systems
WHOLE = 1 << 31  # bytes of a file that is read whole: more is none of ours
PIECE = 1 << 24  # bytes read at once
OPEN_FILES = ("/dev/std", "/dev/fd/", "/proc/")


class UnfitFile(OSError):
    """What is there is no file that data can be read from: a device, a pipe, a socket, or a file that is too large."""


def open_regular(path: str | Path) -> int:
    """A descriptor to read a regular file by; nothing else is opened: a device has no end, and a pipe may never begin.

    Raises:
        UnfitFile: it is something else.
        OSError: it is not there, is a folder, or cannot be opened.
    """
    _refuse_irregular(os.stat(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # which a regular file does not mind
    try:
        _refuse_irregular(os.fstat(descriptor))  # something else may have taken its place
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _refuse_irregular(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise UnfitFile(errno.EINVAL, "not a regular file")


def read_regular(path: str | Path, most: int = WHOLE) -> bytes:
    """All of a regular file of at most so many bytes. Raises as `open_regular`; UnfitFile also where it is larger."""
    descriptor = open_regular(path)
    try:
        pieces, size = [], 0
        while piece := os.read(descriptor, min(most - size + 1, PIECE)):
            pieces.append(piece)
            size += len(piece)
            if size > most:
                raise UnfitFile(errno.EFBIG, f"over {most:,} bytes")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
    finally:
        os.close(descriptor)


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A new, empty file in the folder of `path`; it is gone at the end, unless it was renamed.

    Its name cannot be guessed, an existing file or link of that name is never opened, and its permissions follow the
    umask. Process ids would repeat on nodes that share a disk, and a guessed name could be a link to somebody's file.

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
def atomic(path: Path) -> Iterator[Path]:
    """A temporary file to write to, which replaces `path` when the block ends without an error, on the disk at once.

    A reader, or a kill at any moment, finds the old or the new file. What is no regular file (/dev/stdout) is written
    to as it is.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    if is_device(path):
        yield path
        return
    with temporary_beside(path) as temporary:
        yield temporary
        follow_umask(temporary)  # some writers put a file of their own in its place
        _to_disk(temporary)
        os.replace(temporary, path)


def is_device(path: Path) -> bool:
    """Whether it is there and is no regular file, or is one by which a process has it open (/dev/stdout)."""
    return path.exists() and (not path.is_file() or str(path.absolute()).startswith(OPEN_FILES))


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file by this content. See `atomic`.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode("utf-8"))


def write_output(path: Path, content: str | bytes) -> None:
    """Replace a file that a user asked for; its folder is made.

    Raises:
        UserError: it cannot be written; nothing is left of it.
    """
    with unwritable_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)


@contextmanager
def unwritable_named(path: Path) -> Iterator[None]:
    """Turn an OSError inside into a UserError that says what could not be written, and why."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def refuse_unwritable(path: Path) -> None:
    """Raise UserError where a file of this path cannot be written: learnt before the work, not after it.

    Nothing is left there; folders of the path may be missing.
    """
    try:
        folder = next((parent for parent in path.absolute().parents if parent.exists()), path)
        if path.is_dir():
            why = "it is a folder"
        elif not folder.is_dir():
            why = f"{folder} is no folder"
        elif is_device(path):  # written to as it is, so that it does not matter what its folder allows
            if os.access(path, os.W_OK):
                return
            why = "it is not yours to write to"
        elif not os.access(folder, os.W_OK | os.X_OK):
            why = f"{folder} does not allow it"
        elif len(os.fsencode(path.name)) > LONGEST_NAME:
            why = str(os.strerror(errno.ENAMETOOLONG))
        else:
            return
    except OSError as error:
        why = str(error.strerror)
    raise UserError(f"{path}: cannot be written: {why}")


def follow_umask(path: Path) -> None:
    """Give a file the permissions of a new one in its folder. Writers of weights make theirs for their owner alone."""
    with temporary_beside(path) as new:
        path.chmod(stat.S_IMODE(new.stat().st_mode))


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file that a run can do without; empty where there is no such file.

    One that is damaged is passed over with a notice, and empty too.
    """
    try:
        value = json.loads(read_regular(path))
    except FileNotFoundError:
        return {}
    except OSError as error:
        notice(f"{path}: passed over: it cannot be read: {error.strerror}")
        return {}
    except (ValueError, RecursionError):
        notice(f"{path}: passed over: it is not JSON")
        return {}
    if not isinstance(value, dict):
        notice(f"{path}: passed over: it holds no object")
        return {}
    return value


def read_json_lines(path: Path, check: Callable[[dict[str, Any]], object]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a file of JSON lines, as text and as objects; none where there is no such file.

    A damaged line is passed over with a notice that names it. Only the last one may be half-written: a running or
    killed process left it so.

    Args:
        check: raises KeyError, TypeError, ValueError or AttributeError for an object that is no line of this file.
    """
    try:
        lines = read_regular(path).split(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        notice(f"{path}: passed over: it cannot be read: {error.strerror}")
        return
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8")
            value = json.loads(text)
        except (ValueError, RecursionError):
            if number < len(lines):
                notice(f"{path}: line {number} is passed over: it is not JSON")
            continue
        try:
            check(value)
        except (KeyError, TypeError, ValueError, AttributeError):
            notice(f"{path}: line {number} is passed over: it is no line of this file")
            continue
        yield text, value
