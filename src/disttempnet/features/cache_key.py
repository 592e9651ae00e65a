"""Facts that features depend on: weights, precision, versions of the code, and the files that samples are read from.

The digest of a source covers the rows of a listing, not the images that they name. Features therefore depend on size
and time of change of every such file too, not on its folder. Each file is looked at once whenever features are opened,
by the ranks of the first node together: other nodes may hold copies with other times.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel

from disttempnet import distributed
from disttempnet.data.folder import PictureFolder
from disttempnet.data.held_out import HeldOut
from disttempnet.data.listings.open import ImageFiles, Listing
from disttempnet.data.listings.parquet import ParquetImages
from disttempnet.data.mixture import MixedSource
from disttempnet.data.shards.index import ShardIndex
from disttempnet.data.shards.store import LocalStore
from disttempnet.data.source import Source
from disttempnet.io.progress import Meter
from disttempnet.models.trunk import Trunk

FEATURES_VERSION = 1  # raise it when a transform, tokenization or a tower's arithmetic changes
_T = TypeVar("_T")

LOOKERS = 16  # threads that look at files: they mostly wait for a network disk
FILES_AT_ONCE = 1000  # files that a thread looks at before it takes the next
BLOCKS_A_ROUND = 4 * LOOKERS  # of so many files, that a rank looks at before it tells the others
IMAGES, BOTH = frozenset({"image"}), frozenset({"image", "text"})


class Files(NamedTuple):
    """Files of a part of a source.

    Attributes:
        sides: whose features depend on them.
        total: how many.
        between: (start, stop) → their paths, in order.
    """

    sides: frozenset[str]
    total: int
    between: Callable[[int, int], Iterable[str | Path]]


def facts_of(trunks: Mapping[str, Trunk], source: Source, autocast: torch.dtype | None) -> dict[str, dict[str, Any]]:
    """Return side → all that the features of a source depend on, except the transform of its images.

    Every rank calls this.

    Args:
        trunks: side → the trunk that gives the features.
        source: the samples.
        autocast: dtype of the towers' arithmetic; None = that of their weights.
    """
    states = file_states(source, trunks.keys())
    index = content_digest(source)
    return {
        side: trunk_facts(trunk, autocast) | {"index": index, "files": states[side]} for side, trunk in trunks.items()
    }


def content_digest(source: Source) -> str:
    """Return a digest of the samples of a source under their ids, however often each of its parts is read."""
    if isinstance(source, HeldOut):
        return content_digest(source.base)
    if not isinstance(source, MixedSource):
        return source.digest
    parts = [content_digest(part) for part in source.parts]
    return parts[0] if len(parts) == 1 else hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def trunk_facts(trunk: Trunk, autocast: torch.dtype | None) -> dict[str, Any]:
    """Return all that the features of any sample depend on, apart from the sample and the transform of its image."""
    return trunk.facts() | {
        "precision": str(autocast or torch.float32).removeprefix("torch."),
        "code": FEATURES_VERSION,
        "versions": {package: version(package) for package in _packages(trunk)},
    }


def of_main(known: Callable[[], _T]) -> _T:
    """Return what rank 0 finds out about its files: nodes may hold copies with other times. Every rank calls this."""
    found = distributed.together(lambda: known() if distributed.is_main() else None)
    value: _T = distributed.gather_objects(found)[0]
    return value


def _packages(trunk: Trunk) -> Iterator[str]:
    """The packages whose code computes a trunk's features."""
    yield "open_clip_torch"
    if isinstance(trunk.owner, TimmModel):
        yield "timm"
    if isinstance(trunk.owner, HFTextEncoder):
        yield "transformers"


def file_states(source: Source, sides: Collection[str]) -> dict[str, list[str]]:
    """Return side → a hash of the files' sizes and times of change, for each part whose digest does not cover them.

    Every rank calls this.

    Args:
        source: the samples.
        sides: of `image` and `text`; the captions of a listing are in its index, whose digest covers them.
    """
    parts = [files for files in _parts(source) if not files.sides.isdisjoint(sides)]
    hosts = distributed.gather_objects(platform.node())
    lookers = [rank for rank, host in enumerate(hosts) if host == hosts[0]]
    states: dict[str, list[str]] = {side: [] for side in sides}
    total = sum(files.total for files in parts)
    with Meter("looking at files", total, active=distributed.is_main(), transient=True) as meter:
        for files in parts:
            state = _state_of(files, lookers, meter)
            for side in states.keys() & files.sides:
                states[side].append(state)
    return states


def _parts(source: Source) -> Iterator[Files]:
    """Files that the digest of a source does not cover, part by part."""
    if isinstance(source, HeldOut):
        yield from _parts(source.base)
    elif isinstance(source, MixedSource):
        for part in source.parts:
            yield from _parts(part)
    elif isinstance(source, ShardIndex):
        # a shard's fingerprint covers its size and both ends; a remote one is not changed in place
        if isinstance(source.store, LocalStore):
            paths = [source.folder / shard.name for shard in source.shards]
            yield Files(BOTH, len(paths), lambda start, stop: paths[start:stop])
    elif isinstance(source, Listing):
        if isinstance(source.images, ParquetImages):
            tables = source.images.paths
            yield Files(IMAGES, len(tables), lambda start, stop: tables[start:stop])
        if isinstance(source.images, ImageFiles):
            yield _images_of(source, source.images)
    elif isinstance(source, PictureFolder):
        yield Files(IMAGES, len(source), lambda start, stop: map(source.path, range(start, stop)))


def _images_of(source: Listing, images: ImageFiles) -> Files:
    """The image files of the usable samples; the thread that looks at them reads the rows that name them."""
    usable = source.usable

    def between(start: int, stop: int) -> Iterator[str]:
        for sample in usable[start:stop].tolist():
            yield images.path(source.columns.row(sample)[0])

    return Files(IMAGES, len(usable), between)


def _state_of(files: Files, lookers: Sequence[int], meter: Meter) -> str:
    """Hex digest of sizes and times of change, whichever ranks look; they tell each other in rounds."""
    starts = range(0, files.total, FILES_AT_ONCE)
    rank = distributed.rank()
    place = lookers.index(rank) if rank in lookers else None
    digest = hashlib.blake2b(digest_size=16)
    for begin in range(0, len(starts), BLOCKS_A_ROUND * len(lookers)):
        of_round = starts[begin : begin + BLOCKS_A_ROUND * len(lookers)]
        mine = [] if place is None else of_round[place * BLOCKS_A_ROUND : (place + 1) * BLOCKS_A_ROUND]

        def look(mine: Sequence[int] = mine) -> list[bytes]:
            return list(_digests(files.between(start, min(start + FILES_AT_ONCE, files.total)) for start in mine))

        for blocks in distributed.gather_objects(distributed.together(look)):
            digest.update(b"".join(blocks))
        meter.advance(min(len(of_round) * FILES_AT_ONCE, files.total - of_round[0]))
    return digest.hexdigest()


def hash_of_files(files: Iterable[Iterable[str | Path]]) -> str:
    """Hex digest of the sizes and times of change of files, in their order, as this rank finds them."""
    return hashlib.blake2b(b"".join(_digests(files)), digest_size=16).hexdigest()


def _digests(blocks: Iterable[Iterable[str | Path]]) -> Iterator[bytes]:
    """Digest of sizes and times of change of each block of files."""
    with ThreadPoolExecutor(LOOKERS) as pool:
        yield from pool.map(_digest_of, blocks)


def _digest_of(paths: Iterable[str | Path]) -> bytes:
    """Digest of a line for each file: size and time of change, or that it is not there."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        try:
            state = os.stat(path)
            digest.update(f"{state.st_size} {state.st_mtime_ns}\n".encode())
        except (OSError, ValueError):  # ValueError: a null character in a name
            digest.update(b"none\n")
    return digest.digest()
