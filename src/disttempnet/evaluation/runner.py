"""Evaluation while a model is trained or looked at: scores in memory, with the features they come from.

suite.py evaluates a model on many tasks, with results that are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from disttempnet import distributed
from disttempnet.data.builtin.cache import cache_folder
from disttempnet.evaluation.class_features import ClassFeatures
from disttempnet.evaluation.datasets.open import load_task
from disttempnet.evaluation.encoder import FeatureEncoder, ProgressCallback, batches_of_this_rank, evaluation_mode
from disttempnet.evaluation.loader import DecodeRequest, ImageBatch, decoded
from disttempnet.evaluation.protocols import classifier, prompts
from disttempnet.evaluation.score import ScoredTask, embed_task_texts, score_task, task_texts, values_of_kept
from disttempnet.evaluation.scores import Scores
from disttempnet.evaluation.tasks import EvaluationSample, Task, TaskData, find_task
from disttempnet.models import Towers

AnySample = TypeVar("AnySample", bound=EvaluationSample)
PIXEL_CACHE_BYTES = 2**30  # of all tasks, a rank; what finds no place is decoded anew at every evaluation
_pixels: dict[tuple, list[ImageBatch]] = {}


@dataclass(kw_only=True)
class TaskResult(Scores):
    """Scores of a task with captions and what they come from; all of it is equal on all ranks.

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
    tasks: Sequence[str | TaskData],
    *,
    device: torch.device | str,
    batch: int = 256,
    progress: ProgressCallback | None = None,
    data_root: Path | None = None,
) -> dict[str, Scores]:
    """Score the towers on tasks; every rank calls this and gets the same results.

    Args:
        towers: with their module on `device`; its training modes are restored at the end.
        tasks: rows of tasks.toml or data of one's own, by name; or their data.
        batch: images or texts embedded at once.
        progress: called with ("texts" or a task's name, batches embedded by this rank, batches of this rank).
        data_root: where the data of tasks lies that does not ship with the package.

    Returns:
        Scores by task, of tasks with captions a `TaskResult`.

    Raises:
        UserError: unknown task, missing or broken data, no readable image, features that are not finite.
    """
    encoder = FeatureEncoder(towers, torch.device(device), batch)
    loaded = load_tasks(tasks, data_root)
    own = [data for data in loaded if not data.task.below_root]
    texts = list(dict.fromkeys(text for data in own for text in _texts(data)))  # each is embedded once
    row = {text: i for i, text in enumerate(texts)}
    known = ClassFeatures()
    results: dict[str, Scores] = {}
    with evaluation_mode(towers.module):
        features = distributed.all_sum(encoder.texts(texts, progress))
        for data in loaded:
            if data.task.below_root:
                heads, words = embed_task_texts(data, encoder, known, progress)
            else:
                heads = [
                    classifier(features[[row[prompt] for prompt in prompts(*head)]], len(head.templates))
                    for head in data.heads
                ]
                words = features[[row[text] for text in task_texts(data)]]
            outcome = score_task(data, encoder, _task_batches(data, encoder), heads, words, progress)
            results[data.task.name] = _result(data, outcome, heads, words)
    return results


def load_tasks(tasks: Sequence[str | TaskData], data_root: Path | None) -> list[TaskData]:
    """The tasks' data, indexed once and kept; every rank calls this.

    Training does so before its first step: what cannot be read at the end of an epoch would end the run there.

    Raises:
        UserError: an unknown task, or data that is missing or cannot be read, on any rank.
    """
    return distributed.together(
        lambda: [
            task if isinstance(task, TaskData) else _loaded(find_task(task), data_root, cache_folder())
            for task in tasks
        ]
    )


@lru_cache(maxsize=64)
def _loaded(task: Task, data_root: Path | None, cache: Path) -> TaskData:
    """A task's data, kept: training evaluates again and again. Tasks that ship lie in the cache folder."""
    return load_task(task, data_root)


def embed_samples(
    towers: Towers, samples: Sequence[AnySample], *, device: torch.device | str, batch: int = 256
) -> tuple[Tensor, Tensor, list[AnySample]]:
    """Unit features (images [n, D], first captions [n, D]) of the decodable samples, and these samples.

    Every rank calls this with the same samples and gets the same result. Nothing is kept in memory.
    """
    encoder = FeatureEncoder(towers, torch.device(device), batch)
    images = torch.zeros(len(samples), encoder.width, device=encoder.device)
    valid = torch.zeros(len(samples), dtype=torch.int64, device=encoder.device)
    with evaluation_mode(towers.module):
        for part in decoded(_requests(samples, batch), towers):
            images[part.rows] = encoder.images(part.pixels)
            valid[part.rows] = part.valid.to(encoder.device, torch.int64)
    images, valid = distributed.all_sum(images), distributed.all_sum(valid) == 1
    kept = [sample for sample, good in zip(samples, valid.tolist(), strict=True) if good]
    texts = embed_captions(towers, [sample.captions[0] for sample in kept], device=device, batch=batch)
    return images[valid], texts, kept


def embed_captions(towers: Towers, captions: Sequence[str], *, device: torch.device | str, batch: int = 256) -> Tensor:
    """Unit features [n, D] of n captions, equal ones embedded once; every rank calls this and gets the same."""
    texts = list(dict.fromkeys(captions))
    row = {text: i for i, text in enumerate(texts)}
    with evaluation_mode(towers.module):
        features = distributed.all_sum(FeatureEncoder(towers, torch.device(device), batch).texts(texts))
    return features[torch.tensor([row[caption] for caption in captions], dtype=torch.int64, device=features.device)]


def _result(data: TaskData, outcome: ScoredTask, heads: Sequence[Tensor], words: Tensor) -> Scores:
    """The metrics that are reported, with the features of a task with captions."""
    scores, measured = outcome.scores, outcome.measured
    shown = data.task.metrics or _overall(data, scores)
    short = data.size and scores.samples != data.size
    lost = (f"{scores.samples:,} samples of {data.size:,} were seen",) if short else ()
    plain = Scores(
        metrics={key: scores.metrics[key] for key in shown if key in scores.metrics},
        chance={key: scores.chance[key] for key in shown if key in scores.chance},
        trials={key: scores.trials[key] for key in shown if key in scores.trials},
        errors={key: scores.errors[key] for key in shown if key in scores.errors},
        samples=scores.samples,
        corrupt=scores.corrupt + data.broken + lost,
        notes=data.notes,
    )
    kept = [data.samples[i] for i in outcome.kept]
    if measured.features is None or data.puzzles:
        return plain
    row = {text: i for i, text in enumerate(task_texts(data))}
    device = measured.features.images.device
    return TaskResult(
        **vars(plain),
        image_features=measured.features.images,
        text_features=words[[row[sample.captions[0]] for sample in kept]],
        class_features=heads[0] if heads else torch.zeros(0, measured.features.images.shape[1], device=device),
        labels=measured.labels if data.labels else measured.labels[:0],
        frequency=values_of_kept(data.frequency, torch.tensor(outcome.kept, device=device)),
        class_names=data.class_names,
        captions=tuple(sample.captions[0] for sample in kept),
        keys=tuple(sample.key for sample in kept),
    )


def _overall(data: TaskData, scores: Scores) -> list[str]:
    """Metrics of a task as a whole, its main one first: none of a single group."""
    names = [name for name in scores.metrics if ":" not in name]
    return sorted(names, key=lambda name: name != data.task.main)


def _texts(data: TaskData) -> Iterator[str]:
    for head in data.heads:
        yield from prompts(*head)
    yield from task_texts(data)


def _task_batches(data: TaskData, encoder: FeatureEncoder) -> Iterable[ImageBatch]:
    """A task's decoded batches of this rank, remembered where they are few enough."""
    towers, mine = encoder.towers, batches_of_this_rank(len(data.samples), encoder.batch)
    shard = data.samples[0].shard if data.samples else ""
    key = (data.task, shard, towers.image_size, towers.resizing, encoder.batch, tuple(mine))
    if key in _pixels:
        return _pixels[key]
    batches = decoded(_requests(data.samples, encoder.batch), towers)
    kept = sum(batch.pixels.numel() for batches in _pixels.values() for batch in batches)
    if kept + sum(map(len, mine)) * 3 * towers.image_size**2 > PIXEL_CACHE_BYTES:
        return batches
    _pixels[key] = list(batches)
    return _pixels[key]


def _requests(samples: Sequence[EvaluationSample], batch: int) -> Iterator[DecodeRequest]:
    """This rank's batches of one task."""
    for rows in batches_of_this_rank(len(samples), batch):
        yield DecodeRequest(0, rows.start, samples[rows.start : rows.stop])
