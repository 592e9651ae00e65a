"""Build the index of shards: a parallel scan with a journal; an existing index is updated."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from disttempnet.data.shards.index import INDEX_COLUMNS, Shard, ShardIndex, load_index, write_index
from disttempnet.data.shards.journal import Journal
from disttempnet.data.shards.names import ShardList
from disttempnet.data.shards.scan import scan_shard
from disttempnet.data.shards.store import ShardState, ShardStore, file_fingerprint
from disttempnet.errors import UserError
from disttempnet.io.columns import explain_unwritable_index, temporary_index
from disttempnet.io.jobs import LostWorker, run_jobs
from disttempnet.io.machine import cores
from disttempnet.io.progress import Meter

BYTES_PER_PROCESS = 1 << 30  # of shards to scan; one more process for each


@dataclass(frozen=True)
class ScanSettings:
    """Settings of a scan.

    Attributes:
        caption_key: see `ShardIndex`.
        workers: processes; 0 = by the bytes to scan and the cores.
        checksum: hash all bytes of every shard.
        progress: show a bar on standard error.
        most: limit of bytes to scan, above which `TooMuchToScan` is raised; 0 = no limit.
    """

    caption_key: str = ""
    workers: int = 0
    checksum: bool = False
    progress: bool = True
    most: int = 0


class TooMuchToScan(Exception):
    """More bytes to scan than the limit."""

    def __init__(self, size: int) -> None:
        super().__init__(f"{size:,} bytes")
        self.size = size


def build_shard_index(shards: ShardList, path: Path, how: ScanSettings, known: ShardIndex | None = None) -> ShardIndex:
    """Scan the shards that no index of the folder knows, and write the index.

    Ids follow the order of `known`; new shards come after its last one, in the order of `shards`. So ids stay the same
    unless a shard of `known` is gone or has another number of samples.

    Args:
        shards: the shards to index.
        path: file of the index.
        how: settings of the scan.
        known: an earlier index of these shards with the same caption key.

    Raises:
        TooMuchToScan: see `ScanSettings`.
        UserError: a shard is not a tar, no shard has a usable sample, a checksum has changed, a worker was killed, or
            the index cannot be written. Scanned shards are kept for the next call, except after a changed checksum.
    """
    store, states = shards.store, shards.store.states(shards.names)
    with temporary_index(path):  # fail before a scan that may take an hour, not after it
        pass
    with explain_unwritable_index(path):
        journal = Journal(path, how.caption_key)
    try:
        if known is None and path.is_file():  # built by another process while this one waited for the journal
            return load_index(path, shards.folder, store=store)
        # shards that this or another index of the folder knows as they are now
        old = [shard.name for shard in known.shards] if known else []
        same = _unchanged(known, states) if known else {}
        same |= _indexed_elsewhere(shards, path, how.caption_key, {n: states[n] for n in states.keys() - same.keys()})
        # known entries: unchanged shards and the journal; with `checksum` all shards are hashed again and compared
        entries = {} if how.checksum else {name: place.shard for name, place in same.items()}
        for name, shard in journal.shards.items():
            if states.get(name) == (shard.size, shard.fingerprint) and (shard.checksum or not how.checksum):
                entries[name] = shard

        # scan the others
        todo = {name: states[name] for name in shards.names if name not in entries}
        if how.most and (size := sum(state.size for state in todo.values())) > how.most:
            raise TooMuchToScan(size)
        _scan_all(store, todo, path, how, journal)
        entries |= {name: journal.shards[name] for name in todo}
        _compare_checksums(store, same, entries, journal)

        # old shards keep their order, new ones follow
        order = [name for name in old if name in entries] + [name for name in shards.names if name not in old]
        if known and not todo and [entries[name] for name in order] == list(known.shards):
            index = known
        else:
            index = _write(path, store, [entries[name] for name in order], journal, same)
        journal.remove()
        return index
    finally:
        journal.close()


class IndexedShard(NamedTuple):
    """Shard in an index, with the ids [first, end)."""

    shard: Shard
    home: ShardIndex
    first: int
    end: int


def _unchanged(index: ShardIndex, states: Mapping[str, ShardState]) -> dict[str, IndexedShard]:
    """Return the shards of this index that have not changed, by name."""
    places = (IndexedShard(shard, index, *ids) for shard, ids in zip(index.shards, pairwise(index.first), strict=True))
    return {
        place.shard.name: place
        for place in places
        if states.get(place.shard.name) == (place.shard.size, place.shard.fingerprint)
    }


def _indexed_elsewhere(
    shards: ShardList, path: Path, caption_key: str, states: Mapping[str, ShardState]
) -> dict[str, IndexedShard]:
    """Return the shards that an index of another pattern of the folder has, unchanged, by name."""
    found: dict[str, IndexedShard] = {}
    for other in sorted(shards.folder.glob("*.index")):
        with suppress(UserError):  # of a listing, or damaged: ignored
            index = load_index(other, shards.folder, store=shards.store)
            if other != path and index.caption_key == caption_key and (more := _unchanged(index, states)):
                load_index(other, shards.folder, verify=True)  # before its columns are copied
                found |= more
    return found


def _scan_all(
    store: ShardStore, todo: Mapping[str, ShardState], path: Path, how: ScanSettings, journal: Journal
) -> None:
    """Scan these shards into the journal; unreadable ones raise UserError after all others are scanned."""
    broken: list[str] = []
    tasks = [ScanTask(name, state) for name, state in todo.items()]
    size = sum(state.size for state in todo.values())
    scans = run_jobs(partial(_scan, store, how), tasks, how.workers or min(cores(), 1 + size // BYTES_PER_PROCESS))
    meter = Meter(f"indexing {len(todo):,} shards", size, sizes=True, active=how.progress and bool(todo))
    with closing(scans), meter:
        try:
            for task, result in scans:
                if isinstance(result, UserError):
                    broken.append(str(result))
                else:
                    with explain_unwritable_index(path):
                        journal.append(*result)
                meter.advance(task.state.size)
        except LostWorker as error:
            raise UserError(f"{path}: {error}; scanned shards are kept; run the same command again to resume") from None
    if broken:
        more = f" (and {len(broken) - 1} more shards cannot be read)" if len(broken) > 1 else ""
        raise UserError(sorted(broken)[0] + more)


class ScanTask(NamedTuple):
    """Shard to scan."""

    name: str
    state: ShardState

    def __str__(self) -> str:
        return self.name


Scanned = tuple[Shard, dict[str, bytes]]


def _scan(store: ShardStore, how: ScanSettings, task: ScanTask) -> Iterator[Scanned | UserError]:
    """Worker job: yield entry and columns of a shard, or the error."""
    yield _scan_one(store, *task, how)


def _scan_one(store: ShardStore, name: str, state: ShardState, how: ScanSettings) -> Scanned | UserError:
    try:
        with store.local(name, state) as path:
            scan = scan_shard(path, how.caption_key)
            samples = len(scan.start)
            checksum = _checksum(path) if how.checksum else ""
            facts = (scan.note, checksum, scan.tally, scan.about_ungrouped)
            shard = Shard(name, path.stat().st_size, samples, file_fingerprint(path), *facts)
        values: dict[str, list] = {"start": scan.start, "spans": scan.spans, "status": scan.status}
        return shard, {name: np.array(values[name], column.dtype).tobytes() for name, column in INDEX_COLUMNS.items()}
    except UserError as error:
        return error


def _checksum(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; restore the shard") from None


def _compare_checksums(
    store: ShardStore, before: Mapping[str, IndexedShard], now: Mapping[str, Shard], journal: Journal
) -> None:
    """Raise UserError if a shard with the same size and fingerprint has another checksum."""
    changed = [name for name, place in before.items() if place.shard.checksum not in ("", now[name].checksum)]
    if changed:
        journal.remove()  # a restored shard has the same fingerprint, so it must be read again
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(f"{store.where(changed[0])}: its checksum is not the one in the index{more}: restore the shard")


def _write(
    path: Path, store: ShardStore, entries: Sequence[Shard], journal: Journal, places: Mapping[str, IndexedShard]
) -> ShardIndex:
    """Write the index of these shards, with columns from the journal, or from the index that knows them."""
    scanned = journal.columns()

    def pieces(column: str) -> Iterator[bytes | memoryview]:
        for shard in entries:
            if journal.shards.get(shard.name) is shard:
                yield scanned[shard.name][column]
            else:
                place = places[shard.name]
                yield getattr(place.home, column)[place.first : place.end].tobytes()

    with temporary_index(path) as temporary:
        write_index(temporary, entries, journal.caption_key, {column: pieces(column) for column in INDEX_COLUMNS})
        index = load_index(temporary, store.folder, store=store)
        if not index.usable_counts.any():
            found = index.problems().replace("\n", "; ")
            raise UserError(f"{store.about}: none of its {len(entries)} shards has a usable sample: {found}")
        os.replace(temporary, path)
    return load_index(path, store.folder, store=store)
