"""Build a shard index on first use, and check it against the shards at every start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from disttempnet import distributed
from disttempnet.data.index import Shard, ShardIndex, load_index, save_index, writable
from disttempnet.data.shards import ShardList, fingerprint, resolve_shards, scan_shard
from disttempnet.errors import UserError

Result = TypeVar("Result")


def open_index(spec: str, index_path: str = "", progress: bool = True) -> ShardIndex:
    """The index of the shards that a spec names: built by rank 0 on first use, checked by every rank always.

    Args:
        spec: see `resolve_shards`.
        index_path: file of the index; empty = beside the shards, named after the spec.
        progress: show a bar on standard error while indexing.

    Raises:
        UserError: shards are missing, renamed, additional or changed since they were indexed, are no tars, or
            the index cannot be written. Every rank raises.
    """

    def build() -> None:
        shards = resolve_shards(spec)
        path = index_file(shards, index_path)
        if distributed.is_main() and not path.is_file():
            with writable(path):  # learnt before a scan that may take minutes, not after it
                pass
            save_index(build_index(shards, path, progress))

    def load() -> ShardIndex:
        shards = resolve_shards(spec)
        index = load_index(index_file(shards, index_path), shards.folder, verify=True)
        check_shards(index, shards)
        return index

    _on_all_ranks(build)  # the others wait here, no longer than the process group's timeout
    index = _on_all_ranks(load)
    if len(set(distributed.gather_objects(index.digest))) > 1:
        raise UserError(f"{index.path}: the ranks see different indexes; give every node the same shards")
    return index


def _on_all_ranks(action: Callable[[], Result]) -> Result:
    """Run it on every rank; if one fails all raise, so that none waits for it."""
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:  # of any kind: the others must hear of it
        failure = error
    messages = distributed.gather_objects(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for rank, message in enumerate(messages):
        if message is not None:
            raise UserError(f"rank {rank}: {message}")
    return result


def index_file(shards: ShardList, index_path: str) -> Path:
    """Where the index of these shards is."""
    if not index_path:
        return shards.folder / f"{shards.label}.index"
    path = Path(index_path).expanduser()
    if path.is_dir():
        raise UserError(f"{path}: the index would be a folder; name a file")
    return path


def build_index(shards: ShardList, path: Path, progress: bool) -> ShardIndex:
    """Scan all shards.

    Args:
        shards: what to scan, in the order of ids.
        path: where the index will be written.
        progress: show a bar on standard error.

    Raises:
        UserError: a shard is not a tar, or none of them holds a sample.
    """
    sizes = [(shards.folder / name).stat().st_size for name in shards.names]
    entries, starts, spans, status = [], [], [], []
    columns = (
        TextColumn("indexing {task.fields[shard]}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("", total=sum(sizes), shard="")
        for name, size in zip(shards.names, sizes, strict=True):
            bar.update(task, shard=name)
            scan = scan_shard(shards.folder / name)
            samples = len(scan.start)
            entries.append(Shard(name, size, samples, fingerprint(shards.folder / name), scan.note))
            starts.append(np.array(scan.start, dtype=np.int64))
            spans.append(np.array(scan.spans, dtype=np.uint32).reshape(samples, 3, 2))
            status.append(np.array(scan.status, dtype=np.uint8))
            bar.advance(task, size)
    arrays: dict[str, NDArray[Any]] = {
        "start": np.concatenate(starts),
        "spans": np.concatenate(spans),
        "status": np.concatenate(status),
    }
    index = ShardIndex(path, shards.folder, tuple(entries), arrays)
    if not index.usable_counts.any():
        found = index.problems().replace("\n", "; ")
        raise UserError(f"{shards.folder}: none of its {len(entries)} shards holds a usable sample: {found}")
    return index


def check_shards(index: ShardIndex, shards: ShardList) -> None:
    """Raise UserError, naming the first shard that differs from what was indexed."""
    known = {shard.name: shard for shard in index.shards}
    found = set(shards.names)
    missing = [name for name in known if name not in found]
    added = [name for name in shards.names if name not in known]
    if added:
        same = fingerprint(shards.folder / added[0])
        renamed = [name for name in missing if known[name].fingerprint == same]
        if renamed:
            _refuse(index, added[0], f"was renamed: it was indexed as {renamed[0]}", "Rename it back")
        _refuse(index, added[0], "was not there when these were indexed", "Take it out of the folder")
    if missing:
        _refuse(index, missing[0], f"is missing: indexed were {_known(index, missing[0])}", "Restore it")
    if tuple(known) != shards.names:
        _refuse(index, shards.names[0], "is in another place in the order of shards", "Restore the order")
    for name, shard in known.items():
        path = shards.folder / name
        size = path.stat().st_size
        if size != shard.size:
            change = "cut off" if size < shard.size else "changed"
            what = f"was {change}: it has {size:,} bytes, indexed were {_known(index, name)}"
            _refuse(index, name, what, "Restore it")
        if fingerprint(path) != shard.fingerprint:
            what = f"has other content than what was indexed, {_known(index, name)}"
            _refuse(index, name, what, "Restore it")


def _known(index: ShardIndex, name: str) -> str:
    number = next(i for i, shard in enumerate(index.shards) if shard.name == name)
    shard, first = index.shards[number], int(index.first[number])
    ids = f", ids {first} to {first + shard.samples - 1}" if shard.samples else ""
    return f"{shard.size:,} bytes and {shard.samples:,} samples{ids}"


def _refuse(index: ShardIndex, name: str, what: str, remedy: str) -> None:
    raise UserError(
        f"{index.folder / name}: this shard {what}. {remedy}, or delete {index.path} to index again "
        "(sample ids change: older checkpoints will not fit)"
    )
