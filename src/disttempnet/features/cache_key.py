"""Facts that features depend on: weights, precision, versions of the code, and the files that samples are read from.

The digest of a source covers the rows of a listing, not the images that they name. Features therefore depend on size
and time of change of every such file too. Each file is looked at once whenever features are opened.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel

from disttempnet import distributed
from disttempnet.data.held_out import HeldOut
from disttempnet.data.listings.open import ImageFiles, Listing
from disttempnet.data.listings.parquet import ParquetImages
from disttempnet.data.mixture import MixedSource
from disttempnet.data.shards.index import ShardIndex
from disttempnet.data.shards.store import LocalStore
from disttempnet.data.source import Source
from disttempnet.models.trunk import Trunk

FEATURES_VERSION = 1  # raise it when a transform, tokenization or a tower's arithmetic changes
_T = TypeVar("_T")

LOOKERS = 16  # threads that look at files: they mostly wait for a network disk
FILES_AT_ONCE = 1000  # files that a thread looks at before it takes the next


def facts_of(trunk: Trunk, source: Source, autocast: torch.dtype | None) -> dict[str, Any]:
    """Return all that the features of a source depend on, except the transform of its images. Every rank calls this.

    Args:
        trunk: gives the features.
        source: the samples.
        autocast: dtype of the tower's arithmetic; None = that of its weights.
    """
    files = of_main(lambda: file_states(source, trunk.side))
    return trunk_facts(trunk, autocast) | {"index": source.digest, "files": files}


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


def file_states(source: Source, side: str) -> list[list[str]]:
    """Return (folder, hash of the files' sizes and times) of each part of a source whose digest does not cover them.

    Args:
        source: the samples.
        side: `image` or `text`; the captions of a listing are in its index, whose digest covers them.
    """
    if isinstance(source, HeldOut):
        return file_states(source.base, side)
    if isinstance(source, MixedSource):
        return [state for part in source.parts for state in file_states(part, side)]
    if isinstance(source, ShardIndex):
        # a shard's fingerprint covers its size and both ends; a remote one is not changed in place
        if not isinstance(source.store, LocalStore):
            return []
        return [["", hash_of_files([[source.folder / shard.name for shard in source.shards]])]]
    if isinstance(source, Listing) and side == "image":
        if isinstance(source.images, ParquetImages):
            return [["", hash_of_files([source.images.paths])]]
        if isinstance(source.images, ImageFiles):
            return [[str(source.images.root.resolve()), hash_of_files(_image_paths(source, source.images))]]
    return []


def _image_paths(source: Listing, images: ImageFiles) -> Iterator[Iterable[str]]:
    """The image files of the usable samples, some at once; a thread reads the rows that name them."""
    usable = source.usable
    for start in range(0, len(usable), FILES_AT_ONCE):
        ids = usable[start : start + FILES_AT_ONCE].tolist()
        yield (images.path(source.columns.row(sample)[0]) for sample in ids)


def hash_of_files(files: Iterable[Iterable[str | Path]]) -> str:
    """Hex digest of the sizes and times of change of files, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    with ThreadPoolExecutor(LOOKERS) as pool:
        for stamps in pool.map(_stamps, files):
            digest.update(stamps)
    return digest.hexdigest()


def _stamps(paths: Iterable[str | Path]) -> bytes:
    """A line for each file: size and time of change, or that it is not there."""
    lines = []
    for path in paths:
        try:
            state = os.stat(path)
            lines.append(f"{state.st_size} {state.st_mtime_ns}\n")
        except (OSError, ValueError):  # ValueError: a null character in a name
            lines.append("none\n")
    return "".join(lines).encode()
