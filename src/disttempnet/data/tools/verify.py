"""Verification of a data set: read samples as training does, and list broken samples and shards."""

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

SAMPLES_PER_TASK = 256


class ReadTask(NamedTuple):
    """Samples to read in one task, ascending ids."""

    samples: NDArray[np.int64]

    def __str__(self) -> str:
        return f"samples {self.samples[0]} to {self.samples[-1]}"


class VerifyResult(NamedTuple):
    """Number of samples read, and faults: shards, then samples by id."""

    samples: int
    faults: list[Fault]


def verify(source: SourceConfig, workers: int, count: int = 0, seed: int = 0, progress: bool = True) -> VerifyResult:
    """Compare shards with their index, decode images, read captions.

    Args:
        source: the data; an index is built if there is none.
        workers: processes; 1 = this one.
        count: number of random samples to read, without checksums of shards; 0 = all.
        seed: of the random choice.
        progress: show a bar on standard error.

    Raises:
        UserError: the data does not exist, its index cannot be used, or a worker was killed.
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
    """Load the index of shards without a check of the shards; None if there is none."""
    shards = source_shards(source)
    return load_known(shards, source) if shard_index_file(shards, source).is_file() else None


def compare_shards(index: ShardIndex, names: Sequence[str]) -> list[Fault]:
    """Return shards that are new, gone or changed since they were indexed."""
    known = {shard.name for shard in index.shards}
    faults = [Fault(None, name, "shard is not in the index") for name in names if name not in known]
    for shard in index.shards:
        reason = ""
        try:
            size, fingerprint = index.store.state(shard.name)
            if size != shard.size:
                reason = f"shard has {size:,} bytes, {shard.size:,} when it was indexed"
            elif fingerprint != shard.fingerprint:
                reason = "the content of the shard has changed since it was indexed"
        except UserError as error:
            reason = f"shard is gone: {error}"
        if reason:
            faults.append(Fault(None, shard.name, reason))
    return faults


def _compare_checksums(index: ShardIndex, faults: list[Fault], workers: int, progress: bool) -> list[Fault]:
    """Return shards with another checksum than in the index, of those without other faults."""
    bad = {fault.name for fault in faults}
    tasks = [shard for shard in index.shards if shard.checksum and shard.name not in bad]
    found: list[Fault] = []
    with Meter("comparing checksums", len(tasks), active=progress and bool(tasks)) as meter:
        for shard, same in run_jobs(partial(_same_bytes, index.store), tasks, workers):
            if not same:
                found.append(Fault(None, shard.name, "the checksum of the shard has changed since it was indexed"))
            meter.advance()
    return sorted(found, key=lambda fault: fault.name)


def _same_bytes(store: ShardStore, shard: Shard) -> Iterator[bool]:
    """Worker job."""
    try:
        with store.local(shard.name, ShardState(shard.size, shard.fingerprint)) as path, path.open("rb") as file:
            yield hashlib.file_digest(file, "sha256").hexdigest() == shard.checksum
    except (UserError, OSError):
        yield False


def _ungrouped(index: ShardIndex, changed: Collection[str], workers: int, progress: bool) -> list[Fault]:
    """Return shards with files that belong to no sample; shards indexed by an earlier version are scanned again."""
    faults = [Fault(None, shard.name, shard.ungrouped) for shard in index.shards if shard.ungrouped]
    tasks = [shard for shard in index.shards if shard.ungrouped is None and shard.name not in changed]
    with Meter("scanning for names with several dots", len(tasks), active=progress and bool(tasks)) as meter:
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
    # tasks do not cross groups, so that a worker opens one shard at a time
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
    """Worker job."""
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
