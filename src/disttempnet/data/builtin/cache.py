"""User's cache folder, and shards that are made in it on first use."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from disttempnet.errors import UserError
from disttempnet.io.paths import expand_home


def cached_shards(dataset: str, split: str, shards: Iterable[str], write: Callable[[Path], None]) -> Path:
    """Return the folder DATASET/SPLIT of the cache; on first use, make it.

    Several processes may call this at once: each writes its own folder, and the first to rename it wins.

    Args:
        dataset: name that has to change whenever the bytes may change.
        split: name of the folder in it.
        shards: file names that the folder holds.
        write: writes these files into an empty folder, with the same bytes every time.

    Raises:
        UserError: a cache folder that cannot be written, or a cached shard that is gone.
    """
    folder = cache_folder() / dataset / split
    if not folder.is_dir():
        try:
            _materialise(folder, write)
        except OSError as error:
            raise UserError(
                f"{folder}: shards cannot be written here ({error.strerror}); "
                "set DISTTEMPNET_CACHE to a writable folder"
            ) from None
    for name in shards:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: cached shard is gone; delete {folder} to make it again")
    return folder


def write_shard(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write a tar of (name, content) without times and owners: the same members give the same bytes."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))


def cache_folder() -> Path:
    """Return DISTTEMPNET_CACHE, or the user's cache folder.

    Raises:
        UserError: a user without a home.
    """
    try:
        if chosen := os.environ.get("DISTTEMPNET_CACHE"):
            return Path(expand_home(chosen))
        if shared := os.environ.get("XDG_CACHE_HOME"):
            return Path(expand_home(shared)) / "disttempnet"
        return Path.home() / ".cache" / "disttempnet"
    except (RuntimeError, ValueError):
        raise UserError("no home folder is known (HOME is not set): set DISTTEMPNET_CACHE to a folder") from None


def _materialise(folder: Path, write: Callable[[Path], None]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(temporary)
        temporary.chmod(0o755)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, with the same bytes
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
