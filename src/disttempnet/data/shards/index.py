"""Shard index: dense sample ids → byte ranges in shards.

Sample id = position in the index: the same in every epoch, every run and at every world size. The index is one
memory-mapped file beside the shards (io/columns.py): build.py writes it, open.py checks it against the shards.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from disttempnet.data.images import MAX_BYTES, UnreadableImage
from disttempnet.data.shards.scan import REASONS, Tally, json_captions
from disttempnet.data.shards.store import LocalStore, ShardState, ShardStore
from disttempnet.data.shards.tar import BrokenTar, read_member, sample_key
from disttempnet.data.source import MAX_TEXT, IndexedSource, UnreadableCaption, hash_of, mix_bits, usable_captions
from disttempnet.errors import UserError
from disttempnet.io.columns import ColumnType, ColumnWriter, map_columns
from disttempnet.io.machine import cause, open_files

SHARD_INDEX_FORMAT = "disttempnet-index-1"
IMAGE, CAPTION, JSON = range(3)
NOT_IN_THE_DIGEST = ("checksum", "tally", "ungrouped")  # fields of a shard that may be added later
INDEX_COLUMNS = {  # as they lie in the file, a row per sample
    "start": ColumnType(np.dtype("<i8")),
    "spans": ColumnType(np.dtype("<u4"), (3, 2)),
    "status": ColumnType(np.dtype("u1")),
}
HEADER_MARGIN = 1024  # bytes of the header beside its metadata, at most


@dataclass(frozen=True)
class Shard:
    """Entry of a shard in the index.

    Attributes:
        name: path from the folder of the index.
        size: bytes.
        samples: number of samples, usable or not.
        fingerprint: see `ShardState`.
        note: damage of the shard; empty if there is none.
        checksum: hex sha256 of all bytes; empty if not computed.
        tally: statistics of images and captions.
        ungrouped: message about files with several dots in their names that belong to no sample; None if an earlier
            version indexed the shard, which ignored such files.
    """

    name: str
    size: int
    samples: int
    fingerprint: str
    note: str = ""
    checksum: str = ""
    tally: Tally = field(default_factory=dict)
    ungrouped: str | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Fields that the digest of an index covers."""
        return {key: value for key, value in asdict(self).items() if key not in NOT_IN_THE_DIGEST}


class ShardIndex(IndexedSource):
    """Samples of webdataset shards in tar order, as columns; a group is a shard.

    Attributes:
        path: the index file.
        folder: folder of the shards, or of their cache.
        store: opens the shards.
        shards: one entry per shard.
        start: int64 [N], byte offset of a sample's first tar header.
        spans: uint32 [N, 3, 2], (offset from start, size) in bytes of image, caption, JSON; size 0 = absent.
        status: uint8 [N], index into `REASONS`.
        caption_key: key of the samples' .json that holds their captions; empty = .txt.
        digest: hex sha256 over shard names, sizes, fingerprints, counts, the caption key and the columns.
    """

    reasons = REASONS

    def __init__(
        self,
        path: Path,
        folder: Path,
        shards: tuple[Shard, ...],
        columns: Mapping[str, NDArray[Any]],
        caption_key: str = "",
        store: ShardStore | None = None,
    ) -> None:
        self.path, self.folder, self.shards, self.caption_key = path, folder, shards, caption_key
        self.store = store or LocalStore(folder)
        self.where = self.store.about
        self.start, self.spans, self.status = columns["start"], columns["spans"], columns["status"]
        self.first = np.cumsum([0, *(shard.samples for shard in shards)], dtype=np.int64)
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.status)

    def __reduce__(self) -> tuple[Callable[..., ShardIndex], tuple[Path, Path, bool, ShardStore]]:
        # another process maps the file instead of receiving a copy
        return load_index, (self.path, self.folder, False, self.store)

    @cached_property
    def digest(self) -> str:
        digest = start_digest(self.shards, self.caption_key)
        for name in INDEX_COLUMNS:
            digest.update(np.ascontiguousarray(getattr(self, name)).data)
        return digest.hexdigest()

    def image_bytes(self, sample: int) -> bytes:
        return self._read(sample, IMAGE)

    def captions(self, sample: int) -> tuple[str, ...]:
        if self.caption_key:
            return json_captions(self._read(sample, JSON), self.caption_key)
        return usable_captions([self._read(sample, CAPTION)])

    def metadata(self, sample: int) -> dict[str, Any] | None:
        """Return the parsed .json of a sample; None if it has none."""
        return json.loads(self._read(sample, JSON)) if self.spans[sample, JSON, 1] else None

    def name(self, sample: int) -> str:
        """Return `SHARD.tar:KEY`, with the key read from the shard, or with the id if it cannot be read any more."""
        shard, key = self.group_of(sample), f"sample {sample}"
        with suppress(BrokenTar):
            if member := read_member(self._file(shard), int(self.start[sample])):
                key = sample_key(member.name)
        return f"{self.shards[shard].name}:{key}"

    def hashes(self) -> NDArray[np.uint64]:
        """Hash the shard's file name, without its folder, and the byte offset in it."""
        shards = np.array([hash_of(Path(shard.name).name) for shard in self.shards], np.uint64)
        return mix_bits(np.repeat(shards, np.diff(self.first)) + self.start.astype(np.uint64))

    def problems(self, names: int = 3) -> str:
        """Return a line for each reason why samples are left out, and for each damaged shard."""
        lines = super().problems(names).splitlines()
        for shard in self.shards:
            if shard.note:
                lines.append(f"{shard.name}: {shard.note}; {shard.samples:,} samples before it")
            elif not shard.samples:
                lines.append(f"{shard.name}: has no samples")
            if shard.ungrouped:
                lines.append(f"{shard.name}: {shard.ungrouped}")
        return "\n".join(lines)

    def _read(self, sample: int, kind: int) -> bytes:
        shard = self.group_of(sample)
        offset, size = (int(value) for value in self.spans[sample, kind])
        if kind == IMAGE and size > MAX_BYTES:
            raise UnreadableImage(f"over {MAX_BYTES:,} bytes")
        if kind != IMAGE and size > MAX_TEXT:
            raise UnreadableCaption(f"over {MAX_TEXT:,} bytes")
        descriptor = self._file(shard)
        try:
            data = os.pread(descriptor, size, int(self.start[sample]) + offset)
        except OSError as error:
            raise UserError(f"{self.store.where(self.shards[shard].name)}: cannot be read: {cause(error)}") from None
        if len(data) < size:
            path = self.store.where(self.shards[shard].name)
            raise UserError(f"{path}: ends inside sample {sample}: it was cut off after indexing; restore the shard")
        return data

    def _file(self, shard: int) -> int:
        """Return the descriptor of an open shard; reads use explicit offsets, so forked processes may share it."""
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= min(self.store.open_files, open_files() // 4):
            os.close(self._files.popitem(last=False)[1])
        entry = self.shards[shard]
        self._files[shard] = self.store.open(entry.name, ShardState(entry.size, entry.fingerprint))
        return self._files[shard]

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()


def start_digest(shards: Sequence[Shard], caption_key: str) -> hashlib._Hash:
    """Return the digest of an index before its columns are added."""
    digest = hashlib.sha256(json.dumps([shard.identity for shard in shards], sort_keys=True).encode())
    digest.update(caption_key.encode())
    return digest


def write_index(
    path: Path, shards: Sequence[Shard], caption_key: str, columns: Mapping[str, Iterable[bytes | memoryview]]
) -> None:
    """Write an index file piece by piece, so that memory does not grow with its size.

    Args:
        path: an empty temporary file; after an error its content is not an index.
        shards: in the order of ids.
        caption_key: see `ShardIndex`.
        columns: bytes of each of `INDEX_COLUMNS`, in pieces of any size.

    Raises:
        OSError: it cannot be written.
    """
    samples = sum(shard.samples for shard in shards)
    metadata = {
        "format": SHARD_INDEX_FORMAT,
        "shards": json.dumps([asdict(shard) for shard in shards]),
        "caption_key": caption_key,
        "digest": "0" * 64,  # known when all columns are written
    }
    room = len(json.dumps(metadata)) + HEADER_MARGIN
    digest = start_digest(shards, caption_key)
    with path.open("r+b") as file:
        writer = ColumnWriter(file, room + -room % 8)
        for name, column in INDEX_COLUMNS.items():
            for piece in columns[name]:
                digest.update(piece)
                file.write(piece)
            writer.end_column(name, column.dtype, (samples, *column.row_shape))
        writer.finish({**metadata, "digest": digest.hexdigest()})


def load_index(path: Path, folder: Path, verify: bool = False, store: ShardStore | None = None) -> ShardIndex:
    """Map an index file into memory.

    Args:
        path: the index file.
        folder: where the shards are.
        verify: read the whole file and compare it with its digest.
        store: opens the shards; None = they are local.

    Raises:
        UserError: the file is not an index of this version, or is damaged.
    """
    try:
        metadata, columns = map_columns(path, SHARD_INDEX_FORMAT)
        shards = tuple(Shard(**shard) for shard in json.loads(metadata["shards"]))
        index = ShardIndex(path, folder, shards, columns, metadata.get("caption_key", ""), store)
        if verify and index.digest != metadata["digest"]:
            raise ValueError("its content does not match its digest")
    except FileNotFoundError:
        raise UserError(f"{path}: this index is gone; start again to build it") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a usable shard index ({error}); delete it to index again") from None
    return index
