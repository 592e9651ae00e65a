"""Build a shard index on first use, and check it against the shards at every start."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from rich.filesize import decimal

from disttempnet import distributed
from disttempnet.config import SourceConfig
from disttempnet.data.shards.build import Scan, TooMuchToScan, build_shard_index
from disttempnet.data.shards.index import ShardIndex, load_index
from disttempnet.data.shards.names import ShardList, resolve_shards
from disttempnet.data.shards.store import CACHE_GB
from disttempnet.errors import UserError
from disttempnet.io.columns import temporary_index

WHILE_RANKS_WAIT = 100 * 10**9  # bytes of shards that rank 0 scans while the others wait, minutes by default


def open_index(
    spec: str,
    index_path: str = "",
    progress: bool = True,
    caption_key: str = "",
    cache: str = "",
    cache_gb: float = CACHE_GB,
) -> ShardIndex:
    """The index of the shards that a spec names: built by rank 0 on first use, checked by every rank always.

    Nodes that lack it get rank 0's.

    Args:
        spec: see `resolve_shards`.
        index_path: file of the index; empty = beside the shards, named after the spec and the caption key.
        progress: show a bar on standard error while indexing.
        caption_key: key of the samples' .json that holds their captions; empty = .txt.
        cache, cache_gb: of remote shards, see `resolve_shards`.

    Raises:
        UserError: shards are missing, renamed, additional or changed since they were indexed, are no tars, or
            the index cannot be written; or several ranks would wait for a first scan of many shards. Every rank raises.
    """
    source = SourceConfig(path=spec, index=index_path, caption_key=caption_key, cache=cache, cache_gb=cache_gb)

    def build() -> Path:
        shards = source_shards(source)
        path = shard_index_file(shards, source)
        if distributed.is_main() and not path.is_file():
            most = WHILE_RANKS_WAIT if distributed.world_size() > 1 else 0
            try:
                build_shard_index(shards, path, Scan(caption_key, progress=progress, most=most))
            except TooMuchToScan as error:
                raise UserError(
                    f"{spec}: {decimal(error.size)} of shards are not indexed yet, which can take longer than the "
                    f"other ranks wait for it: index them first: {index_command(source)}"
                ) from None
        return path

    def load() -> ShardIndex:
        shards = source_shards(source)
        index = load_known(shards, source)
        check_shards(index, shards, source)
        return index

    path = distributed.together(build)  # the others wait here, no longer than the process group's timeout
    distributed.together(lambda: share_index(path))  # every rank goes through all of its collectives, whatever fails
    index = distributed.together(load)
    if len(set(distributed.gather_objects(index.digest))) > 1:
        raise UserError(
            f"{index.path}: the ranks see different indexes; give every node the same shards, and delete the index of "
            "nodes where it is another: they get that of rank 0"
        )
    return index


def share_index(path: Path) -> None:
    """Give rank 0's index to the ranks that have none: their nodes keep shards, or the cache, on disks of their own.

    Every rank calls this. Raises UserError on a rank that cannot write it.
    """
    lacking = not path.is_file()
    if not any(distributed.gather_objects(lacking)):
        return
    pieces = distributed.file_of_main(path)
    try:
        if lacking:
            with temporary_index(path) as temporary:
                with temporary.open("wb") as file:
                    for piece in pieces:
                        file.write(piece)
                os.replace(temporary, path)  # of several ranks of a node: with the same bytes
    finally:
        for _ in pieces:  # whatever happened here, the others need this rank to take all of them
            pass


def update_index(
    source: SourceConfig, workers: int = 0, checksum: bool = False, progress: bool = True
) -> tuple[ShardIndex, str]:
    """Make the index of shards, or bring it up to date: what `disttempnet data index` does.

    Args:
        source: the shards.
        workers, checksum, progress: see `Scan`.

    Returns:
        the index, and what is new in a line.

    Raises:
        UserError: as `build_shard_index`.
    """
    shards = source_shards(source)
    path = shard_index_file(shards, source)
    known = load_known(shards, source) if path.is_file() else None
    index = build_shard_index(shards, path, Scan(source.caption_key, workers, checksum, progress), known)
    news = _news(known, index) if known else "indexed for the first time"
    if known and checksum:
        compared = sum(1 for shard in known.shards if shard.checksum)
        news += f"; checksums that were known and are the same: {compared:,}"
    return index, news


def _news(known: ShardIndex, index: ShardIndex) -> str:
    """What an update has changed."""
    if known.digest == index.digest:
        return "the same samples as before"
    before, now = ({shard.name: shard.identity for shard in one.shards} for one in (known, index))
    counts = {
        "new": len(now.keys() - before.keys()),
        "gone": len(before.keys() - now.keys()),
        "changed": sum(1 for name in before.keys() & now.keys() if before[name] != now[name]),
    }
    what = ", ".join(f"{count:,} shards {word}" for word, count in counts.items() if count)
    if counts["gone"] or counts["changed"]:
        return f"{what}: ids change"
    return f"{what}: ids 0 to {len(known) - 1:,} stay, the new ones come after them"


def source_shards(source: SourceConfig) -> ShardList:
    """The shards that a source names. Raises UserError."""
    return resolve_shards(source.path, source.cache, source.cache_gb)


def load_known(shards: ShardList, source: SourceConfig) -> ShardIndex:
    """The index of these shards as it was made, whole and of this caption key. Raises UserError."""
    path = shard_index_file(shards, source)
    index = load_index(path, shards.folder, verify=True, store=shards.store)
    if index.caption_key != source.caption_key:
        raise UserError(
            f"{path}: indexed with caption key '{index.caption_key}', not '{source.caption_key}'; name another index "
            "file"
        )
    return index


def shard_index_file(shards: ShardList, source: SourceConfig) -> Path:
    """Where the index of these shards is. Raises UserError."""
    if not source.index:
        key = "." + re.sub(r"[^\w-]", "_", source.caption_key) if source.caption_key else ""
        return shards.folder / f"{shards.label}{key}.index"
    path = Path(source.index).expanduser()
    if path.is_dir():
        raise UserError(f"{path}: the index would be a folder; name a file")
    return path


def index_command(source: SourceConfig) -> str:
    """The command that makes an index or brings it up to date, as it can be typed."""
    words = ["disttempnet", "data", "index", source.path]
    for key in ("caption_key", "index", "cache", "cache_gb"):
        if (value := getattr(source, key)) != SourceConfig.model_fields[key].default:
            words += [f"--{key.replace('_', '-')}", str(value)]
    return shlex.join(words)


def check_shards(index: ShardIndex, shards: ShardList, source: SourceConfig) -> None:
    """Raise UserError, naming the first shard that differs from what was indexed. Their order is the index's own."""
    known = {shard.name: shard for shard in index.shards}
    found = set(shards.names)
    missing = [name for name in known if name not in found]
    added = [name for name in shards.names if name not in known]
    if added:
        same = index.store.state(added[0]).fingerprint
        renamed = [name for name in missing if known[name].fingerprint == same]
        if renamed:
            _refuse(index, source, added[0], f"was renamed: it was indexed as {renamed[0]}", "Rename it back")
        _refuse(index, source, added[0], "was not there when these were indexed", "Take it out of the folder")
    if missing:
        _refuse(index, source, missing[0], f"is missing: indexed were {_known(index, missing[0])}", "Restore it")
    states = index.store.states(tuple(known))
    for name, shard in known.items():
        size, now = states[name]
        if size != shard.size:
            change = "cut off" if size < shard.size else "changed"
            what = f"was {change}: it has {size:,} bytes, indexed were {_known(index, name)}"
            _refuse(index, source, name, what, "Restore it")
        if now != shard.fingerprint:
            what = f"has other content than what was indexed, {_known(index, name)}"
            _refuse(index, source, name, what, "Restore it")


def _known(index: ShardIndex, name: str) -> str:
    number = next(i for i, shard in enumerate(index.shards) if shard.name == name)
    shard, first = index.shards[number], int(index.first[number])
    ids = f", ids {first} to {first + shard.samples - 1}" if shard.samples else ""
    return f"{shard.size:,} bytes and {shard.samples:,} samples{ids}"


def _refuse(index: ShardIndex, source: SourceConfig, name: str, what: str, remedy: str) -> None:
    raise UserError(
        f"{index.store.where(name)}: this shard {what}. {remedy}, or index again: {index_command(source)} "
        "(older checkpoints will not fit)"
    )
