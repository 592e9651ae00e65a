"""The one evaluator: towers on tasks, one task after another, with its results handed to a sink.

All ranks work on one task at a time, each on its own batches. Decoding runs ahead into the next task. `evaluate` keeps
scores in memory, while a model is trained or looked at; outputs.py keeps them in files.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from disttempnet import distributed
from disttempnet.data.builtin.cache import cache_folder
from disttempnet.errors import UserError
from disttempnet.evaluation.cached import FeatureCache
from disttempnet.evaluation.class_features import ClassFeatures
from disttempnet.evaluation.datasets.open import load_task
from disttempnet.evaluation.encoder import (
    FeatureEncoder,
    ProgressCallback,
    batches_of_this_rank,
    evaluation_mode,
    make_encoder,
)
from disttempnet.evaluation.loader import DecodeRequest, ImageBatch, decoded
from disttempnet.evaluation.protocols import PROTOCOLS
from disttempnet.evaluation.score import ScoredTask, embed_task_texts, score_task, task_texts, values_of_kept
from disttempnet.evaluation.scores import Scores
from disttempnet.evaluation.tasks import Task, TaskData, find_task
from disttempnet.models import Towers

PIXEL_CACHE_BYTES = 2**30  # of all tasks, a rank; what does not fit is decoded anew at every evaluation
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


class TaskOutcome(NamedTuple):
    """Result of one task: its scores and the features they come from, or the error that ended it.

    Attributes:
        seconds: wall time that the task took.
        error: None where there are scores; the fields below it belong to scores.
        class_features: [C, D] of each head of `data`.
        text_features: [t, D] of `task_texts(data)`.
    """

    task: Task
    seconds: float
    error: Exception | None = None
    data: TaskData | None = None
    scored: ScoredTask | None = None
    class_features: Sequence[Tensor] = ()
    text_features: Tensor | None = None


class ResultSink(Protocol):
    """Receiver of results; every rank has one."""

    def begin(self, task: Task) -> None:
        """Note that the evaluator turns to a task."""

    def add(self, outcome: TaskOutcome) -> None:
        """Take a task's result. An exception raised here ends the evaluation."""


@dataclass(frozen=True)
class Evaluator:
    """Towers, and how they are evaluated.

    Attributes:
        towers: with their module on `device`; its training modes are restored at the end.
        precision: see `make_encoder`.
        batch: images or texts that a rank embeds at once.
        workers: processes that decode for a rank; 0 = threads.
        known: class features that are embedded already, and where they are kept.
        keep_pixels: keep decoded images in memory for the next evaluation, up to PIXEL_CACHE_BYTES.
        cache: features of locked towers; None = towers are run in full.
    """

    towers: Towers
    device: torch.device
    precision: str = "fp32"
    batch: int = 256
    workers: int = 0
    known: ClassFeatures = field(default_factory=ClassFeatures)
    keep_pixels: bool = False
    cache: FeatureCache | None = None

    def run(
        self,
        tasks: Sequence[Task],
        load: Callable[[Task], TaskData],
        sink: ResultSink,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Evaluate on tasks in their order; every rank calls this with the same tasks.

        Args:
            load: reads a task's data; called in a thread, while the task before is at work.
            sink: gets the result of each task, also of one that failed.
            progress: called with ("texts" or a task's name, batches embedded by this rank, batches of this rank).

        Raises:
            UserError: decoding stopped.
        """
        loaded: dict[int, TaskData | BaseException] = {}
        stream = decoded(self._requests(tasks, load, loaded), self.towers, self.workers)
        seen = 0
        with evaluation_mode(self.towers.module):
            for number, batches in groupby(stream, key=lambda batch: batch.task):
                sink.begin(tasks[number])
                sink.add(self._evaluate(tasks[number], loaded.pop(number), batches, progress))
                seen += 1
        if seen < len(tasks):
            raise UserError(f"decoding stopped before {tasks[seen].display}: run the same command again")

    def _requests(
        self, tasks: Sequence[Task], load: Callable[[Task], TaskData], loaded: dict[int, TaskData | BaseException]
    ) -> Iterator[DecodeRequest]:
        """Yield this rank's requests for all tasks in turn; an empty one says that the task's data is in `loaded`."""
        with ThreadPoolExecutor(1) as ahead:
            waiting = deque(ahead.submit(load, task) for task in tasks[:1])
            for number in range(len(tasks)):
                # The data of this task, and the next one's on its way.
                future = waiting.popleft()
                error = future.exception()
                waiting.extend(ahead.submit(load, task) for task in tasks[number + 1 : number + 2])
                loaded[number] = future.result() if error is None else error
                yield DecodeRequest(number, 0, ())
                # Its batches, unless their features are cached, or they are in memory from an earlier evaluation.
                if error is not None or self._caches_images or self._pixel_key(future.result()) in _pixels:
                    continue
                samples = future.result().samples
                for rows in batches_of_this_rank(len(samples), self.batch):
                    yield DecodeRequest(number, rows.start, samples[rows.start : rows.stop])

    def _evaluate(
        self,
        task: Task,
        loaded: TaskData | BaseException,
        stream: Iterable[ImageBatch],
        progress: ProgressCallback | None,
    ) -> TaskOutcome:
        """Return a task's result; an error on any rank is an error on all."""
        begun = time.monotonic()

        def there() -> TaskData:
            if isinstance(loaded, BaseException):
                raise loaded
            return loaded

        try:
            data = distributed.together(there)
            refuse_different(data)
            # Class features [C, D] and text features [t, D], then one pass over the images.
            encoder, images = self._encoder(data, stream)
            heads, texts = embed_task_texts(data, encoder, self.known, progress)
            scored = score_task(data, encoder, images, heads, texts, progress)
        except Exception as error:
            return TaskOutcome(task, time.monotonic() - begun, error)
        return TaskOutcome(task, time.monotonic() - begun, None, data, scored, heads, texts)

    def _encoder(self, data: TaskData, stream: Iterable[ImageBatch]) -> tuple[FeatureEncoder, Iterable[ImageBatch]]:
        """Return a task's encoder, and the batches of this rank that it takes."""
        matching = any(PROTOCOLS[protocol].matching for protocol in data.task.protocols)
        encoder = make_encoder(self.towers, self.device, self.precision, matching, self.batch)
        if self.cache is None:
            return encoder, self._images(data, stream)
        cached = self.cache.encoder(data, encoder)
        return cached, cached.batches() if self._caches_images else self._images(data, stream)

    @property
    def _caches_images(self) -> bool:
        return self.cache is not None and "image" in self.cache.trunks

    def _images(self, data: TaskData, stream: Iterable[ImageBatch]) -> Iterable[ImageBatch]:
        """Return a task's decoded batches of this rank: from memory, or from the stream and kept where they fit."""
        key = self._pixel_key(data)
        if key is None:
            return stream
        if key not in _pixels:
            kept = sum(batch.pixels.numel() for batches in _pixels.values() for batch in batches)
            rows = sum(map(len, batches_of_this_rank(len(data.samples), self.batch)))
            if kept + rows * 3 * self.towers.image_size**2 > PIXEL_CACHE_BYTES:
                return stream
            _pixels[key] = list(stream)
        return _pixels[key]

    def _pixel_key(self, data: TaskData) -> tuple | None:
        """Return what decoded batches depend on; None where they are not kept."""
        if not self.keep_pixels:
            return None
        shard = data.samples[0].shard if data.samples else ""
        mine = batches_of_this_rank(len(data.samples), self.batch)
        return (data.task, shard, self.towers.image_size, self.towers.resizing, self.batch, tuple(mine))


class ScoresInMemory:
    """Sink that keeps scores by task, of tasks with captions as `TaskResult`; an error ends the evaluation."""

    def __init__(self) -> None:
        self.results: dict[str, Scores] = {}

    def begin(self, task: Task) -> None:
        pass

    def add(self, outcome: TaskOutcome) -> None:
        if outcome.error is not None:
            raise outcome.error
        self.results[outcome.task.name] = reported_scores(outcome)


def evaluate(
    towers: Towers,
    tasks: Sequence[str | TaskData],
    *,
    device: torch.device | str,
    batch: int = 256,
    progress: ProgressCallback | None = None,
    data_root: Path | None = None,
    cache: FeatureCache | None = None,
) -> dict[str, Scores]:
    """Score the towers on tasks; every rank calls this and gets the same results.

    Args:
        towers: with their module on `device`; its training modes are restored at the end.
        tasks: rows of tasks.toml or data of your own, by name; or their data.
        batch: images or texts embedded at once.
        progress: called with ("texts" or a task's name, batches embedded by this rank, batches of this rank).
        data_root: where the data of tasks lies that does not ship with the package.
        cache: features of locked towers, of these towers; None = they are run in full.

    Returns:
        Scores by task, of tasks with captions a `TaskResult`.

    Raises:
        UserError: unknown task, missing or broken data, no readable image, features that are not finite.
    """
    loaded = load_tasks(tasks, data_root)
    sink = ScoresInMemory()
    evaluator = Evaluator(towers, torch.device(device), batch=batch, keep_pixels=True, cache=cache)
    by_task = {data.task: data for data in loaded}
    evaluator.run(list(by_task), by_task.__getitem__, sink, progress)
    return sink.results


def load_tasks(tasks: Sequence[str | TaskData], data_root: Path | None) -> list[TaskData]:
    """Index the tasks' data once and keep it; every rank calls this.

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
    """Return a task's data, kept: training evaluates again and again. Tasks that ship lie in the cache folder."""
    return load_task(task, data_root)


def refuse_different(data: TaskData) -> None:
    """Raise UserError unless all ranks see the same samples: the rows that each of them fills are those of one table.

    Every rank calls this.
    """
    if distributed.world_size() > 1 and len(set(distributed.gather_objects(digest(data)))) > 1:
        raise UserError("the ranks see different data: its copies on the nodes differ, or it is being written")


def digest(data: TaskData) -> int:
    """Return a number that is the same on all ranks that see the same samples, and equally many texts."""
    counts = (len(data.puzzles), len(data.broken), [(len(head.names), len(head.templates)) for head in data.heads])
    words = "\n".join([*(sample.key for sample in data.samples), *task_texts(data)])
    return zlib.crc32(f"{counts}{data.labels}{words}".encode())


def reported_scores(outcome: TaskOutcome) -> Scores:
    """Return the metrics that are reported; of a task with captions also the features they come from.

    Args:
        outcome: of a task that has not failed.
    """
    assert outcome.data is not None
    assert outcome.scored is not None
    assert outcome.text_features is not None
    data, scores, measured = outcome.data, outcome.scored.scores, outcome.scored.measured

    # The metrics of the task's row, its first one first; what the task lacks is named beside the unreadable.
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
    if measured.features is None or data.puzzles:
        return plain

    # Features [n, D] of the readable images and of their first captions.
    kept = [data.samples[i] for i in outcome.scored.kept]
    row = {text: i for i, text in enumerate(task_texts(data))}
    images, heads = measured.features.images, outcome.class_features
    return TaskResult(
        **vars(plain),
        image_features=images,
        text_features=outcome.text_features[[row[sample.captions[0]] for sample in kept]],
        class_features=heads[0] if heads else torch.zeros(0, images.shape[1], device=images.device),
        labels=measured.labels if data.labels else measured.labels[:0],
        frequency=values_of_kept(data.frequency, torch.tensor(outcome.scored.kept, device=images.device)),
        class_names=data.class_names,
        captions=tuple(sample.captions[0] for sample in kept),
        keys=tuple(sample.key for sample in kept),
    )


def _overall(data: TaskData, scores: Scores) -> list[str]:
    """Return the metrics of a task as a whole, its main one first, without those of single groups."""
    names = [name for name in scores.metrics if ":" not in name]
    return sorted(names, key=lambda name: name != data.task.main)
