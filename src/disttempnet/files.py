"""Small files that are replaced as a whole."""

from __future__ import annotations

import os
import platform
from pathlib import Path

WRITING = ".writing-"  # begins the name of what is not whole yet


def write_atomically(path: Path, text: str) -> None:
    """Replace a file, on the disk at once: a reader, or a kill at any moment, finds the old or the new one.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    # process ids repeat on the nodes that share a disk
    temporary = path.with_name(f"{WRITING}{path.name}-{platform.node()}-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
