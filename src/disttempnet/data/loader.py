"""Samples and batches: random access by (epoch, id), collated once, in the loader's processes."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from disttempnet.data.augment import TrainTransform
from disttempnet.data.epoch_plan import Draw, EpochPlan, PlanSampler
from disttempnet.data.images import UnreadableImage
from disttempnet.data.source import Source, UnreadableCaption
from disttempnet.data.workers import check_open_files, share_tensor
from disttempnet.errors import UserError
from disttempnet.models.text import Tokenizer, Trim

CANDIDATES = 200  # from all over the epoch for one slot: if none is readable, the data is broken, not a sample
PREFETCH = 4  # batches a worker holds ready
# Trimmed tokens come in few lengths: torch.compile and the allocator of a GPU meet few shapes. Attention and tensor
# cores are fastest at multiples of eight.
LENGTH_STEP = 8
CAPTION_CHARACTERS = 2000  # what a tokenizer is given: it cuts at some 77 words anyway, and takes n² time over one word


class Skip(NamedTuple):
    """An unreadable sample: `SHARD.tar:KEY` or `LISTING:IMAGE`, why, and its id."""

    name: str
    reason: str
    id: int


class Sample(NamedTuple):
    """One pair: image uint8 [3, s, s]; `skipped` are the unreadable samples that it stands in for."""

    image: Tensor
    caption: str
    id: int
    skipped: tuple[Skip, ...]


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step.

    Attributes:
        images: uint8 [b, 3, s, s].
        tokens: int64 [b, L]; of a causal text tower L is no more than the longest of these captions needs.
        ids: int64 [b]; where a sample was unreadable, the id of the one that replaced it.
        skipped: the unreadable samples that were replaced, and those that could not stand in for them either.
    """

    images: Tensor
    tokens: Tensor
    ids: Tensor
    skipped: tuple[Skip, ...] = ()

    def to(self, device: torch.device | str) -> Batch:
        """On a device; copies from pinned memory do not wait."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("images", "tokens", "ids")}
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """In page-locked memory; torch's loader calls this."""
        return Batch(self.images.pin_memory(), self.tokens.pin_memory(), self.ids.pin_memory(), self.skipped)


class PairDataset(Dataset[Sample]):
    """Decoded, augmented samples.

    Args:
        source: where samples lie.
        transform: (encoded image, seed) → uint8 [3, s, s].
        seed: augmentation, and which of several captions, depend on (seed, epoch, id) only: neither on worker nor
            on order.
    """

    def __init__(self, source: Source, transform: TrainTransform, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample of (epoch, id).

        Raises:
            UnreadableImage, UnreadableCaption: this sample is broken.
            UserError: a shard is gone, or a file that is there cannot be read.
        """
        epoch, sample = key
        captions = self.source.captions(sample)
        pixels = self.transform(self.source.image_bytes(sample), random_bits(self.seed, epoch, sample))
        return Sample(pixels, captions[chosen_caption(self.seed, epoch, sample, len(captions))], sample, ())


def chosen_caption(seed: int, epoch: int, sample: int, captions: int) -> int:
    """Which of a sample's captions an epoch reads."""
    return random_bits(seed, epoch, sample, b"caption") % captions if captions > 1 else 0


def random_bits(seed: int, epoch: int, sample: int, purpose: bytes = b"") -> int:
    """56 bits that look random, others for every purpose."""
    text = f"{seed} {epoch} {sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7, person=purpose).digest())


class PlannedSamples(Dataset[Sample]):
    """The samples that a plan draws; those that cannot be read are replaced as the plan says.

    Args:
        pairs: the samples.
        plan: gives the stand-ins.
    """

    def __init__(self, pairs: PairDataset, plan: EpochPlan) -> None:
        self.pairs, self.plan = pairs, plan

    def __getitem__(self, draw: Draw) -> Sample:
        """The sample of a draw, or its first readable stand-in.

        Raises:
            UserError: none of 200 from all over the epoch can be read, or a shard is gone.
        """
        skipped: list[Skip] = []
        candidates = chain([draw.sample], self.plan.stand_ins(draw.epoch, draw.step, draw.slot))
        for sample in islice(candidates, CANDIDATES):
            try:
                return self.pairs[draw.epoch, sample]._replace(skipped=tuple(skipped))
            except (UnreadableImage, UnreadableCaption) as error:
                skipped.append(Skip(self.pairs.source.name(sample), str(error), sample))
        first = ": ".join(skipped[0][:2])
        raise UserError(
            f"{CANDIDATES} samples from all over the data cannot be read, the first is {first}. Look at the data: "
            "disttempnet data verify names what is broken"
        )


class Collate:
    """Samples → Batch, captions tokenised and trimmed together; all of it stands in shared memory at once where this is
    a worker."""

    def __init__(self, tokenizer: Tokenizer, trim: Trim | None = None) -> None:
        self.tokenizer, self.trim = tokenizer, trim

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        tokens = self.tokenizer([sample.caption[:CAPTION_CHARACTERS] for sample in samples])
        return Batch(
            default_collate([sample.image for sample in samples]),
            share_tensor(self.trim(tokens, LENGTH_STEP) if self.trim else tokens),
            share_tensor(torch.tensor([sample.id for sample in samples], dtype=torch.int64)),
            tuple(skip for sample in samples for skip in sample.skipped),
        )


def start_worker(_: int) -> None:
    """Leave signals to the trainer, who needs no dead workers while it saves: a Ctrl-C, one to the process group, and
    those that SLURM sends to every process of a job. SIGTERM from the trainer itself ends the worker: Python's exit
    would wait for it otherwise."""
    os.setpgrp()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()
    if trainer is not None and hasattr(signal, "sigwaitinfo"):  # macOS cannot tell who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_trainer, args=(trainer.pid,), daemon=True).start()
    torch.set_num_threads(1)


def _end_with_the_trainer(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


def batches_of(loader: DataLoader) -> Iterator[Batch]:
    """The batches of an iteration. Workers that are started for it do not die of a SIGTERM that comes ahead of
    `start_worker`, nor of one that a thread of theirs from before it would take: they inherit that it is blocked."""
    if not hasattr(signal, "sigwaitinfo"):
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def make_loader(
    dataset: PairDataset,
    sampler: PlanSampler,
    tokenizer: Tokenizer,
    workers: int,
    pin_memory: bool = False,
    trim: Trim | None = None,
    prefetch: int = PREFETCH,
) -> DataLoader:
    """A loader of Batches in the sampler's order; `sampler.seek` before an iteration chooses epoch and step.

    Args:
        dataset: the samples.
        sampler: the batches.
        tokenizer: list of captions → int64 [b, L].
        workers: processes, kept from epoch to epoch; 0 = load in this process.
        pin_memory: page-lock the batches, for copies to a GPU that overlap with computing.
        trim: of the text tower, where tokens can be trimmed to the longest caption of a batch.
        prefetch: batches a worker holds ready.

    Raises:
        UserError: this process may not open as many files as so many workers need.
    """
    if workers:
        check_open_files(workers * prefetch)
    return DataLoader(
        PlannedSamples(dataset, sampler.plan),
        batch_sampler=sampler,
        collate_fn=Collate(tokenizer, trim),
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # the loader draws a seed an epoch: not from the trainer's generator
    )
