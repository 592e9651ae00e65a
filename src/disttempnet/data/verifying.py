"""Reads every sample of a data set, or some, as training would: what cannot be used is named."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from disttempnet.data.faults import BAD_SAMPLE, Fault, fault_of, known_faults
from disttempnet.data.meter import Meter
from disttempnet.data.source import OK, Source
from disttempnet.data.transforms import decode
from disttempnet.data.workers import run_jobs
from disttempnet.errors import UserError

CHUNK = 256  # samples of one task


class Chunk(NamedTuple):
    """Samples that one task reads, ascending."""

    samples: NDArray[np.int64]

    def __str__(self) -> str:
        return f"samples {self.samples[0]} to {self.samples[-1]}"


def verify_samples(
    source: Source, workers: int, count: int = 0, seed: int = 0, progress: bool = True
) -> tuple[int, list[Fault]]:
    """Decode images and read captions.

    Args:
        source: the samples.
        workers: processes; 0 = none but this one.
        count: how many to read, drawn at random; 0 = all.
        seed: which.
        progress: show a bar on standard error.

    Returns:
        How many were looked at, and what is wrong, in the order of ids.

    Raises:
        UserError: a worker was killed.
    """
    chosen = np.arange(len(source))
    if 0 < count < len(source):
        chosen = np.sort(np.random.default_rng(seed).choice(len(source), count, replace=False))
    # a task stays inside a group, so that a worker opens one shard at a time
    cuts = np.searchsorted(chosen, source.first[1:-1])
    groups = [group for group in np.split(chosen, cuts) if len(group)]
    tasks = [Chunk(group[i : i + CHUNK]) for group in groups for i in range(0, len(group), CHUNK)]
    faults: list[Fault] = []
    with Meter("reading samples", len(chosen), active=progress) as meter:
        for chunk, found in run_jobs(partial(_read, source), tasks, workers):
            faults += found
            meter.advance(len(chunk.samples))
    return len(chosen), sorted(faults, key=lambda fault: fault.sample or 0)


def _read(source: Source, chunk: Chunk) -> Iterator[list[Fault]]:
    """A worker's job."""
    faults: list[Fault] = []
    for sample in chunk.samples.tolist():
        if source.status[sample] != OK:
            faults += known_faults(source, sample, sample + 1)
            continue
        try:
            source.captions(sample)
            decode(source.image_bytes(sample))
        except (*BAD_SAMPLE, UserError) as error:
            faults.append(fault_of(source, sample, error))
    yield faults
