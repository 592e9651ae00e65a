"""Open the [data] of a config: source, epoch plan, samples, loader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from disttempnet.config import DataConfig, SourceConfig
from disttempnet.data.augment import train_transform
from disttempnet.data.epoch_plan import EpochPlan, PlanSampler
from disttempnet.data.held_out import HeldOut
from disttempnet.data.listings.open import is_listing, layout_of, open_listing
from disttempnet.data.listings.parquet import ParquetLayout
from disttempnet.data.loader import PREFETCH, Batch, PairDataset, batches_of, make_loader
from disttempnet.data.mixture import MixedSource
from disttempnet.data.shards.names import resolve_shards
from disttempnet.data.shards.open import open_index
from disttempnet.data.shards.remote import is_remote
from disttempnet.data.source import Source
from disttempnet.data.workers import fit_prefetch
from disttempnet.errors import UserError
from disttempnet.models import Towers
from disttempnet.models.text import Tokenizer, Trim, trimming

TEXT_BYTES = 1024  # of the tokens and id of a sample, about


def open_source(sources: Sequence[SourceConfig], progress: bool = True) -> Source:
    """Open the sources of a config as one; every rank calls this.

    Args:
        sources: paths and settings.
        progress: show a bar on standard error while an index is built.

    Raises:
        UserError: data is missing or has changed since it was indexed.
    """
    parts = [_open_one(source, progress) for source in sources]
    if len(parts) == 1 and sources[0].weight == 1:
        return parts[0]
    return MixedSource(parts, [source.weight for source in sources])


def open_training_source(config: DataConfig, progress: bool = True) -> Source:
    """Open the training samples of a config, without held-out ones (data.validation); every rank calls this."""
    source = open_source(config.sources, progress)
    return HeldOut(source, config.validation) if isinstance(config.validation, float) and config.validation else source


def _open_one(source: SourceConfig, progress: bool) -> Source:
    if is_listing(source):
        return open_listing(source, progress)
    return open_index(source.path, source.index, progress, source.caption_key, source.cache, source.cache_gb)


def places_of(source: SourceConfig) -> set[Path]:
    """Return the local shards, listings or folder of a source, with links resolved; empty for remote shards.

    Raises:
        UserError: they do not exist.
    """
    if is_remote(source.path):
        return set()
    if not is_listing(source):
        shards = resolve_shards(source.path)
        return {(shards.folder / name).resolve() for name in shards.names}
    layout = layout_of(source)
    paths = layout.paths if isinstance(layout, ParquetLayout) else [layout.where]
    return {path.resolve() for path in paths}


@dataclass(frozen=True)
class TrainingData:
    """Source, epoch plan and loader of one rank."""

    source: Source
    plan: EpochPlan
    dataset: PairDataset
    sampler: PlanSampler
    loader: DataLoader

    def loader_from(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield this rank's batches of an epoch, from a step on.

        Raises:
            UserError: samples cannot be read any more.
        """
        self.sampler.seek(epoch, start_step)
        try:
            yield from batches_of(self.loader)
        except UserError as error:
            # torch prefixes what a worker raised with the worker's traceback
            raise UserError(str(error).rsplit("UserError: ")[-1].strip()) from None


def open_training_data(
    config: DataConfig, seed: int, towers: Towers, rank: int = 0, world_size: int = 1
) -> TrainingData:
    """Open source, epoch plan and loader of a config; every rank calls this.

    Args:
        config: the run's [data].
        seed: of order and augmentation.
        towers: give image size, tokenizer, and whether tokens can be trimmed.
        rank, world_size: of this process.

    Raises:
        UserError: missing or changed shards, too few samples, or a world size that does not divide the lanes.
    """
    source = open_training_source(config)
    plan = EpochPlan(source, config.global_batch, config.lanes, seed, config.tail, config.shuffle_window, config.limit)
    plan.local_batch(0, 0, rank, world_size)  # refuse an impossible world size here, not in the first step
    transform = train_transform(config.transform, towers.image_size, config.draft, towers.resizing)
    dataset = PairDataset(source, transform, seed)
    sampler = PlanSampler(plan, rank, world_size)
    loader = open_loader(config, dataset, sampler, towers.tokenizer, trimming(towers.module), towers.image_size)
    return TrainingData(source, plan, dataset, sampler, loader)


def open_loader(
    config: DataConfig,
    dataset: PairDataset,
    sampler: PlanSampler,
    tokenizer: Tokenizer,
    trim: Trim | None,
    image_size: int,
) -> DataLoader:
    """Return the loader of one rank, which prefetches as many batches as shared memory has room for.

    Args:
        image_size: side of the images in pixels; 0 = batches hold none.
    """
    batch_bytes = config.global_batch // sampler.world_size * (3 * image_size**2 + TEXT_BYTES)
    prefetch = fit_prefetch(PREFETCH, batch_bytes, config.workers)
    return make_loader(dataset, sampler, tokenizer, config.workers, torch.cuda.is_available(), trim, prefetch)
