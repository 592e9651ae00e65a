"""Folder of an export: written beside its place, and moved there once everything in it is checked."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from disttempnet.errors import UserError
from disttempnet.io.files import follow_umask, unwritable_named

EXPORT_MARK = ".export"  # in a folder that an export wrote, which a later one may replace


@contextmanager
def export_folder(out: Path) -> Iterator[Path]:
    """Give an empty folder to write to; it becomes `out` when the block ends without an error.

    A folder that an earlier export wrote is replaced. After an error it is as before, and nothing else is left.

    Raises:
        UserError: `out` cannot be written, is a file, or holds other files.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a file; name a folder for the export")
    if out.is_dir() and any(out.iterdir()) and not (out / EXPORT_MARK).is_file():
        raise UserError(f"{out}: holds files that no export wrote; name another folder")
    with unwritable_named(out):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent))
    old = temporary / "old"
    try:
        content = temporary / "new"
        content.mkdir()
        yield content
        with unwritable_named(out):
            (content / EXPORT_MARK).write_text("disttempnet export\n", encoding="utf-8")
            for path in content.rglob("*"):
                if path.is_file():
                    follow_umask(path)
            if out.exists():
                out.rename(old)
            content.rename(out)
    finally:
        if old.exists() and not out.exists():  # the new one did not take its place
            try:
                old.rename(out)
            except OSError as error:  # then it is not removed either
                raise UserError(f"{out}: cannot be put back ({error.strerror or error}); it is in {old}") from None
        shutil.rmtree(temporary, ignore_errors=True)
