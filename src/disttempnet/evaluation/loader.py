"""Samples → batches of pixels, decoded by threads of this process or by worker processes.

Work comes as a stream of requests, which may run over many tasks: workers stay busy across the end of one. A request
gives file and byte range of each image, so workers need no shards.
"""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from disttempnet.data.augment import eval_transform
from disttempnet.data.images import UnreadableImage
from disttempnet.data.workers import lost_workers_named, share_tensor
from disttempnet.errors import UserError, UserNotice
from disttempnet.evaluation.tasks import EvaluationSample
from disttempnet.models import Resizing, Towers

DECODE_THREADS = 4
BATCHES_AHEAD = 2  # batches that are decoded before they are asked for, by each worker


class DecodeRequest(NamedTuple):
    """Consecutive samples to decode: of the task of that number, from the place `start` on."""

    task: int
    start: int
    samples: Sequence[EvaluationSample]


class ImageBatch(NamedTuple):
    """Pixels, uint8 [b, 3, s, s]; valid, bool [b]: which could be decoded; errors: of each other one, the reason."""

    task: int
    start: int
    pixels: Tensor
    valid: Tensor
    errors: tuple[str, ...]

    @property
    def rows(self) -> slice:
        """Places of the samples in the task."""
        return slice(self.start, self.start + len(self.valid))


class Decoder(Dataset):
    """Requests → batches; an unreadable image is black and not valid, so that batches keep their shape."""

    def __init__(self, image_size: int, resizing: Resizing) -> None:
        self.image_size = image_size
        self.transform = eval_transform(image_size, resizing)

    def __getitem__(self, request: DecodeRequest) -> ImageBatch:
        return self.stack(request, [self.decode(sample) for sample in request.samples])

    def decode(self, sample: EvaluationSample) -> Tensor | str:
        """Return pixels, or the reason why there are none."""
        try:
            return self.transform(sample.image())
        except UnreadableImage as error:
            return str(error)
        except OSError as error:
            return f"cannot be read: {error.strerror}"

    def stack(self, request: DecodeRequest, decoded: Sequence[Tensor | str]) -> ImageBatch:
        black = torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8)
        good = [isinstance(pixels, Tensor) for pixels in decoded]
        images = [pixels if isinstance(pixels, Tensor) else black for pixels in decoded]
        pixels = torch.stack(images) if images else torch.zeros(0, *black.shape, dtype=torch.uint8)
        errors = tuple(pixels for pixels in decoded if isinstance(pixels, str))
        valid = torch.tensor(good, dtype=torch.bool)
        return ImageBatch(request.task, request.start, share_tensor(pixels), share_tensor(valid), errors)


def decoded(requests: Iterable[DecodeRequest], towers: Towers, workers: int = 0) -> Iterator[ImageBatch]:
    """Yield batches in the order of the requests.

    Args:
        requests: iterated a few batches ahead of what is given out.
        towers: their image size and resizing.
        workers: processes that decode; 0 = threads of this one. Where one dies, threads take over, with a warning.
    """
    decoder = Decoder(towers.image_size, towers.resizing)
    if not workers:
        yield from _by_threads(requests, decoder)
        return
    # Worker processes take requests; those that are begun and not answered yet are remembered.
    requests, begun = iter(requests), deque[DecodeRequest]()
    loader = DataLoader(
        decoder,
        sampler=_noted(requests, begun),  # of requests, not of numbers: the decoder takes what comes
        batch_size=None,
        num_workers=workers,
        prefetch_factor=BATCHES_AHEAD,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # the loader draws a seed: not from the program's generator
    )
    batches = _without_signal(loader)
    while True:
        try:
            with lost_workers_named():
                batch = next(batches, None)
        except UserError as error:
            what = str(error).partition(":")[0]
            more = "out of memory as a rule (--workers): threads decode from here on"
            warnings.warn(f"{what}, {more}", UserNotice, stacklevel=2)
            break
        if batch is None:
            return
        begun.popleft()
        yield batch
    del batches, loader  # ends the other workers
    yield from _by_threads(chain(begun, requests), decoder)


def _noted(requests: Iterator[DecodeRequest], begun: deque[DecodeRequest]) -> Iterator[DecodeRequest]:
    for request in requests:
        begun.append(request)
        yield request


def _without_signal(loader: DataLoader) -> Iterator[ImageBatch]:
    """Return an iterator that notices a dead worker itself, within seconds: torch's signal handler would raise at any
    line of this process."""
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    return batches


def _by_threads(requests: Iterable[DecodeRequest], decoder: Decoder) -> Iterator[ImageBatch]:
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        waiting: deque = deque()
        for request in requests:
            waiting.append((request, [pool.submit(decoder.decode, sample) for sample in request.samples]))
            if len(waiting) > BATCHES_AHEAD:
                first, futures = waiting.popleft()
                yield decoder.stack(first, [future.result() for future in futures])
        for first, futures in waiting:
            yield decoder.stack(first, [future.result() for future in futures])


def _start_worker(_: int) -> None:
    """Leave Ctrl-C and SLURM's SIGUSR1 to the main process; decode in one thread a worker."""
    os.setpgrp()
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
