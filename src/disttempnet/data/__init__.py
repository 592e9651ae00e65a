"""From data sets to batches with stable sample ids.

    open.py         all of it put together for a config
    source.py       what training asks of data: samples with dense ids
    mixture.py      several sources as one, each with a weight
    epoch_plan.py   exactly once an epoch: seeded, world-size independent, resumable
    loader.py       samples, batches, the loader
    images.py       encoded images → pixels
    augment.py      augmentations
    shards/         tars and their index
    listings/       JSON, CSV, Parquet, folders
    builtin/        emoji and scenes
    tools/          what `disttempnet data` does
    folder.py       a folder of images at any depth, without captions
    headers.py      format and size of an image from its first bytes
    held_out.py     a source without its validation samples
    icons/          the icon data set and how it is built
    workers.py      limits and failures of loader workers

The public names are imported on first use: what needs no torch, such as downloading, starts without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from disttempnet.data.augment import eval_transform as eval_transform
    from disttempnet.data.augment import train_transform as train_transform
    from disttempnet.data.builtin.emoji import embedded_shards as embedded_shards
    from disttempnet.data.builtin.scenes import generated_shards as generated_shards
    from disttempnet.data.epoch_plan import EpochPlan as EpochPlan
    from disttempnet.data.epoch_plan import PlanSampler as PlanSampler
    from disttempnet.data.images import UnreadableImage as UnreadableImage
    from disttempnet.data.images import decode as decode
    from disttempnet.data.listings.open import open_listing as open_listing
    from disttempnet.data.loader import Batch as Batch
    from disttempnet.data.loader import PairDataset as PairDataset
    from disttempnet.data.loader import Sample as Sample
    from disttempnet.data.loader import Skip as Skip
    from disttempnet.data.loader import make_loader as make_loader
    from disttempnet.data.mixture import MixedSource as MixedSource
    from disttempnet.data.open import TrainingData as TrainingData
    from disttempnet.data.open import open_source as open_source
    from disttempnet.data.open import open_training_data as open_training_data
    from disttempnet.data.shards.index import ShardIndex as ShardIndex
    from disttempnet.data.shards.names import ShardList as ShardList
    from disttempnet.data.shards.names import resolve_shards as resolve_shards
    from disttempnet.data.shards.open import open_index as open_index
    from disttempnet.data.source import Source as Source
    from disttempnet.data.workers import lost_workers_named as lost_workers_named

_HOMES = {
    "Batch": "loader",
    "EpochPlan": "epoch_plan",
    "MixedSource": "mixture",
    "PairDataset": "loader",
    "PlanSampler": "epoch_plan",
    "Sample": "loader",
    "ShardIndex": "shards.index",
    "ShardList": "shards.names",
    "Skip": "loader",
    "Source": "source",
    "TrainingData": "open",
    "UnreadableImage": "images",
    "decode": "images",
    "embedded_shards": "builtin.emoji",
    "eval_transform": "augment",
    "generated_shards": "builtin.scenes",
    "lost_workers_named": "workers",
    "make_loader": "loader",
    "open_index": "shards.open",
    "open_listing": "listings.open",
    "open_source": "open",
    "open_training_data": "open",
    "resolve_shards": "shards.names",
    "train_transform": "augment",
}

__all__ = [
    "Batch",
    "EpochPlan",
    "MixedSource",
    "PairDataset",
    "PlanSampler",
    "Sample",
    "ShardIndex",
    "ShardList",
    "Skip",
    "Source",
    "TrainingData",
    "UnreadableImage",
    "decode",
    "embedded_shards",
    "eval_transform",
    "generated_shards",
    "lost_workers_named",
    "make_loader",
    "open_index",
    "open_listing",
    "open_source",
    "open_training_data",
    "resolve_shards",
    "train_transform",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'disttempnet.data' has no attribute '{name}'")
    return getattr(import_module(f"disttempnet.data.{_HOMES[name]}"), name)
