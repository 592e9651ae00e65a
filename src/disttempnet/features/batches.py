"""A run's batches, with cached features in place of what a locked tower would take.

Which samples make a batch, which caption of a sample an epoch reads, and what stands in for a sample that cannot be
read is as without a cache. Where both towers are cached no loader worker is needed; where one is, workers read the
other side alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disttempnet.config import Config
from disttempnet.data import Batch, Skip, TrainingData
from disttempnet.data.augment import train_transform
from disttempnet.data.builtin.cache import cache_folder
from disttempnet.data.held_out import HeldOut
from disttempnet.data.images import UnreadableImage
from disttempnet.data.loader import PairDataset, PlannedSamples, Sample, chosen_caption
from disttempnet.data.open import open_loader
from disttempnet.features.build import Build, Pass, build, width_of
from disttempnet.features.cache_key import facts_of
from disttempnet.features.store import CACHE_ELSEWHERE, FeatureStore, store_in
from disttempnet.models import Towers
from disttempnet.models.text import trimming
from disttempnet.models.trunk import Trunk, trunk_of

FOLDER = "features"  # in the user's cache


@dataclass(frozen=True)
class CachedData(TrainingData):
    """Training data whose batches hold features, float32 [b, F], where a side is cached.

    Attributes:
        images: a store a view of the images; empty where images are read.
        texts: of the captions; None where captions are read.
    """

    images: tuple[FeatureStore, ...]
    texts: FeatureStore | None

    def loader_from(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """This rank's batches of one epoch, from a step on.

        Raises:
            UserError: samples or features cannot be read any more.
        """
        both = self.images and self.texts
        batches = self._planned(epoch, start_step) if both else super().loader_from(epoch, start_step)
        choose = partial(chosen_caption, self.dataset.seed, epoch)
        for batch in batches:
            ids = batch.ids.numpy()
            if self.images:
                batch = replace(batch, images=self.images[epoch % len(self.images)].read(ids))
            if self.texts:
                batch = replace(batch, tokens=self.texts.read(ids, choose))
            yield batch

    def _planned(self, epoch: int, start_step: int) -> Iterator[Batch]:
        """Batches of ids alone."""
        self.sampler.seek(epoch, start_step)
        samples = PlannedSamples(self.dataset, self.plan)
        unreadable = set(_unreadable(self.images, self.texts))
        nothing = torch.empty(0)
        for draws in self.sampler:
            ids = [draw.sample for draw in draws]
            skipped: tuple[Skip, ...] = ()
            if not unreadable.isdisjoint(ids):
                stand_ins = [samples[draw] if draw.sample in unreadable else None for draw in draws]
                ids = [one.id if one else sample for one, sample in zip(stand_ins, ids, strict=True)]
                skipped = tuple(skip for one in stand_ins if one for skip in one.skipped)
            yield Batch(nothing, nothing, torch.tensor(ids), skipped)

    def describe(self) -> str:
        """Say in one line what is cached."""
        stores = [*self.images[:1], *([self.texts] if self.texts else [])]
        sides = " and ".join(f"{store.facts['side']}s ({store.width} wide, {store.dtype})" for store in stores)
        views = f", {len(self.images)} views of each image" if len(self.images) > 1 else ""
        transform = self.images[0].facts["transform"] if self.images else {}
        how = f", {transform['name']} transform" if transform else ""
        return f"cached features of {sides}{views}{how}: {stores[0].folder.parent}"


class _UncachedSide(PairDataset):
    """Samples of which only what is not cached is read: no pixels, or no caption.

    Args:
        pairs: the samples in full.
        cached: the sides whose features are cached.
        unreadable: sample id → why a cached side has no features.
    """

    def __init__(self, pairs: PairDataset, cached: Sequence[str], unreadable: Mapping[int, str]) -> None:
        super().__init__(pairs.source, pairs.transform, pairs.seed)
        self.pairs, self.cached, self.unreadable = pairs, cached, unreadable

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, sample = key
        if sample in self.unreadable:
            raise UnreadableImage(self.unreadable[sample])
        if "image" in self.cached and "text" in self.cached:
            return Sample(torch.empty(0), "", sample, ())
        if "image" in self.cached:
            captions = self.source.captions(sample)
            caption = captions[chosen_caption(self.seed, epoch, sample, len(captions))]
            return Sample(torch.empty(0), caption, sample, ())
        return self.pairs[key]


def folder_of(config: Config) -> Path:
    """Return the folder that a run's features are kept in."""
    return Path(config.train.cache_folder) if config.train.cache_folder else cache_folder() / FOLDER


def with_cached_features(
    config: Config, data: TrainingData, towers: Towers, device: torch.device, autocast: torch.dtype | None
) -> tuple[CachedData, dict[str, Trunk]]:
    """Training data with features for the sides that a config caches, built where they are not there yet.

    Every rank calls this.

    Args:
        config: the run's.
        data: what it is trained on.
        towers: with their locks set, on `device`.
        device: that trunks are run on.
        autocast: dtype of the towers' arithmetic; None = that of their weights.

    Returns:
        The data, and the trunk of each cached side: its head takes the features.

    Raises:
        UserError: a tower that is trained, no room on the disk, or a damaged file.
    """
    source, limit = data.source, config.data.limit
    end = int(source.usable[limit - 1]) + 1 if 0 < limit < source.usable_counts.sum() else len(source)
    # validation samples have features too: runs with and without it share them
    whole = source.base if isinstance(source, HeldOut) else source
    how = Build(whole, device, config.eval.batch, config.data.workers, autocast, end)
    parent = folder_of(config)
    trunks = {side: trunk_of(towers, side) for side in config.cached_sides}
    facts = facts_of(trunks, source, autocast)
    passes: list[Pass] = []
    if "image" in trunks:
        width = width_of(trunks["image"], how)
        # without views images are seen as evaluation sees them
        name = config.data.transform if config.data.views else "evaluation"
        transform = train_transform(
            name, towers.image_size, config.data.draft and name != "evaluation", towers.resizing
        )
        for view in range(max(1, config.data.views)):
            seen: dict[str, Any] = {"name": name}
            if config.data.views:
                seen |= {"view": view, "draft": config.data.draft}
            store = store_in(parent, facts["image"] | {"transform": seen}, len(source), width, config.train.cache_dtype)
            passes.append(Pass(store, trunks["image"], transform, view))
    if "text" in trunks:
        width = width_of(trunks["text"], how)
        store = store_in(parent, facts["text"], len(source), width, config.train.cache_dtype)
        passes.append(Pass(store, trunks["text"]))

    # write what is missing, and see that all is whole
    smaller = 'set train.cache_dtype = "float16", ' if config.train.cache_dtype == "float32" else ""
    build(passes, how, f"{smaller}or {CACHE_ELSEWHERE}")
    images = [one.store for one in passes if one.trunk.side == "image"]
    texts = passes[-1].store if "text" in trunks else None
    dataset = _UncachedSide(data.dataset, tuple(trunks), _unreadable(images, texts))
    # what is cached is neither decoded nor tokenised
    loader = open_loader(
        config.data,
        dataset,
        data.sampler,
        _no_tokens if texts else towers.tokenizer,
        None if texts else trimming(towers.module),
        0 if images else towers.image_size,
    )
    return CachedData(source, data.plan, dataset, data.sampler, loader, tuple(images), texts), trunks


def _unreadable(images: Sequence[FeatureStore], texts: FeatureStore | None) -> dict[int, str]:
    """Sample id → why it has no features; of a sample without image and caption the caption is named."""
    stores = [*images, *([texts] if texts else [])]
    return {sample: why for store in stores for sample, why in store.unreadable.items()}


def _no_tokens(texts: Sequence[str]) -> Tensor:
    """In place of a tokenizer, where texts are cached: int64 [b, 0]."""
    return torch.empty(len(texts), 0, dtype=torch.int64)
