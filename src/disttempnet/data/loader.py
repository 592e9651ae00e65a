"""Samples and batches: random access by (epoch, id), collated once in the loader workers."""

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

CANDIDATES = 200  # replacements tried for a slot: if none is readable, the data is broken, not a sample
PREFETCH = 4  # batches that a worker prefetches
# Trimmed tokens come in few lengths, so that torch.compile and the GPU allocator see few shapes. Attention and tensor
# cores are fastest at multiples of eight.
LENGTH_STEP = 8
CAPTION_CHARACTERS = (
    2000  # limit for the tokenizer: it keeps about 77 words anyway, and takes n² time for a single word
)


class Skip(NamedTuple):
    """Unreadable sample: `SHARD.tar:KEY` or `LISTING:IMAGE`, the reason, and its id."""

    name: str
    reason: str
    id: int


class Sample(NamedTuple):
    """Image uint8 [3, s, s] with a caption; `skipped` are the unreadable samples that it replaces."""

    image: Tensor
    caption: str
    id: int
    skipped: tuple[Skip, ...]


@dataclass(frozen=True)
class Batch:
    """Batch of one rank.

    Attributes:
        images: uint8 [b, 3, s, s].
        tokens: int64 [b, L]; for a causal text tower L is the length of the longest caption, rounded up.
        ids: int64 [b]; of a replaced sample, the id of the replacement.
        skipped: the unreadable samples that were replaced, unreadable candidates included.
    """

    images: Tensor
    tokens: Tensor
    ids: Tensor
    skipped: tuple[Skip, ...] = ()

    def to(self, device: torch.device | str) -> Batch:
        """Return a copy on a device; copies from pinned memory do not block."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("images", "tokens", "ids")}
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """Return a copy in page-locked memory; torch's loader calls this."""
        return Batch(self.images.pin_memory(), self.tokens.pin_memory(), self.ids.pin_memory(), self.skipped)


class PairDataset(Dataset[Sample]):
    """Decoded and augmented samples.

    Args:
        source: the data.
        transform: (encoded image, seed) → uint8 [3, s, s].
        seed: augmentation and choice of a caption depend on (seed, epoch, id) alone, not on worker or order.
    """

    def __init__(self, source: Source, transform: TrainTransform, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Return the sample of (epoch, id).

        Raises:
            UnreadableImage, UnreadableCaption: this sample is broken.
            UserError: a shard is gone, or an existing file cannot be read.
        """
        epoch, sample = key
        captions = self.source.captions(sample)
        pixels = self.transform(self.source.image_bytes(sample), random_bits(self.seed, epoch, sample))
        return Sample(pixels, captions[chosen_caption(self.seed, epoch, sample, len(captions))], sample, ())


def chosen_caption(seed: int, epoch: int, sample: int, captions: int) -> int:
    """Return the number of the caption that an epoch reads, of several."""
    return random_bits(seed, epoch, sample, b"caption") % captions if captions > 1 else 0


def random_bits(seed: int, epoch: int, sample: int, purpose: bytes = b"") -> int:
    """Return 56 pseudo-random bits for a purpose."""
    text = f"{seed} {epoch} {sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7, person=purpose).digest())


class PlannedSamples(Dataset[Sample]):
    """Samples of an epoch plan, with unreadable ones replaced by the plan's candidates.

    Args:
        pairs: the samples.
        plan: gives the candidates.
    """

    def __init__(self, pairs: PairDataset, plan: EpochPlan) -> None:
        self.pairs, self.plan = pairs, plan

    def __getitem__(self, draw: Draw) -> Sample:
        """Return the sample of a draw, or its first readable replacement.

        Raises:
            UserError: none of 200 candidates can be read, or a shard is gone.
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
    """Collate function: samples → Batch, with captions tokenised and trimmed, in shared memory if this is a worker."""

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
    """Let a worker ignore signals, so that it lives while the trainer saves a checkpoint.

    These are Ctrl-C, signals to the process group, and those that SLURM sends to every process of a job. SIGTERM from
    the trainer itself ends the worker; otherwise Python would wait for it at exit.
    """
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
    """Start an iteration over the batches of a loader.

    SIGTERM is blocked while workers start, and they inherit that: one that arrives before `start_worker` does not
    kill them.
    """
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
    """Return a loader of Batches in the sampler's order; `sampler.seek` sets epoch and step of an iteration.

    Args:
        dataset: the samples.
        sampler: the batches.
        tokenizer: list of captions → int64 [b, L].
        workers: processes, which persist over epochs; 0 = load in this process.
        pin_memory: page-lock the batches, so that copies to a GPU overlap with computing.
        trim: trims tokens to the longest caption of a batch; None if the text tower does not allow it.
        prefetch: batches that a worker prefetches.

    Raises:
        UserError: this process may not open as many files as the workers need.
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
        generator=torch.Generator(),  # for the loader's seed of each epoch, not the trainer's
    )
