"""Embeds tasks with the two towers and scores them, on one process or many.

Batches, not rows, are dealt to the ranks and all features are gathered before anything is scored: every batch
is the same at any world size, and so are the numbers, to the last bit on like devices. Nothing is random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import TypeVar

import torch
from torch import Tensor, nn

from disttempnet import distributed
from disttempnet.data.decoding import UnreadableImage
from disttempnet.data.transforms import eval_transform
from disttempnet.errors import UserError
from disttempnet.evaluation.protocols import PROTOCOLS, THIRDS, Features, classifier, prompts
from disttempnet.evaluation.readers import Sample, TaskData, find_task, load_task
from disttempnet.evaluation.scores import Scores
from disttempnet.models import Towers, encode_images, encode_texts

Progress = Callable[[str, int, int], None]
AnySample = TypeVar("AnySample", bound=Sample)
Pixels = tuple[Tensor, Tensor]  # uint8 [b, 3, s, s], and bool [b]: which of them could be decoded
PIXEL_CACHE_BYTES = 2**30  # larger tasks (a rank's share) are decoded anew at every evaluation
DECODE_THREADS = 4
_pixels: dict[tuple, list[Pixels]] = {}


@dataclass(kw_only=True)
class TaskResult(Scores):
    """Scores of a task and what they come from; all of it is equal on all ranks.

    Attributes:
        image_features: [n, D] on the device of the evaluation.
        text_features: [n, D], of each image's first caption.
        class_features: [C, D].
        labels: int64 [n], index into `class_names`.
        frequency: int64 [n], training samples of each image's group, as tasks.toml defines it; empty if unknown.
        captions: first caption of each image; keys: SHARD/KEY of each image.
    """

    image_features: Tensor
    text_features: Tensor
    class_features: Tensor
    labels: Tensor
    frequency: Tensor
    class_names: tuple[str, ...]
    captions: tuple[str, ...]
    keys: tuple[str, ...]


def evaluate(
    towers: Towers,
    task_names: Sequence[str],
    *,
    device: torch.device | str,
    batch: int = 256,
    progress: Progress | None = None,
) -> dict[str, TaskResult]:
    """Score the towers on tasks; every rank calls this and gets the same results.

    Args:
        towers: with their module on `device`; its training modes are restored at the end.
        task_names: rows of tasks.toml.
        batch: images or texts embedded at once.
        progress: called with ("texts" or a task's name, batches embedded by this rank, batches of this rank).

    Raises:
        UserError: unknown task, missing or broken data, no readable image, features that are not finite.
    """
    device = torch.device(device)
    tasks = [load_task(find_task(name)) for name in task_names]
    texts = list(dict.fromkeys(text for data in tasks for text in _texts(data)))  # each is embedded once
    row = {text: i for i, text in enumerate(texts)}
    results = {}
    with _evaluation_mode(towers.module):
        features = _embed_texts(towers, texts, device, batch, progress)
        for data in tasks:
            pixels = _task_pixels(data, towers.image_size, batch)
            images, valid = _embed_images(towers, pixels, len(data.samples), device, batch, progress, data.task.name)
            results[data.task.name] = _score(data, images, valid, features, row)
    return results


def embed_samples(
    towers: Towers, samples: Sequence[AnySample], *, device: torch.device | str, batch: int = 256
) -> tuple[Tensor, Tensor, list[AnySample]]:
    """Unit features (images [n, D], first captions [n, D]) of the decodable samples, and these samples.

    Every rank calls this with the same samples and gets the same result. Nothing is kept in memory.
    """
    device = torch.device(device)
    with _evaluation_mode(towers.module):
        pixels = _decoded(samples, towers.image_size, batch)
        images, valid = _embed_images(towers, pixels, len(samples), device, batch)
    kept = [sample for sample, good in zip(samples, valid.tolist(), strict=True) if good]
    texts = embed_captions(towers, [sample.captions[0] for sample in kept], device=device, batch=batch)
    return images[valid], texts, kept


def embed_captions(towers: Towers, captions: Sequence[str], *, device: torch.device | str, batch: int = 256) -> Tensor:
    """Unit features [n, D] of n captions, equal ones embedded once; every rank calls this and gets the same."""
    texts = list(dict.fromkeys(captions))
    row = {text: i for i, text in enumerate(texts)}
    with _evaluation_mode(towers.module):
        features = _embed_texts(towers, texts, torch.device(device), batch)
    return features[torch.tensor([row[caption] for caption in captions], dtype=torch.int64, device=features.device)]


def _score(data: TaskData, images: Tensor, valid: Tensor, texts: Tensor, row: dict[str, int]) -> TaskResult:
    """Apply the task's protocols to the readable images [n, D] and the table of text features."""
    task = data.task
    kept = [sample for sample, good in zip(data.samples, valid.tolist(), strict=True) if good]
    corrupt = tuple(sample.key for sample, good in zip(data.samples, valid.tolist(), strict=True) if not good)
    if not kept:
        raise UserError(f"task '{task.name}': none of its {len(data.samples)} images can be decoded")
    images = images[valid]
    if not (images.isfinite().all() and texts.isfinite().all()):
        raise UserError(f"task '{task.name}': the towers give features that are not finite")
    frequency, third = _of_kept(data.frequency, valid), _of_kept(data.third, valid)
    lost = [name for i, name in enumerate(THIRDS) if data.third and not (third == i).any()]
    if lost:
        raise UserError(f"task '{task.name}': none of its readable images is in the {lost[0]} by training frequency")
    distinct = dict.fromkeys(caption for sample in kept for caption in sample.captions)
    captions = {text: i for i, text in enumerate(distinct)}
    pairs = [(i, captions[c]) for i, sample in enumerate(kept) for c in dict.fromkeys(sample.captions)]
    prompt_rows = [row[prompt] for prompt in prompts(data.class_names, task.templates)]
    features = Features(
        images=images,
        labels=_of_kept(data.labels, valid),
        classes=classifier(texts[prompt_rows], len(task.templates)),
        texts=texts[[row[text] for text in captions]],
        image_of=torch.tensor([i for i, _ in pairs]),
        text_of=torch.tensor([t for _, t in pairs]),
        third=third,
    )
    scores = Scores()
    for protocol in task.protocols:
        PROTOCOLS[protocol](features, scores)
    return TaskResult(
        metrics={key: scores.metrics[key] for key in task.metrics},
        chance={key: scores.chance[key] for key in task.metrics},
        trials={key: scores.trials[key] for key in task.metrics},
        samples=len(kept),
        corrupt=corrupt,
        image_features=images,
        text_features=texts[[row[sample.captions[0]] for sample in kept]],
        class_features=features.classes,
        labels=features.labels,
        frequency=frequency,
        class_names=data.class_names,
        captions=tuple(sample.captions[0] for sample in kept),
        keys=tuple(sample.key for sample in kept),
    )


def _of_kept(values: Sequence[int], valid: Tensor) -> Tensor:
    """The readable images' values as int64, on the device of `valid` [n]; of no values, none."""
    every = torch.tensor(values, dtype=torch.int64, device=valid.device)
    return every[valid] if len(values) else every


def _texts(data: TaskData) -> Iterator[str]:
    yield from prompts(data.class_names, data.task.templates)
    for sample in data.samples:
        yield from sample.captions


def _embed_texts(
    towers: Towers, texts: Sequence[str], device: torch.device, batch: int, progress: Progress | None = None
) -> Tensor:
    """Texts → unit features [t, D], the batches dealt to the ranks."""
    mine = _batches_of_this_rank(len(texts), batch)
    local = []
    for b in mine:
        tokens = towers.tokenizer(list(texts[b * batch : (b + 1) * batch]))
        local.append(encode_texts(towers, tokens.to(device)).float())
        if progress:
            progress("texts", len(local), len(mine))
    return _gather(local, len(texts), batch, (towers.embed_dim,), device)


def _embed_images(
    towers: Towers,
    pixels: Iterable[Pixels],
    n: int,
    device: torch.device,
    batch: int,
    progress: Progress | None = None,
    what: str = "images",
) -> tuple[Tensor, Tensor]:
    """This rank's batches of pixels → unit features [n, D] of all ranks, and bool [n]: which are valid."""
    mine = _batches_of_this_rank(n, batch)
    features, valid = [], []
    for images, good in pixels:
        features.append(encode_images(towers, images.to(device)).float())
        valid.append(good.to(device, torch.uint8))  # gloo gathers no booleans
        if progress:
            progress(what, len(features), len(mine))
    return (
        _gather(features, n, batch, (towers.embed_dim,), device),
        _gather(valid, n, batch, (), device, torch.uint8).bool(),
    )


def _task_pixels(data: TaskData, image_size: int, batch: int) -> Iterable[Pixels]:
    """A task's decoded batches of this rank, remembered where they are few enough."""
    mine = _batches_of_this_rank(len(data.samples), batch)
    key = (data.task, image_size, batch, mine)
    if key in _pixels:
        return _pixels[key]
    decoded = _decoded(data.samples, image_size, batch)
    if len(mine) * batch * 3 * image_size**2 > PIXEL_CACHE_BYTES:
        return decoded
    _pixels[key] = list(decoded)
    return _pixels[key]


def _decoded(samples: Sequence[Sample], image_size: int, batch: int) -> Iterator[Pixels]:
    """Decode this rank's batches; an unreadable image is black and not valid, so batches keep their shape."""
    transform = eval_transform(image_size)

    def pixels_of(sample: Sample) -> Tensor | None:
        try:
            return transform(sample.image())
        except UnreadableImage:
            return None

    black = torch.zeros(3, image_size, image_size, dtype=torch.uint8)
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        for b in _batches_of_this_rank(len(samples), batch):
            part = samples[b * batch : (b + 1) * batch]
            images = list(pool.map(pixels_of, part))
            pixels = torch.stack([black if image is None else image for image in images])
            yield pixels, torch.tensor([image is not None for image in images])


def _batches_of_this_rank(n: int, batch: int) -> range:
    return range(distributed.rank(), ceil(n / batch), distributed.world_size())


def _gather(
    local: list[Tensor],
    n: int,
    batch: int,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """This rank's batches [≤ batch, *shape] → the n rows of all ranks in their own order, on every rank."""
    ranks = distributed.world_size()
    rounds = ceil(ceil(n / batch) / ranks)
    padded = torch.zeros(rounds, batch, *shape, dtype=dtype, device=device)
    for place, rows in zip(padded, local, strict=False):
        place[: len(rows)] = rows
    gathered = distributed.all_gather(padded).unflatten(0, (ranks, rounds))
    return gathered.transpose(0, 1).flatten(0, 2)[:n]


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    """No gradients, no dropout, no batch statistics inside; every submodule's own mode comes back after."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training
