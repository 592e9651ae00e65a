"""Stores of shards: how a shard is opened, and the fingerprint that distinguishes its versions."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from disttempnet.errors import UserError
from disttempnet.io.files import open_regular
from disttempnet.io.machine import cause

FINGERPRINT_BYTES = 64 * 1024  # of each end of a shard
CACHE_GB = 100.0  # of remote shards
STATE_THREADS = 16  # threads that read fingerprints; they mostly wait for disk or network


class ShardState(NamedTuple):
    """Size of a shard in bytes, and a hash of size and both ends: cheap, and different for a rewritten shard."""

    size: int
    fingerprint: str


def shard_state(file: Path | int) -> ShardState:
    """Return the state of a file or an open descriptor. Raises OSError."""
    if isinstance(file, Path):
        descriptor = open_regular(file)
        try:
            return shard_state(descriptor)
        finally:
            os.close(descriptor)
    return shard_state_from(os.fstat(file).st_size, lambda start, end: os.pread(file, end - start, start))


def shard_state_from(size: int, read: Callable[[int, int], bytes]) -> ShardState:
    """Return the state of bytes that `read(start, end)` returns."""
    digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=16)
    digest.update(read(0, min(size, FINGERPRINT_BYTES)))
    digest.update(read(max(0, size - FINGERPRINT_BYTES), size))
    return ShardState(size, digest.hexdigest())


def file_fingerprint(path: Path) -> str:
    """Return the fingerprint alone, of any file. Raises OSError."""
    return shard_state(path).fingerprint


def changed_message(where: str, size: int, expected: ShardState) -> str:
    """Return the message about a shard of this size that differs from the indexed one."""
    what = "its content differs" if size == expected.size else f"it has {size:,} bytes, not {expected.size:,}"
    return (
        f"{where}: this shard has changed since it was indexed: {what}. Restore it, or index again with "
        "disttempnet data index (older checkpoints will not fit)"
    )


class ShardStore(ABC):
    """Shards by name; pickled into workers.

    Attributes:
        folder: folder of the index, and of the shards or their cache.
        open_files: number of shards that a process should keep open.
    """

    folder: Path
    open_files: int

    @property
    @abstractmethod
    def about(self) -> str:
        """Folder or base URL, for messages."""

    @abstractmethod
    def where(self, name: str) -> str:
        """Return the path or URL of a shard, for messages."""

    @abstractmethod
    def open(self, name: str, expected: ShardState | None = None) -> int:
        """Open a shard for reading and return its descriptor; the caller closes it.

        Args:
            name: of the shard.
            expected: its state in the index; None = any.

        Raises:
            UserError: it does not exist or has changed.
        """

    @abstractmethod
    def state(self, name: str) -> ShardState:
        """Return the current size and fingerprint. Raises UserError."""

    @contextmanager
    def local(self, name: str, expected: ShardState | None = None) -> Iterator[Path]:
        """Give a path at which a shard can be read inside the `with`; see `open`."""
        descriptor = self.open(name, expected)
        try:
            yield self.folder / name
        finally:
            os.close(descriptor)

    def states(self, names: Sequence[str]) -> dict[str, ShardState]:
        """Return the state of each shard. Raises UserError if one cannot be read."""
        with ThreadPoolExecutor(STATE_THREADS) as pool:
            return dict(zip(names, pool.map(self.state, names), strict=True))


class LocalStore(ShardStore):
    """Shards in a local folder."""

    open_files = 64  # a loader worker reads a few at a time

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: dict[str, tuple[tuple[int, int, int], ShardState]] = {}

    @property
    def about(self) -> str:
        return str(self.folder)

    def where(self, name: str) -> str:
        return str(self.folder / name)

    def open(self, name: str, expected: ShardState | None = None) -> int:
        """See `ShardStore`."""
        try:
            descriptor = open_regular(self.folder / name)
        except OSError as error:
            raise self._gone(name, error) from None
        try:
            if expected is not None and (found := self._state_of(name, descriptor)) != expected:
                raise UserError(changed_message(self.where(name), found.size, expected))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def state(self, name: str) -> ShardState:
        self._seen.pop(name, None)
        descriptor = self.open(name)
        try:
            return self._state_of(name, descriptor)
        finally:
            os.close(descriptor)

    def _state_of(self, name: str, descriptor: int) -> ShardState:
        """Return the state; read once per process, and again if inode, mtime or size has changed."""
        try:
            status = os.fstat(descriptor)
            mark, known = (status.st_ino, status.st_mtime_ns, status.st_size), self._seen.get(name)
            if known is None or known[0] != mark:
                known = self._seen[name] = mark, shard_state(descriptor)
        except OSError as error:
            raise self._gone(name, error) from None
        return known[1]

    def _gone(self, name: str, error: OSError) -> UserError:
        advice = "; restore the shard" if cause(error) == error.strerror else ""
        return UserError(f"{self.where(name)}: cannot be read: {cause(error)}{advice}")
