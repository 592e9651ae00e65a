"""Make the index of shards: scanned in parallel, kept while it is made, brought up to date where there is one."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import connection
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from disttempnet.data.index import COLUMNS, Shard, ShardIndex, explained, load_index, writable, write_index
from disttempnet.data.journal import Journal
from disttempnet.data.scan import scan_shard
from disttempnet.data.shards import ShardList, fingerprint
from disttempnet.data.store import ShardStore, State
from disttempnet.errors import UserError

A_PROCESS = 1 << 30  # bytes of shards that are worth a process more


@dataclass(frozen=True)
class Scan:
    """How to scan: caption key, processes (0 = as many as the work and the cores ask for), checksums, a bar."""

    caption_key: str = ""
    workers: int = 0
    checksum: bool = False
    progress: bool = True


def build_index(shards: ShardList, path: Path, how: Scan, known: ShardIndex | None = None) -> ShardIndex:
    """Scan what is not known yet, and write the index.

    Ids follow the order of `known`, shards that it lacks come after its last in the order of `shards`. So ids stay
    unless a shard of `known` is gone, or holds another number of samples.

    Args:
        shards: what the index is of.
        path: where it is written.
        how: to scan.
        known: an earlier index of the same folder and caption key.

    Raises:
        UserError: a shard is no tar, none holds a usable sample, a checksum has changed, a process was killed, or
            the index cannot be written. Except for changed checksums what is scanned is kept for the next call.
    """
    store, states = shards.store, shards.store.states(shards.names)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with writable(path):  # learnt before a scan that may take an hour, not after it
            pass
        journal = Journal(path, how.caption_key)
    try:
        if known is None and path.is_file():  # made by another process, while this one waited for the journal
            return load_index(path, shards.folder, store=store)
        old = {shard.name: shard for shard in known.shards} if known else {}
        same = {name: shard for name, shard in old.items() if states.get(name) == (shard.size, shard.fingerprint)}
        entries = {} if how.checksum else dict(same)  # what was hashed before is hashed again and compared
        for name, shard in journal.shards.items():
            if states.get(name) == (shard.size, shard.fingerprint) and (shard.checksum or not how.checksum):
                entries[name] = shard
        todo = {name: states[name] for name in shards.names if name not in entries}
        _scan_all(store, todo, path, how, journal)
        entries |= {name: journal.shards[name] for name in todo}
        _compare_checksums(store, same, entries, journal)
        order = [name for name in old if name in entries] + [name for name in shards.names if name not in old]
        if known and not todo and order == list(old):
            return known
        index = _write(path, store, [entries[name] for name in order], journal, known)
        journal.remove()
        return index
    finally:
        journal.close()


def _scan_all(store: ShardStore, todo: Mapping[str, State], path: Path, how: Scan, journal: Journal) -> None:
    """Scan these shards into the journal; those that are no tars are named after all others."""
    broken: list[str] = []
    columns = (
        TextColumn("indexing {task.fields[shards]} shards"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not how.progress or not todo) as bar:
        task = bar.add_task("", total=sum(state.size for state in todo.values()), shards=f"0/{len(todo):,}")
        for done, (name, result) in enumerate(_scans(store, todo, path, how), 1):
            if isinstance(result, UserError):
                broken.append(str(result))
            else:
                with explained(path):
                    journal.append(*result)
            bar.update(task, advance=todo[name].size, shards=f"{done:,}/{len(todo):,}")
    if broken:
        more = f" (and {len(broken) - 1} more shards cannot be read)" if len(broken) > 1 else ""
        raise UserError(sorted(broken)[0] + more)


Scanned = tuple[Shard, dict[str, bytes]]


def _scans(
    store: ShardStore, todo: Mapping[str, State], path: Path, how: Scan
) -> Iterator[tuple[str, Scanned | UserError]]:
    """(name, entry and columns) of shards as they are done, or what is wrong with one."""
    cores = len(os.sched_getaffinity(0))
    size = sum(state.size for state in todo.values())
    workers = min(how.workers or min(cores, 1 + size // A_PROCESS), len(todo))
    if workers <= 1:
        for name, state in todo.items():
            yield name, _scan_one(store, name, state, how)
        return
    context = multiprocessing.get_context("forkserver")  # a fork of a process with threads may hang
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, context, _start_worker)
    try:
        waiting = {pool.submit(_scan_one, store, name, state, how): name for name, state in todo.items()}
        for future in as_completed(list(waiting)):
            yield waiting.pop(future), future.result()
    except BrokenProcessPool:
        raise UserError(
            f"{path}: a process that scanned shards was killed (short of memory?); what is scanned is kept, "
            "the same command goes on from there"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Ctrl-C is for the parent to answer; a worker ends with its parent, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def follow() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _scan_one(store: ShardStore, name: str, state: State, how: Scan) -> Scanned | UserError:
    try:
        with store.local(name, state) as path:
            scan = scan_shard(path, how.caption_key)
            samples = len(scan.start)
            checksum = _checksum(path) if how.checksum else ""
            shard = Shard(name, path.stat().st_size, samples, fingerprint(path), scan.note, checksum, scan.tally)
        values: dict[str, list] = {"start": scan.start, "spans": scan.spans, "status": scan.status}
        return shard, {key: np.array(values[key], kind).tobytes() for key, kind in COLUMNS.items()}
    except UserError as error:
        return error


def _checksum(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; restore the shard") from None


def _compare_checksums(
    store: ShardStore, before: Mapping[str, Shard], now: Mapping[str, Shard], journal: Journal
) -> None:
    """Raise UserError if a shard of the same size and fingerprint has another checksum than it had."""
    changed = [name for name, shard in before.items() if shard.checksum not in ("", now[name].checksum)]
    if changed:
        journal.remove()  # a restored shard looks the same, so it must be read again
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(f"{store.where(changed[0])}: its checksum is not the one in the index{more}: restore the shard")


def _write(
    path: Path, store: ShardStore, entries: Sequence[Shard], journal: Journal, known: ShardIndex | None
) -> ShardIndex:
    """The index of these shards, with columns from the journal, or else from the known index."""
    scanned = journal.columns()
    names = [shard.name for shard in known.shards] if known else []
    places = dict(zip(names, pairwise(known.first), strict=True)) if known else {}

    def pieces(column: str) -> Iterator[bytes | memoryview]:
        for shard in entries:
            if journal.shards.get(shard.name) is shard:
                yield scanned[shard.name][column]
            else:
                first, end = places[shard.name]
                yield getattr(known, column)[first:end].tobytes()

    with writable(path) as temporary:
        write_index(temporary, entries, journal.caption_key, {column: pieces(column) for column in COLUMNS})
        index = load_index(temporary, store.folder, store=store)
        if not index.usable_counts.any():
            found = index.problems().replace("\n", "; ")
            raise UserError(f"{store.about}: none of its {len(entries)} shards holds a usable sample: {found}")
        os.replace(temporary, path)
    return load_index(path, store.folder, store=store)
