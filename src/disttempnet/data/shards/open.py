"""Build a shard index on first use, and check it against the shards at every start."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from rich.filesize import decimal

from disttempnet import distributed
from disttempnet.config import SourceConfig
from disttempnet.data.shards.build import ScanSettings, TooMuchToScan, build_shard_index
from disttempnet.data.shards.index import ShardIndex, load_index
from disttempnet.data.shards.names import ShardList, resolve_shards
from disttempnet.data.shards.store import CACHE_GB
from disttempnet.errors import UserError
from disttempnet.io.columns import temporary_index

WHILE_RANKS_WAIT = 100 * 10**9  # bytes of shards that rank 0 scans while the other ranks wait


def open_index(
    spec: str,
    index_path: str = "",
    progress: bool = True,
    caption_key: str = "",
    cache: str = "",
    cache_gb: float = CACHE_GB,
) -> ShardIndex:
    """Open the index of the shards that a spec names: rank 0 builds it on first use, every rank checks it.

    Nodes without the index receive rank 0's.

    Args:
        spec: see `resolve_shards`.
        index_path: file of the index; empty = beside the shards, named after the spec and the caption key.
        progress: show a bar on standard error while the index is built.
        caption_key: key of the samples' .json that holds their captions; empty = .txt.
        cache, cache_gb: of remote shards, see `resolve_shards`.

    Raises:
        UserError: shards are missing, renamed, new, changed or not tars, the index cannot be written, or several ranks
            would wait for the first scan of many shards. Every rank raises.
    """
    source = SourceConfig(path=spec, index=index_path, caption_key=caption_key, cache=cache, cache_gb=cache_gb)

    def build() -> Path:
        shards = source_shards(source)
        path = shard_index_file(shards, source)
        if distributed.is_main() and not path.is_file():
            most = WHILE_RANKS_WAIT if distributed.world_size() > 1 else 0
            try:
                build_shard_index(shards, path, ScanSettings(caption_key, progress=progress, most=most))
            except TooMuchToScan as error:
                raise UserError(
                    f"{spec}: {decimal(error.size)} of shards are not indexed yet, which can take longer than the "
                    f"other ranks wait; index them first: {index_command(source)}"
                ) from None
        return path

    def load() -> ShardIndex:
        shards = source_shards(source)
        index = load_known(shards, source)
        check_shards(index, shards, source)
        return index

    path = distributed.together(build)  # the other ranks wait here, up to the timeout of the process group
    distributed.together(lambda: share_index(path))  # every rank takes part in all collectives, whatever fails
    index = distributed.together(load)
    if len(set(distributed.gather_objects(index.digest))) > 1:
        raise UserError(
            f"{index.path}: the ranks see different indexes; give every node the same shards, and delete the index on "
            "nodes where it differs: they receive rank 0's"
        )
    return index


def share_index(path: Path) -> None:
    """Send rank 0's index to ranks without one, whose nodes have shards or cache on local disks.

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
                os.replace(temporary, path)  # several ranks of a node write the same bytes
    finally:
        for _ in pieces:  # after an error too: the collective needs this rank to receive all pieces
            pass


def update_index(
    source: SourceConfig, workers: int = 0, checksum: bool = False, progress: bool = True
) -> tuple[ShardIndex, str]:
    """Build or update the index of shards, for `disttempnet data index`.

    Args:
        source: the shards.
        workers, checksum, progress: see `ScanSettings`.

    Returns:
        The index, and a line about what has changed.

    Raises:
        UserError: as `build_shard_index`.
    """
    shards = source_shards(source)
    path = shard_index_file(shards, source)
    known = load_known(shards, source) if path.is_file() else None
    index = build_shard_index(shards, path, ScanSettings(source.caption_key, workers, checksum, progress), known)
    news = _news(known, index) if known else "indexed for the first time"
    if known and checksum:
        compared = sum(1 for shard in known.shards if shard.checksum)
        news += f"; checksums compared and equal: {compared:,}"
    return index, news


def _news(known: ShardIndex, index: ShardIndex) -> str:
    """Describe the changes of an update in a line."""
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
    return f"{what}: ids 0 to {len(known) - 1:,} stay, new ids follow"


def source_shards(source: SourceConfig) -> ShardList:
    """Return the shards of a source. Raises UserError."""
    return resolve_shards(source.path, source.cache, source.cache_gb)


def load_known(shards: ShardList, source: SourceConfig) -> ShardIndex:
    """Load and verify the index of these shards, without a look at the shards. Raises UserError."""
    path = shard_index_file(shards, source)
    index = load_index(path, shards.folder, verify=True, store=shards.store)
    if index.caption_key != source.caption_key:
        raise UserError(
            f"{path}: indexed with caption key '{index.caption_key}', not '{source.caption_key}'; name another index "
            "file"
        )
    return index


def shard_index_file(shards: ShardList, source: SourceConfig) -> Path:
    """Return the file of the index of these shards. Raises UserError."""
    if not source.index:
        key = "." + re.sub(r"[^\w-]", "_", source.caption_key) if source.caption_key else ""
        return shards.folder / f"{shards.label}{key}.index"
    path = Path(source.index).expanduser()
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file for the index")
    return path


def index_command(source: SourceConfig) -> str:
    """Return the command that builds or updates an index, as typed."""
    words = ["disttempnet", "data", "index", source.path]
    for key in ("caption_key", "index", "cache", "cache_gb"):
        if (value := getattr(source, key)) != SourceConfig.model_fields[key].default:
            words += [f"--{key.replace('_', '-')}", str(value)]
    return shlex.join(words)


def check_shards(index: ShardIndex, shards: ShardList, source: SourceConfig) -> None:
    """Raise UserError at the first shard that is missing, new, renamed or changed since it was indexed."""
    known = {shard.name: shard for shard in index.shards}
    found = set(shards.names)
    missing = [name for name in known if name not in found]
    added = [name for name in shards.names if name not in known]
    if added:
        same = index.store.state(added[0]).fingerprint
        renamed = [name for name in missing if known[name].fingerprint == same]
        if renamed:
            _refuse(index, source, added[0], f"was renamed: it was indexed as {renamed[0]}", "Rename it back")
        _refuse(index, source, added[0], "was not there when these were indexed", "Remove it from the folder")
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
