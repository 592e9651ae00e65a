"""Journal of scanned shards on disk, so that an interrupted scan resumes.

One record per shard: length, blake2b, then the shard's entry and columns. A record that is incomplete, damaged or of
another version of this package ends the journal: later shards are scanned again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from disttempnet.data.shards.index import INDEX_COLUMNS, Shard

DIGEST = 16  # bytes
_PREFIX = 8 + DIGEST


class Journal:
    """Scanned shards of an index under construction. One process holds it at a time; others wait in `__init__`.

    Args:
        index: path of the index; the journal is INDEX.partial.
        caption_key: records with another key are ignored.

    Attributes:
        shards: entries of the scanned shards by name.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, index: Path, caption_key: str) -> None:
        self.path, self.caption_key = index.with_name(f"{index.name}.partial"), caption_key
        self.shards: dict[str, Shard] = {}
        self._columns: dict[str, dict[str, tuple[int, int]]] = {}  # shard → column → (first byte, size) in the file
        self._file = self._locked()
        self._end = self._read()
        os.ftruncate(self._file.fileno(), self._end)

    def _locked(self) -> BinaryIO:
        while True:
            file: BinaryIO = self.path.open("a+b", buffering=0)
            with suppress(OSError):  # a disk without locks: two concurrent scans cost time, not correctness
                fcntl.flock(file, fcntl.LOCK_EX)
            if self._is_at_path(file):
                return file
            file.close()  # the previous holder removed it: records written here would be lost

    def _is_at_path(self, file: BinaryIO) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        return False

    def append(self, shard: Shard, columns: Mapping[str, bytes]) -> None:
        """Append a shard. Raises OSError; then the journal is unchanged."""
        head = json.dumps({"caption_key": self.caption_key, "shard": asdict(shard)}).encode()
        payload = b"".join([len(head).to_bytes(8, "little"), head, *(columns[name] for name in INDEX_COLUMNS)])
        record = memoryview(len(payload).to_bytes(8, "little") + _digest(payload) + payload)
        try:
            while record:
                record = record[self._file.write(record) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), self._end)
            raise
        self._note(payload)

    def columns(self) -> dict[str, dict[str, memoryview]]:
        """Return shard → column → its bytes, mapped from the file."""
        if not self._end:
            return {}
        view = memoryview(mmap.mmap(self._file.fileno(), self._end, prot=mmap.PROT_READ))
        return {
            shard: {name: view[begin : begin + size] for name, (begin, size) in places.items()}
            for shard, places in self._columns.items()
        }

    def close(self) -> None:
        """Release the journal to other processes. Records stay for the next scan; an empty journal is removed."""
        if not self._end:
            self.remove()
        with suppress(OSError):  # explicitly: a mapping of the file would keep the lock
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()

    def remove(self) -> None:
        """Delete the journal, unless another process has replaced it by its own."""
        if self._is_at_path(self._file):
            self.path.unlink(missing_ok=True)

    def _read(self) -> int:
        """Read all complete records, and return the offset of their end."""
        self._end = 0
        self._file.seek(0)
        while len(prefix := self._file.read(_PREFIX)) == _PREFIX:
            size = int.from_bytes(prefix[:8], "little")
            if size > os.fstat(self._file.fileno()).st_size:
                break
            payload = self._file.read(size)
            if len(payload) < size or _digest(payload) != prefix[8:]:
                break
            try:
                self._note(payload)
            except (KeyError, TypeError, ValueError):  # of another version of this package
                break
        return self._end

    def _note(self, payload: bytes) -> None:
        """Register a record. Raises KeyError, TypeError or ValueError if it is not one; then nothing is registered."""
        length = int.from_bytes(payload[:8], "little")
        head = json.loads(payload[8 : 8 + length])
        shard = Shard(**head["shard"])
        if 8 + length + sum(column_bytes(shard.samples).values()) != len(payload):
            raise ValueError(f"{len(payload):,} bytes")
        begin, places = self._end + _PREFIX + 8 + length, {}
        for name, size in column_bytes(shard.samples).items():
            places[name] = (begin, size)
            begin += size
        self._end += _PREFIX + len(payload)
        if head["caption_key"] == self.caption_key:
            self.shards[shard.name], self._columns[shard.name] = shard, places


def column_bytes(samples: int) -> dict[str, int]:
    """Return the bytes of each column of an index for this many samples."""
    return {name: samples * column.row_bytes for name, column in INDEX_COLUMNS.items()}


def _digest(payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=DIGEST).digest()
