"""Samples → shards of features: each tower is run once over the data.

Ranks, the runs of a grid and any other process may build the same store at once: a process claims a shard by a lock of
the operating system, which ends with the process, and writes it. What is there is skipped, so a build that was killed
goes on. Memory is that of a shard and of the batches that loader workers hold ready.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import TracebackType
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from disttempnet import distributed
from disttempnet.data.augment import TrainTransform
from disttempnet.data.images import UnreadableImage
from disttempnet.data.loader import CAPTION_CHARACTERS, batches_of, random_bits, start_worker
from disttempnet.data.source import UnreadableCaption
from disttempnet.data.workers import fit_prefetch, lost_workers_named, share_tensor
from disttempnet.errors import UserError, notice
from disttempnet.features.store import FeatureStore, cache_error_named, refuse_small_disk
from disttempnet.io.files import WRITING
from disttempnet.io.jobs import stopped_by_sigterm
from disttempnet.io.progress import Meter
from disttempnet.models.text import trimming
from disttempnet.models.trunk import Trunk, filled
from disttempnet.terminal import say

CLAIMS = ".lock"
WAIT_SECONDS = 0.5  # until the shards of other processes are looked for again
AHEAD = 2  # batches that a loader worker holds ready
VIEW_SEED = 0  # of a view's augmentation: runs with other seeds share it


class Samples(Protocol):
    """Samples to embed: a `Source`, or as much of one as the images or texts of a task are."""

    def __len__(self) -> int: ...

    @property
    def usable(self) -> NDArray[np.int64]: ...

    def image_bytes(self, sample: int) -> bytes: ...

    def captions(self, sample: int) -> tuple[str, ...]: ...


AnySamples = TypeVar("AnySamples", bound=Samples, covariant=True)


@dataclass(frozen=True)
class Build(Generic[AnySamples]):
    """Settings of the computation of features.

    Attributes:
        source: the samples.
        device: that the towers are on.
        batch: images or captions embedded at once.
        workers: loader processes for images; 0 = this process decodes.
        autocast: dtype of the towers' arithmetic; None = that of their weights.
        end: shards that hold the ids below this are needed.
    """

    source: AnySamples
    device: torch.device
    batch: int
    workers: int
    autocast: torch.dtype | None
    end: int


class Pass(NamedTuple):
    """One pass over the samples, and the store that it fills.

    Attributes:
        store: of the trunk's features.
        trunk: on the device.
        transform: encoded bytes and a seed → uint8 [3, s, s]; of an image trunk.
        view: which of several augmentations of each image.
    """

    store: FeatureStore
    trunk: Trunk
    transform: TrainTransform | None = None
    view: int = 0


class Part(NamedTuple):
    """Some samples of a shard: pixels uint8 [b, 3, s, s], and sample id → reason for those that are black instead."""

    number: int
    ids: Sequence[int]
    pixels: Tensor
    unreadable: Mapping[int, str]


def build(passes: Sequence[Pass], how: Build[Samples], advice: str, also_bytes: int = 0) -> None:
    """Write the shards that stores lack, then verify all of them. Every rank calls this.

    Args:
        passes: their stores are on one disk.
        how: source, device, sizes.
        advice: what to do where the disk has no room, after "free some,".
        also_bytes: that the caller writes to the same disk afterwards.

    Raises:
        UserError: no room on the disk, unreadable data files, a damaged shard. All ranks raise.
    """

    def refuse_small() -> None:
        needed = also_bytes
        for one in passes:
            one.store.create()
            needed += _bytes_of(one.store, _missing(one.store, how))
        if needed:
            refuse_small_disk(passes[0].store.folder.parent, needed, f"features of {how.end:,} samples", advice)

    distributed.together(refuse_small)  # of all stores, before the first is begun
    for one in passes:
        distributed.together(partial(_write_missing, one, how))
        one.store.verify(how.end)


def usable_mask(source: Samples) -> NDArray[np.bool_]:
    """Return whether each sample is usable, bool [N]; works for sources that are made of others as well."""
    mask = np.zeros(len(source), dtype=bool)
    mask[source.usable] = True
    return mask


def _missing(store: FeatureStore, how: Build[Samples]) -> list[int]:
    return [number for number in store.shards(how.end) if not store.path(number).is_file()]


def _write_missing(one: Pass, how: Build[Samples]) -> None:
    """Write the shards that one store lacks, together with the other ranks and processes."""
    store, trunk = one.store, one.trunk
    if not (missing := _missing(store, how)):
        return
    total = sum(len(store.ids(number)) for number in store.shards(how.end))
    what = f"{trunk.side} features" + (f", view {one.view}" if one.view else "")
    meter = Meter(what, total, total - _samples(store, missing), active=distributed.is_main())
    with _stop_named(store, what, how), in_evaluation_mode(trunk), meter, _Claims(store) as claims:
        _write(store, missing, claims, meter, _Embedding(trunk, how, one.transform, one.view))


@contextmanager
def _stop_named(store: FeatureStore, what: str, how: Build[Samples]) -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM end the command with a line that says what is kept; a run has not begun yet.

    A handler of SIGTERM that is there already keeps its say.
    """
    is_free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    try:
        with stopped_by_sigterm() if is_free else nullcontext():
            yield
    except (KeyboardInterrupt, SystemExit):
        if distributed.is_main():
            shards = len(store.shards(how.end))
            kept = shards - len(_missing(store, how))
            say(f"stopped: {kept:,} of {shards:,} shards of {what} are kept; the same command goes on", error=True)
        raise


def _samples(store: FeatureStore, numbers: Sequence[int]) -> int:
    return sum(len(store.ids(number)) for number in numbers)


def _bytes_of(store: FeatureStore, numbers: Sequence[int]) -> int:
    """Return the bytes of shards on disk, estimated at one caption a sample."""
    return _samples(store, numbers) * (store.width * (2 if store.dtype == "float16" else 4) + 8)


def _write(store: FeatureStore, missing: Sequence[int], claims: _Claims, meter: Meter, embedding: _Embedding) -> None:
    """Write shards until none is missing; those that other processes have claimed are waited for.

    Without locks each rank writes its share of the shards and waits for none: a rank that fails would never end it.
    """
    # ranks begin at different places, so that they rarely meet
    begin = distributed.rank() * len(missing) // distributed.world_size()
    left = [*missing[begin:], *missing[:begin]]
    before = meter.done
    while left:
        claimed = claims.take(left)
        if (first := next(claimed, None)) is not None:  # loader workers start only where there is work
            for number in embedding.write(store, chain([first], claimed)):
                claims.give(number)
                meter.advance(len(store.ids(number)))
        left = [number for number in left if not store.path(number).is_file()]
        others = before + _samples(store, missing) - _samples(store, left) - meter.done
        if others > 0:
            meter.advance(others)
        if not claims.locks:
            left = [number for number in left if claims.is_mine(number)]
        elif left:
            time.sleep(WAIT_SECONDS)


class _Claims:
    """Locks of shards: bytes of one file, each held by one process at a time and given up at its end.

    Where a file system has no locks, shards are divided by rank. Other processes may write them too, and are right.

    Attributes:
        locks: whether the file system has locks, as far as is known.
    """

    def __init__(self, store: FeatureStore) -> None:
        self.store, self.locks = store, True

    def __enter__(self) -> _Claims:
        path = self.store.folder / CLAIMS
        with cache_error_named(path, self.store.elsewhere):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        os.close(self._file)

    def take(self, numbers: Sequence[int]) -> Iterator[int]:
        """Numbers of shards that are missing and now claimed, one after another; none is waited for."""
        for number in numbers:
            if self.store.path(number).is_file() or not self._lock(number):
                continue
            if self.store.path(number).is_file():  # written between the two looks
                self.give(number)
                continue
            if self.locks:  # else another process may be writing it
                for leftover in self.store.folder.glob(f"{WRITING}{self.store.path(number).name}*"):
                    leftover.unlink(missing_ok=True)  # of a process that was killed
            yield number

    def give(self, number: int) -> None:
        with suppress(OSError):
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)

    def is_mine(self, number: int) -> bool:
        """Tell whether a shard is of this rank's share, where there are no locks."""
        return number % distributed.world_size() == distributed.rank()

    def _lock(self, number: int) -> bool:
        if not self.locks:
            return self.is_mine(number)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            self.locks = False
            if distributed.is_main():
                notice(
                    f"{self.store.folder}: its file system has no locks ({error.strerror}): ranks divide the features "
                    "evenly, and other processes compute them a second time"
                )
            return self.is_mine(number)
        return True


class _Embedding:
    """One pass of a trunk over shards of a source."""

    def __init__(self, trunk: Trunk, how: Build[Samples], transform: TrainTransform | None, view: int) -> None:
        self.trunk, self.how, self.transform, self.view = trunk, how, transform, view
        self._usable = usable_mask(how.source)  # bool [N]

    def write(self, store: FeatureStore, numbers: Iterator[int]) -> Iterator[int]:
        """Embed and write shards; yields the number of each that is on disk."""
        parts = self._images(store, numbers) if self.trunk.side == "image" else self._texts(store, numbers)
        for number, features, first, unreadable in parts:
            store.write(number, features, first, unreadable)
            yield number

    def _ids(self, store: FeatureStore, number: int) -> list[int]:
        """Usable ids of a shard."""
        ids = store.ids(number)
        return [ids.start + place for place in np.flatnonzero(self._usable[ids.start : ids.stop]).tolist()]

    def _images(
        self, store: FeatureStore, numbers: Iterator[int]
    ) -> Iterator[tuple[int, Tensor, Tensor | None, dict[int, str]]]:
        """(number, features [rows, F], None, unreadable) of each shard."""
        assert self.transform is not None
        size = self.trunk.towers.image_size
        # requests are (shard, ids): an empty shard is one too, since it is written as well
        requests = (
            (number, ids[start : start + self.how.batch])
            for number in numbers
            for ids in [self._ids(store, number)]
            for start in range(0, max(1, len(ids)), self.how.batch)
        )
        decoder = _Decoder(self.how.source, self.transform, size, self.view)
        current, features, unreadable = -1, torch.empty(0), dict[int, str]()
        with lost_workers_named():
            for part in _decoded(decoder, requests, self.how.workers, self.how.batch * 3 * size**2):
                if part.number != current:
                    if current >= 0:
                        yield current, features, None, unreadable
                    current, unreadable = part.number, {}
                    features = torch.zeros(len(store.ids(current)), store.width)
                if len(part.ids):
                    rows = torch.tensor(part.ids) - store.ids(current).start
                    features[rows] = self.embed(part.pixels)
                    unreadable |= part.unreadable
        if current >= 0:
            yield current, features, None, unreadable

    def _texts(
        self, store: FeatureStore, numbers: Iterator[int]
    ) -> Iterator[tuple[int, Tensor, Tensor | None, dict[int, str]]]:
        """(number, features [rows, F], first [n + 1], unreadable) of each shard."""
        for number in numbers:
            texts: list[str] = []
            counts = torch.zeros(len(store.ids(number)) + 1, dtype=torch.int64)
            unreadable: dict[int, str] = {}
            for sample in self._ids(store, number):
                try:
                    captions = self.how.source.captions(sample)
                except UnreadableCaption as error:
                    unreadable[sample] = str(error)
                    continue
                texts += [caption[:CAPTION_CHARACTERS] for caption in captions]
                counts[sample - store.ids(number).start + 1] = len(captions)
            yield number, self._captions(texts, store.width), counts.cumsum(0), unreadable

    def _captions(self, texts: Sequence[str], width: int) -> Tensor:
        """Captions → features [t, F]; equal ones are embedded once."""
        row = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        if not row:
            return torch.zeros(0, width)
        tokens = self.trunk.towers.tokenizer(list(row))  # int64 [distinct, L]
        trim = trimming(self.trunk.towers.module)
        order = torch.arange(len(row))
        if trim:  # batches of like lengths: no text waits for a long one
            order = torch.argsort(trim.lengths(tokens), stable=True)
        features = torch.empty(len(row), width)
        for rows in order.split(self.how.batch):
            features[rows] = self.embed(trim(tokens[rows]) if trim else tokens[rows])
        return features[[row[text] for text in texts]]

    @torch.inference_mode()
    def embed(self, inputs: Tensor) -> Tensor:
        """A batch of images or tokens → features, float32 [b, F] on the CPU."""
        return self.run(filled(inputs))[: len(inputs)].float().cpu()

    @torch.inference_mode()
    def run(self, inputs: Tensor) -> Tensor:
        """A batch as it is → features [b, F] on the device, in the dtype of the arithmetic."""
        with torch.autocast(self.how.device.type, dtype=self.how.autocast, enabled=self.how.autocast is not None):
            features = self.trunk(inputs.to(self.how.device, non_blocking=True))
        if features.ndim != 2:
            raise UserError(
                f"the features of the {self.trunk.side} tower cannot be cached: its head pools a map of them, "
                f"{list(features.shape[1:])} a sample"
            )
        return features


def width_of(trunk: Trunk, how: Build[Samples]) -> int:
    """F, the width of a trunk's features."""
    size = trunk.towers.image_size
    inputs = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    if trunk.side == "text":
        inputs = trunk.towers.tokenizer(["a"])
    with in_evaluation_mode(trunk):
        return _Embedding(trunk, how, None, 0).run(inputs).shape[1]


class _Decoder(Dataset[Part]):
    """(shard, ids) → their pixels; an unreadable image is black."""

    def __init__(self, source: Samples, transform: TrainTransform, size: int, view: int) -> None:
        self.source, self.transform, self.size, self.view = source, transform, size, view

    def __getitem__(self, request: tuple[int, list[int]]) -> Part:
        number, ids = request
        pixels = torch.zeros(len(ids), 3, self.size, self.size, dtype=torch.uint8)
        unreadable = {}
        for place, sample in enumerate(ids):
            try:
                seed = random_bits(VIEW_SEED, self.view, sample)
                pixels[place] = self.transform(self.source.image_bytes(sample), seed)
            except UnreadableImage as error:
                unreadable[sample] = str(error)
        return Part(number, ids, share_tensor(pixels), unreadable)


def _decoded(
    decoder: _Decoder, requests: Iterator[tuple[int, list[int]]], workers: int, batch_bytes: int
) -> Iterator[Part]:
    """The parts of these requests, in their order."""
    loader = DataLoader(
        decoder,
        sampler=requests,  # of requests, not of numbers: the decoder takes what comes
        batch_size=None,
        num_workers=workers,
        prefetch_factor=fit_prefetch(AHEAD, batch_bytes, workers) if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # the loader draws a seed: not from the trainer's generator
    )
    parts: Iterator[Any] = batches_of(loader)
    yield from parts


@contextmanager
def in_evaluation_mode(trunk: Trunk) -> Iterator[None]:
    """Inside, the tower draws no masks; every submodule's own mode comes back after."""
    modes = {part: part.training for part in trunk.towers.module.modules()}
    trunk.towers.module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
