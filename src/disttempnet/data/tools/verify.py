"""Reads a data set, or some of it, as training would: samples and shards that are broken are named."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from disttempnet.config import SourceConfig
from disttempnet.data import open_source
from disttempnet.data.images import decode
from disttempnet.data.listings.open import is_listing
from disttempnet.data.shards.index import Shard, ShardIndex
from disttempnet.data.shards.open import load_known, shard_index_file, source_shards
from disttempnet.data.shards.scan import scan_shard
from disttempnet.data.shards.store import ShardState, ShardStore
from disttempnet.data.source import OK, Source
from disttempnet.data.tools.unreadable import BAD_SAMPLE, Fault, fault_of, known_faults
from disttempnet.errors import UserError
from disttempnet.io.jobs import run_jobs
from disttempnet.io.progress import Meter

SAMPLES_PER_TASK = 256  # samples of one task


class ReadTask(NamedTuple):
    """Samples that one task reads, ascending."""

    samples: NDArray[np.int64]

    def __str__(self) -> str:
        return f"samples {self.samples[0]} to {self.samples[-1]}"


class VerifyResult(NamedTuple):
    """How many samples were read, and what is wrong: shards, then samples in the order of ids."""

    samples: int
    faults: list[Fault]


def verify(source: SourceConfig, workers: int, count: int = 0, seed: int = 0, progress: bool = True) -> VerifyResult:
    """Compare shards with their index, decode images, read captions.

    Args:
        source: the data; what has no index yet gets one.
        workers: processes; 1 = this one.
        count: how many samples to read, drawn at random, without the checksums of shards; 0 = all.
        seed: which.
        progress: show a bar on standard error.

    Raises:
        UserError: nothing is there, its index cannot be used, or a worker was killed.
    """
    opened = (None if is_listing(source) else known_index(source)) or open_source([source], progress)
    faults: list[Fault] = []
    sound = np.ones(len(opened), dtype=bool)
    if isinstance(opened, ShardIndex):
        faults = compare_shards(opened, source_shards(source).names)
        if not count:
            faults += _compare_checksums(opened, faults, workers, progress)
        changed = {fault.name for fault in faults}
        for number, shard in enumerate(opened.shards):
            sound[opened.first[number] : opened.first[number + 1]] = shard.name not in changed
        faults += [Fault(None, shard.name, f"shard {shard.note}") for shard in opened.shards if shard.note]
        faults += _ungrouped(opened, changed, workers, progress)
    chosen = np.flatnonzero(sound)
    if 0 < count < len(chosen):
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, count, replace=False))
    return VerifyResult(len(chosen), faults + _read_samples(opened, chosen, workers, progress))


def known_index(source: SourceConfig) -> ShardIndex | None:
    """The index of tars as it was made, whatever has become of them since; None where there is none yet."""
    shards = source_shards(source)
    return load_known(shards, source) if shard_index_file(shards, source).is_file() else None


def compare_shards(index: ShardIndex, names: Sequence[str]) -> list[Fault]:
    """Shards, of the index and of those that are there, which are not what was indexed."""
    known = {shard.name for shard in index.shards}
    faults = [Fault(None, name, "shard is not in the index") for name in names if name not in known]
    for shard in index.shards:
        reason = ""
        try:
            size, fingerprint = index.store.state(shard.name)
            if size != shard.size:
                reason = f"shard has {size:,} bytes, {shard.size:,} when it was indexed"
            elif fingerprint != shard.fingerprint:
                reason = "shard has other content than when it was indexed"
        except UserError as error:
            reason = f"shard is gone: {error}"
        if reason:
            faults.append(Fault(None, shard.name, reason))
    return faults


def _compare_checksums(index: ShardIndex, faults: list[Fault], workers: int, progress: bool) -> list[Fault]:
    """Shards whose bytes have changed, of those that have a checksum and seem sound."""
    bad = {fault.name for fault in faults}
    tasks = [shard for shard in index.shards if shard.checksum and shard.name not in bad]
    found: list[Fault] = []
    with Meter("comparing checksums", len(tasks), active=progress and bool(tasks)) as meter:
        for shard, same in run_jobs(partial(_same_bytes, index.store), tasks, workers):
            if not same:
                found.append(Fault(None, shard.name, "shard has another checksum than when it was indexed"))
            meter.advance()
    return sorted(found, key=lambda fault: fault.name)


def _same_bytes(store: ShardStore, shard: Shard) -> Iterator[bool]:
    """A worker's job."""
    try:
        with store.local(shard.name, ShardState(shard.size, shard.fingerprint)) as path, path.open("rb") as file:
            yield hashlib.file_digest(file, "sha256").hexdigest() == shard.checksum
    except (UserError, OSError):
        yield False


def _ungrouped(index: ShardIndex, changed: Collection[str], workers: int, progress: bool) -> list[Fault]:
    """Shards with files that belong to no sample, by the index; where an earlier version made it, by another look."""
    faults = [Fault(None, shard.name, shard.ungrouped) for shard in index.shards if shard.ungrouped]
    tasks = [shard for shard in index.shards if shard.ungrouped is None and shard.name not in changed]
    with Meter("looking for names with several dots", len(tasks), active=progress and bool(tasks)) as meter:
        for shard, found in run_jobs(partial(_grouped_now, index.store, index.caption_key), tasks, workers):
            if found != shard.samples:
                what = f"{found:,} samples are in it, {shard.samples:,} in its index, which an earlier version made"
                faults.append(Fault(None, shard.name, f"{what}: delete {index.path} to index again"))
            meter.advance()
    return faults


def _grouped_now(store: ShardStore, caption_key: str, shard: Shard) -> Iterator[int]:
    """A worker's job: how many samples a shard holds by today's rule."""
    with store.local(shard.name, ShardState(shard.size, shard.fingerprint)) as path:
        yield len(scan_shard(path, caption_key).start)


def _read_samples(source: Source, chosen: NDArray[np.int64], workers: int, progress: bool) -> list[Fault]:
    # a task stays inside a group, so that a worker opens one shard at a time
    cuts = np.searchsorted(chosen, source.first[1:-1])
    groups = [group for group in np.split(chosen, cuts) if len(group)]
    tasks = [
        ReadTask(group[i : i + SAMPLES_PER_TASK]) for group in groups for i in range(0, len(group), SAMPLES_PER_TASK)
    ]
    faults: list[Fault] = []
    with Meter("reading samples", len(chosen), active=progress) as meter:
        for chunk, found in run_jobs(partial(_read, source), tasks, workers):
            faults += found
            meter.advance(len(chunk.samples))
    return sorted(faults, key=lambda fault: fault.sample or 0)


def _read(source: Source, chunk: ReadTask) -> Iterator[list[Fault]]:
    """A worker's job."""
    faults: list[Fault] = []
    for sample in chunk.samples.tolist():
        if source.status_of(sample) != OK:
            faults += known_faults(source, sample, sample + 1)
            continue
        try:
            source.captions(sample)
            decode(source.image_bytes(sample))
        except (*BAD_SAMPLE, UserError) as error:
            faults.append(fault_of(source, sample, error))
    yield faults
