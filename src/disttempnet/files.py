"""Small files that are replaced as a whole; whether a path can be written."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from disttempnet.errors import UserError

WRITING = ".writing-"  # begins the name of what is not whole yet


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file, on the disk at once: a reader, or a kill at any moment, finds the old or the new one.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    # process ids repeat on the nodes that share a disk
    temporary = path.with_name(f"{WRITING}{path.name}-{platform.node()}-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def refuse_unwritable(path: Path) -> None:
    """Raise UserError where a file of this path cannot be written: learnt before the work, not after it.

    Nothing is made; folders of the path may be missing.
    """
    try:
        folder = next((parent for parent in path.absolute().parents if parent.exists()), path)
        if path.is_dir():
            why = "it is a folder"
        elif not folder.is_dir():
            why = f"{folder} is no folder"
        elif not os.access(folder, os.W_OK | os.X_OK):
            why = f"{folder} does not allow it"
        else:
            return
    except OSError as error:
        why = str(error.strerror)
    raise UserError(f"{path}: cannot be written: {why}")
