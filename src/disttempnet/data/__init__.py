"""From shards to batches with stable sample ids.

    shards.py      which .tar files a spec names (patterns.py expands it), and what lies in one
    source.py      what training asks of data: samples with dense ids
    index.py       webdataset shards as one: ids → byte ranges;  indexing.py opens and checks it
    building.py    makes the index: scan.py reads a shard (headers.py its images), journal.py keeps what is scanned
    listing.py     what is no tar, as a source;  listing_index.py keeps its rows, rows.py and parquet.py read them
    fields.py      which fields hold image and captions;  delimited.py, encodings.py  the format of a table as text
    json_kinds.py  JSON files that are one object, as rows
    listed.py      the same for evaluation: images, each once, with captions, label and split
    mixture.py     several sources as one, each with a weight
    sampler.py     the epoch plan: exactly once, seeded, world-size independent, resumable
    decoding.py    encoded images → pixels;  transforms.py  augmentations
    dataset.py     samples, batches, the loader;  handover.py  what its workers need to hand batches over
    embedded.py    the data set that ships with the package;  scenes.py  a synthetic one with a long tail
    store.py       who opens a shard: where it lies, or through the cache of remote.py
    cache.py       where both are made into shards on first use
    opening.py     all of it put together for a config

The public names are imported on first use: what needs no torch, such as downloading, starts without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from disttempnet.data.dataset import Batch as Batch
    from disttempnet.data.dataset import PairDataset as PairDataset
    from disttempnet.data.dataset import Sample as Sample
    from disttempnet.data.dataset import Skip as Skip
    from disttempnet.data.dataset import make_loader as make_loader
    from disttempnet.data.decoding import UnreadableImage as UnreadableImage
    from disttempnet.data.decoding import decode as decode
    from disttempnet.data.embedded import embedded_shards as embedded_shards
    from disttempnet.data.handover import lost_workers_named as lost_workers_named
    from disttempnet.data.index import ShardIndex as ShardIndex
    from disttempnet.data.indexing import open_index as open_index
    from disttempnet.data.listing import open_listing as open_listing
    from disttempnet.data.mixture import MixedSource as MixedSource
    from disttempnet.data.opening import TrainingData as TrainingData
    from disttempnet.data.opening import open_source as open_source
    from disttempnet.data.opening import open_training_data as open_training_data
    from disttempnet.data.sampler import EpochPlan as EpochPlan
    from disttempnet.data.sampler import PlanSampler as PlanSampler
    from disttempnet.data.scenes import generated_shards as generated_shards
    from disttempnet.data.shards import ShardList as ShardList
    from disttempnet.data.shards import resolve_shards as resolve_shards
    from disttempnet.data.source import Source as Source
    from disttempnet.data.transforms import eval_transform as eval_transform
    from disttempnet.data.transforms import train_transform as train_transform

_HOMES = {
    "Batch": "dataset",
    "EpochPlan": "sampler",
    "MixedSource": "mixture",
    "PairDataset": "dataset",
    "PlanSampler": "sampler",
    "Sample": "dataset",
    "ShardIndex": "index",
    "ShardList": "shards",
    "Skip": "dataset",
    "Source": "source",
    "TrainingData": "opening",
    "UnreadableImage": "decoding",
    "decode": "decoding",
    "embedded_shards": "embedded",
    "eval_transform": "transforms",
    "generated_shards": "scenes",
    "lost_workers_named": "handover",
    "make_loader": "dataset",
    "open_index": "indexing",
    "open_listing": "listing",
    "open_source": "opening",
    "open_training_data": "opening",
    "resolve_shards": "shards",
    "train_transform": "transforms",
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
