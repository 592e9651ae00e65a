"""Shards behind an fsspec URL, through a bounded cache that all processes of a machine share.

One process downloads a shard, under its lock, to a temporary name; the file is compared with the index and renamed. A
reader holds a shared lock on the file itself, which ends with its process. When the cache is full, the least recently
opened shards are removed, except locked ones.

    FOLDER/shards/HASH-OF-THE-URL/00000.tar     a shard; beside it the index of a spec
                                  .00000.tar.lock, .00000.tar.RANDOM.SIZE.part
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import re
import secrets
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import NOT_FOUND, PARTIAL_CONTENT
from pathlib import Path
from typing import Any, TypeVar

from disttempnet.data.builtin.cache import cache_folder
from disttempnet.data.shards.credentials import Credentials
from disttempnet.data.shards.store import (
    CACHE_GB,
    ShardState,
    ShardStore,
    changed_message,
    shard_state,
    shard_state_from,
)
from disttempnet.errors import UserError, UserNotice
from disttempnet.io.files import locked

ATTEMPTS = 5
FIRST_PAUSE = 1.0  # seconds before the second attempt; doubled before each further one
STALLED = 60.0  # seconds without a byte before an HTTP download is aborted
GIGA = 10**9
GZIP = b"\x1f\x8b"  # first bytes of its files; a tar begins with a name
NO_CREDENTIALS = Credentials()
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # not errors of the server
_Result = TypeVar("_Result")


class RangesUnsupported(Exception):
    """Server without byte ranges."""


class ShardReplaced(Exception):
    """Cached shard that was removed or replaced while it was opened."""


def is_remote(spec: str) -> bool:
    """Tell whether a spec is a URL."""
    return "://" in spec


class RemoteStore(ShardStore):
    """Shards under a base URL.

    Args:
        base: URL before the names, without credentials: `s3://bucket/cc12m`.
        cache: the cache folder; empty = the user's.
        limit_gb: limit of all shards of the cache in gigabytes (10⁹ bytes).
        credentials: used to open a URL; in no name, message or key of the cache.
    """

    open_files = 2  # open shards cannot be removed to make room

    def __init__(
        self, base: str, cache: str = "", limit_gb: float = CACHE_GB, credentials: Credentials = NO_CREDENTIALS
    ) -> None:
        self.base, self.limit = base.rstrip("/"), int(limit_gb * GIGA)
        self.root = (Path(cache).expanduser() if cache else cache_folder()) / "shards"
        self.folder = self.root / hashlib.blake2b(self.base.encode(), digest_size=8).hexdigest()
        self._credentials = credentials
        self._checked: dict[str, tuple[tuple[int, int], ShardState]] = {}
        self._system: tuple[int, Any] = (0, None)

    def __reduce__(self) -> tuple[Callable[..., RemoteStore], tuple[str, str, float, Credentials]]:
        return RemoteStore, (self.base, str(self.root.parent), self.limit / GIGA, self._credentials)

    @property
    def about(self) -> str:
        return self.base

    def where(self, name: str) -> str:
        return f"{self.base}/{name}"

    def names(self) -> list[str]:
        """List the shards under the base URL, sorted. Raises UserError."""
        address = self._credentials.applied(self.base)
        entries = self._try(lambda: self._files.ls(address, detail=False), self.base)
        names = [str(entry).partition("?")[0].rstrip("/").rpartition("/")[2] for entry in entries]
        return sorted(name for name in names if name.endswith(".tar") and not name.startswith("."))

    def state(self, name: str) -> ShardState:
        """Return the state, from both ends of the shard if the server sends byte ranges, else by a download."""
        url, address, size = self.where(name), self._address(name), self._info(name).get("size")

        def read(start: int, end: int) -> bytes:
            part = _part_of(self._files, address, start, end) if start < end else b""
            if len(part) != end - start:
                raise RangesUnsupported
            return part

        try:
            if size is not None:
                return self._try(lambda: shard_state_from(size, read), url)
        except RangesUnsupported:
            pass
        path = self.folder / name
        with suppress(FileNotFoundError):
            if size is not None and path.stat().st_size != size:
                path.unlink()  # of an older version
        descriptor = self.open(name)
        try:
            return shard_state(descriptor)
        finally:
            os.close(descriptor)

    def open(self, name: str, expected: ShardState | None = None) -> int:
        """Open a shard, see `ShardStore`; downloads it if it is not in the cache."""
        path = self.folder / name
        while True:
            try:
                return self._open_cached(path, name, expected)
            except FileNotFoundError:
                self._fetch(path, name, expected)
            except ShardReplaced:
                time.sleep(0.01)

    def _open_cached(self, path: Path, name: str, expected: ShardState | None) -> int:
        """Open a cached shard, locked against removal. Raises FileNotFoundError, ShardReplaced."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                status = os.fstat(descriptor)
                if os.stat(path).st_ino != status.st_ino:
                    raise ShardReplaced
            except (BlockingIOError, FileNotFoundError):
                raise ShardReplaced from None
            if expected is not None and self._state_of(name, descriptor, status) != expected:
                os.unlink(path)  # an older version: the current one is downloaded and compared
                raise ShardReplaced
            os.utime(descriptor, ns=(time.time_ns(), status.st_mtime_ns))  # how recently it was used
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise

    def _state_of(self, name: str, descriptor: int, status: os.stat_result) -> ShardState:
        """Return the state; read once per process."""
        known = self._checked.get(name)
        mark = status.st_ino, status.st_mtime_ns  # renaming keeps the mtime of the download
        if known is None or known[0] != mark:
            known = self._checked[name] = mark, shard_state(descriptor)
        return known[1]

    def _fetch(self, path: Path, name: str, expected: ShardState | None) -> None:
        """Download a shard into the cache, unless another process just did. Raises UserError."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(_lock_of(path)):
                if path.is_file():
                    return
                _remove_parts(path)
                self._download(path, name, expected)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written: {error.strerror}; make room, set DISTTEMPNET_CACHE or the source's "
                "cache to another folder, or lower its cache_gb"
            ) from None

    def _download(self, path: Path, name: str, expected: ShardState | None) -> None:
        url = self.where(name)
        size = self._info(name).get("size")
        if expected is not None and size not in (None, expected.size):
            raise UserError(changed_message(url, size, expected))
        known = size or (expected.size if expected else 0)
        most = known or self.limit  # a response without a size may have no end
        part = self._reserve(path, known)
        try:

            def get() -> None:
                self._files.get_file(self._address(name), str(part), callback=stopping_at(most, url))
                found = part.stat().st_size
                if size is not None and found != size:
                    raise EOFError(f"{found:,} of {size:,} bytes arrived")

            self._try(get, url)
            _refuse_compressed(part, url)
            if expected is not None and (found := shard_state(part)) != expected:
                raise UserError(changed_message(url, found.size, expected))
            os.replace(part, path)
        finally:
            with suppress(FileNotFoundError):
                part.unlink()

    def _reserve(self, path: Path, size: int) -> Path:
        """Make room for a shard: create an empty file whose name tells other processes its full size."""
        with locked(self.root / ".room.lock"):
            taken = sum(_reserved(part) for part in self.root.rglob(".*.part"))
            shards = []
            for shard in self.root.rglob("*.tar"):
                with suppress(FileNotFoundError):
                    status = shard.stat()
                    shards.append((status.st_atime_ns, status.st_size, shard))
            taken += sum(entry[1] for entry in shards)
            for _, bytes_freed, shard in sorted(shards):
                if taken + size <= self.limit:
                    break
                if _remove_unread(shard):
                    taken -= bytes_freed
            if taken + size > self.limit:
                warnings.warn(
                    f"{self.root}: open shards take {(taken + size) / GIGA:.1f} GB, more than the limit "
                    f"of {self.limit / GIGA:g} GB: raise cache_gb, or the same shards are downloaded repeatedly",
                    UserNotice,
                    stacklevel=2,
                )
            # an unpredictable name; an existing file or link of that name is never opened
            part = path.with_name(f".{path.name}.{secrets.randbits(64)}.{size}.part")
            part.touch(exist_ok=False)
            return part

    def _info(self, name: str) -> dict[str, Any]:
        address = self._address(name)
        return dict(self._try(lambda: self._files.info(address), self.where(name)))

    def _address(self, name: str) -> str:
        """Return the URL with credentials, which must not be shown."""
        return self._credentials.applied(self.where(name))

    @property
    def _files(self) -> Any:
        """File system of this process: its connections and threads do not survive a fork."""
        if self._system[0] != os.getpid():
            import fsspec

            options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
            if self.base.startswith(("http://", "https://")):
                # no compression: offsets would be wrong, the size unknown, and a body may grow a thousandfold
                options["client_kwargs"] = {
                    "timeout": _http_timeout(),
                    "headers": {"Accept-Encoding": "identity"},
                    "auto_decompress": False,
                }
            try:
                system = fsspec.url_to_fs(self._credentials.applied(self.base), **options)[0]
            except (ImportError, ValueError) as error:  # unknown protocol, or its package is missing
                raise UserError(f"{self.base}: cannot be opened: {self._credentials.hidden(str(error))}") from None
            self._system = (os.getpid(), system)
        return self._system[1]

    def _try(self, action: Callable[[], _Result], url: str) -> _Result:
        """Retry an action several times, with growing pauses. Raises UserError."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return action()
            except (UserError, RangesUnsupported):
                raise
            except Exception as error:  # file systems have errors of their own
                if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                    raise
                if _is_final(error):
                    what = "may not be read" if isinstance(error, PermissionError) else "no such shard"
                    raise UserError(f"{url}: {what}") from None
                if attempt == ATTEMPTS:
                    cause = error.__cause__ or error
                    why = self._credentials.hidden(" ".join(str(cause).split())) or type(cause).__name__
                    raise UserError(f"{url}: the download failed {ATTEMPTS} times: {why}") from None
                time.sleep(FIRST_PAUSE * 2 ** (attempt - 1) * random.uniform(0.75, 1.25))
        raise AssertionError("unreachable")


def _part_of(files: Any, address: str, start: int, end: int) -> bytes:
    """Read a byte range of a file, and never more, whatever a server sends. Raises RangesUnsupported."""
    from fsspec.implementations.http import HTTPFileSystem

    if not isinstance(files, HTTPFileSystem):
        return bytes(files.cat_file(address, start=start, end=end))
    from fsspec.asyn import sync

    async def read() -> bytes:
        session, wanted = await files.set_session(), {"Range": f"bytes={start}-{end - 1}"}
        async with session.get(files.encode_url(address), headers=wanted) as reply:
            if reply.status == NOT_FOUND:
                raise FileNotFoundError(address)
            reply.raise_for_status()
            if reply.status != PARTIAL_CONTENT:
                raise RangesUnsupported  # its body may be of any size: the connection is closed
            part = b""
            while piece := await reply.content.read(end - start + 1 - len(part)):
                part += piece
            return part

    return bytes(sync(files.loop, read))


def stopping_at(most: int, url: str) -> Any:
    """Return a callback for fsspec that aborts a download with a UserError after so many bytes."""
    from fsspec.callbacks import Callback

    class ByteLimit(Callback):
        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            if self.value > most:
                raise UserError(
                    f"{url}: over {most:,} bytes arrived, more than stated or than cache_gb allows: a shard "
                    "of unknown size has to fit into the cache"
                )

    return ByteLimit()


def _refuse_compressed(part: Path, url: str) -> None:
    with part.open("rb") as file:
        if file.read(2) == GZIP:
            raise UserError(
                f"{url}: is compressed (gzip), and samples are read by their offset in the tar: "
                "serve the .tar uncompressed"
            )


def _is_final(error: Exception) -> bool:
    """Tell whether a retry would fail the same way."""
    cause = error.__cause__  # fsspec turns HTTP errors of its first request into a missing file
    if cause is not None:
        return getattr(cause, "status", None) in (401, 403, 404, 410)
    return isinstance(error, (FileNotFoundError, PermissionError))


def _http_timeout() -> Any:
    try:
        import aiohttp
    except ImportError:
        raise UserError("shards over HTTP need aiohttp: pip install 'disttempnet[remote]'") from None
    return aiohttp.ClientTimeout(total=None, sock_connect=STALLED, sock_read=STALLED)


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _parts_of(path: Path) -> Iterator[Path]:
    return path.parent.glob(f".{path.name}.*.part")


def _remove_parts(path: Path) -> None:
    """Remove partial downloads of killed processes; the caller holds the lock of the shard."""
    for part in _parts_of(path):
        with suppress(FileNotFoundError):
            part.unlink()


def _reserved(part: Path) -> int:
    """Return the size of a download in progress; 0 if its process has died, then it is removed."""
    match = re.fullmatch(r"\.(.+)\.\d+\.(\d+)\.part", part.name)
    if match is None:
        return 0
    path = part.with_name(match[1])
    try:
        with locked(_lock_of(path), wait=False):
            _remove_parts(path)
            return 0
    except BlockingIOError:
        return int(match[2])


def _remove_unread(shard: Path) -> bool:
    """Remove a shard unless a process has it open; return whether it is gone."""
    try:
        descriptor = os.open(shard, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shard.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
