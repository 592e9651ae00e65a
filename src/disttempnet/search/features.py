"""Unit features of the images of a source: embedded once, kept in the feature cache, and read a shard at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from disttempnet.config import SourceConfig
from disttempnet.data import open_source
from disttempnet.data.augment import train_transform
from disttempnet.data.builtin.cache import cache_folder
from disttempnet.data.folder import is_picture_folder, open_picture_folder
from disttempnet.data.source import Source
from disttempnet.errors import UserError
from disttempnet.features.batches import FOLDER
from disttempnet.features.build import Build, Pass, build, usable_mask
from disttempnet.features.cache_key import facts_of
from disttempnet.features.store import FeatureStore, store_in
from disttempnet.models import Towers
from disttempnet.models.trunk import trunk_of
from disttempnet.sanitize import one_line

OTHER_FOLDER = "name another folder with --cache-features"
UNREADABLE_NAMED = 5
PATTERN = re.compile(r"[{}*?\[\]:]")  # in a name that is no path: a pattern, a URL, embedded:emoji/train


@dataclass(frozen=True)
class Embedding:
    """Settings of an embedding of images.

    Attributes:
        device: that the towers are on.
        batch: images of a forward pass.
        workers: decoding processes of each rank; 0 = this process.
        folder: of the feature cache; None = the user's.
    """

    device: torch.device
    batch: int = 256
    workers: int = 2
    folder: Path | None = None


@dataclass(frozen=True)
class ImageFeatures:
    """Features of the images of a source.

    Attributes:
        source: the images.
        store: their features.
        computed: how many were not in the cache.
    """

    source: Source
    store: FeatureStore
    computed: int

    def __len__(self) -> int:
        return int(self.source.usable_counts.sum()) - len(self.unreadable)

    @property
    def unreadable(self) -> Mapping[int, str]:
        """Sample id → why it has no features."""
        return self.store.unreadable

    def by_shard(self) -> Iterator[tuple[NDArray, Tensor]]:
        """Yield ids, int64 [n], and unit features, float32 [n, D], of the readable images, in the order of ids."""
        for ids, features in self.store.by_shard(usable_mask(self.source)):
            yield ids, normalize(features, dim=1)

    def describe(self) -> str:
        """Say in one line what was read and computed."""
        counts = f"{len(self):,} images, {self.computed:,} embedded now"
        return f"features of {counts}: {self.store.folder}"

    def describe_unreadable(self) -> str:
        """Say in one line which images are left out; empty where all can be read."""
        if not self.unreadable:
            return ""
        some = list(self.unreadable.items())[:UNREADABLE_NAMED]
        named = ", ".join(f"{self.source.name(sample)} ({one_line(why)})" for sample, why in some)
        more = ", …" if len(self.unreadable) > len(some) else ""
        return f"left out, unreadable: {len(self.unreadable):,} images: {named}{more}"


def open_images(sources: Sequence[SourceConfig]) -> Source:
    """Open what a user names as images: a folder of them, or any source of training data. Every rank calls this.

    Captions of a folder are not read, and its images need none. A folder with shards or Parquet files in it, a listing
    and every other source are as in `data.train`.

    Raises:
        UserError: no images, or data that has changed since it was indexed.
    """
    for source in sources:
        if not os.path.exists(source.path) and not PATTERN.search(source.path):
            raise UserError(f"{source.path}: no such folder of images, shard or listing")
    if len(sources) == 1 and is_picture_folder(sources[0].path):
        for key in ("caption_key", "images", "image_key", "index"):
            if getattr(sources[0], key):
                flag = key.replace("_", "-")
                raise UserError(f"{sources[0].path}: is a folder of images, --{flag} is for listings: leave it out")
        return open_picture_folder(sources[0].path)
    return open_source(sources)


def embed_images(towers: Towers, source: Source, how: Embedding) -> ImageFeatures:
    """Return the features of all images of a source, computed where they are not there yet. Every rank calls this.

    Args:
        towers: on the device of `how`; nothing of them is trained from here on.
        source: the images.
        how: sizes, and where features are kept.

    Raises:
        UserError: no room on the disk, a damaged file, or no image that can be read.
    """
    # what the features depend on names their store
    towers.module.requires_grad_(False)  # the trunk is all of a tower
    trunk = trunk_of(towers, "image")
    facts = facts_of({"image": trunk}, source, None)["image"] | {"transform": {"name": "evaluation"}}
    parent = how.folder or cache_folder() / FOLDER
    store = store_in(parent, facts, len(source), towers.embed_dim, "float32", OTHER_FOLDER)

    # run the tower over what is missing
    missing = len(source) - store.samples_there
    transform = train_transform("evaluation", towers.image_size, resizing=towers.resizing)
    work = Build(source, how.device, how.batch, how.workers, None, len(source))
    build([Pass(store, trunk, transform)], work, OTHER_FOLDER)

    found = ImageFeatures(source, store, missing)
    if not len(found):
        first = next((f": {source.name(sample)}: {why}" for sample, why in found.unreadable.items()), "")
        raise UserError(f"{source.where}: none of its {len(source):,} images can be read{first}")
    return found
