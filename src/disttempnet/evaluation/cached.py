"""Tasks on cached features: of a locked tower only the head is run, on what its trunk gave once.

Features of a task's images, and of its prompts and captions, lie in the folder of training's (features/store.py). What
depends on training, heads and towers that are not locked, is computed at every evaluation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from disttempnet.data.augment import EvaluationTransform
from disttempnet.data.images import UnreadableImage
from disttempnet.evaluation.datasets.own import ReadSample
from disttempnet.evaluation.encoder import FeatureEncoder, ProgressCallback, batches_of_this_rank
from disttempnet.evaluation.loader import ImageBatch
from disttempnet.evaluation.protocols import prompts
from disttempnet.evaluation.score import task_texts
from disttempnet.evaluation.tasks import EvaluationSample, Task, TaskData
from disttempnet.features.build import Build, Pass, build, width_of
from disttempnet.features.cache_key import FILES_AT_ONCE, hash_of_files, of_main, trunk_facts
from disttempnet.features.store import CACHE_ELSEWHERE, FeatureStore, store_in
from disttempnet.models.trunk import Trunk, filled


class CachedSide(NamedTuple):
    """One side of a task: its features, the trunk that gave them, and of texts, text → row."""

    store: FeatureStore
    trunk: Trunk
    row: Mapping[str, int]


@dataclass(frozen=True)
class HeadEncoder(FeatureEncoder):
    """Encoder of one task, whose features are what it would give without a cache, and to the last bit in float32.

    Attributes:
        sides: `image` and `text`, where they are cached; the others are run in full.
    """

    sides: Mapping[str, CachedSide] = field(default_factory=dict)

    def images(self, pixels: Tensor) -> Tensor:
        """Cached features [b, F], as `batches` has them, or pixels → unit float32 [b, D]."""
        if "image" not in self.sides:
            return super().images(pixels)
        return self._embedded("image", pixels, self.image_dtype)

    def batches(self) -> Iterator[ImageBatch]:
        """Yield this rank's batches of the task's images, with features [b, F] in place of pixels."""
        store = self.sides["image"].store
        for rows in batches_of_this_rank(store.samples, self.batch):
            reasons = [store.unreadable.get(row) for row in rows]
            valid = torch.tensor([reason is None for reason in reasons])
            yield ImageBatch(0, rows.start, store.read(np.array(rows)), valid, tuple(filter(None, reasons)))

    def texts(self, texts: Sequence[str], progress: ProgressCallback | None = None) -> Tensor:
        """See `FeatureEncoder.texts`; `texts` are of the task."""
        if "text" not in self.sides:
            return super().texts(texts, progress)
        store, _, row = self.sides["text"]
        table = torch.zeros(len(texts), self.width, device=self.device)
        for batch in batches_of_this_rank(len(texts), self.batch):
            ids = np.array([row[text] for text in texts[batch.start : batch.stop]])
            table[batch.start : batch.stop] = self._embedded("text", store.read(ids), self.text_dtype)
        return table

    def _embedded(self, side: str, features: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Features of a trunk [b, F] → unit float32 [b, D]."""
        rows = filled(features, self.least_batch)
        with self._autocast(dtype):
            return normalize(self.sides[side].trunk.head(rows.to(self.device)), dim=-1).float()[: len(features)]


class FeatureCache:
    """Features of the tasks of one model, computed where they are not there yet.

    Args:
        trunks: side → the trunk that is cached; on the device of the evaluation.
        folder: of the features.
        dtype: `float32` or `float16`, on disk.
        workers: loader processes that decode; 0 = this process.
        elsewhere: how a user names another folder, for messages.
        aside: holds another display back while a progress is shown.

    Attributes:
        read, computed: features that were there, and that were not, of all tasks so far.
    """

    def __init__(
        self,
        trunks: Mapping[str, Trunk],
        folder: Path,
        dtype: str = "float32",
        workers: int = 0,
        elsewhere: str = CACHE_ELSEWHERE,
        aside: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.trunks, self.folder, self.dtype, self.workers = trunks, folder, dtype, workers
        self.elsewhere, self.aside = elsewhere, aside
        self.read = self.computed = 0
        self._facts: dict[tuple[str, torch.dtype | None], tuple[dict[str, Any], int]] = {}
        self._sides: dict[tuple[Task, str, torch.dtype | None], CachedSide] = {}

    def encoder(self, data: TaskData, plain: FeatureEncoder) -> HeadEncoder:
        """Return the encoder of a task, whose features are computed first if need be. Every rank calls this.

        Args:
            data: of the task; the same at every call.
            plain: the encoder that runs all of the towers.

        Raises:
            UserError: no room on the disk, or a damaged file.
        """
        sides = {}
        for side in self.trunks:
            dtype = plain.image_dtype if side == "image" else plain.text_dtype
            key = (data.task, side, dtype)
            if key not in self._sides:
                self._sides[key] = (self._images if side == "image" else self._texts)(data, plain, dtype)
            sides[side] = self._sides[key]
        return HeadEncoder(plain.towers, plain.device, plain.batch, plain.image_dtype, plain.text_dtype, sides)

    def prepare(self, tasks: Iterable[TaskData], plain: FeatureEncoder) -> None:
        """Compute what is missing of these tasks' features now; arguments as of `encoder`."""
        for data in tasks:
            self.encoder(data, plain)

    def describe(self) -> str:
        """Say in one line what was read and computed."""
        sides = " and ".join(f"{side}s" for side in self.trunks)
        counts = f"{self.read:,} read, {self.computed:,} computed now"
        return f"evaluation on cached features of {sides}: {counts}: {self.folder}"

    def _images(self, data: TaskData, plain: FeatureEncoder, dtype: torch.dtype | None) -> CachedSide:
        drops = bool(data.samples) and data.samples[0].plain  # a reader decodes all samples alike
        about = {
            "transform": {"name": "evaluation", "plain": drops},
            "images": of_main(lambda: _digest_of(data.samples)),
        }
        towers = plain.towers
        transform = EvaluationTransform(towers.image_size, towers.resizing, drops)
        return self._side("image", _Items(data.samples, ()), about, plain, dtype, transform)

    def _texts(self, data: TaskData, plain: FeatureEncoder, dtype: torch.dtype | None) -> CachedSide:
        of_heads = [text for head in data.heads for text in prompts(head.names, head.templates)]
        texts = list(dict.fromkeys([*of_heads, *task_texts(data)]))
        digest = hashlib.blake2b(digest_size=16)
        for text in texts:
            digest.update(f"{len(text)} {text}\n".encode("utf-8", "surrogatepass"))
        return self._side("text", _Items((), texts), {"texts": digest.hexdigest()}, plain, dtype)

    def _side(
        self,
        side: str,
        items: _Items,
        about: Mapping[str, Any],
        plain: FeatureEncoder,
        dtype: torch.dtype | None,
        transform: EvaluationTransform | None = None,
    ) -> CachedSide:
        """Open the features of one side of a task, and compute what is missing."""
        trunk = self.trunks[side]
        how = Build(items, plain.device, plain.batch, self.workers, dtype, len(items))
        if (side, dtype) not in self._facts:  # towers do not change while a model is trained or evaluated
            self._facts[side, dtype] = trunk_facts(trunk, dtype), width_of(trunk, how)
        facts, width = self._facts[side, dtype]
        store = store_in(self.folder, {**facts, **about}, len(items), width, self.dtype, self.elsewhere)

        there = store.samples_there
        self.read, self.computed = self.read + there, self.computed + len(items) - there
        with self.aside():
            build([Pass(store, trunk, transform)], how, self.elsewhere)
        row = {text: place for place, text in enumerate(items.texts)}
        return CachedSide(store, trunk, row)


class _Items:
    """Images or texts of a task, as a build of features takes them."""

    def __init__(self, images: Sequence[EvaluationSample], texts: Sequence[str]) -> None:
        self.images, self.texts = images, texts

    def __len__(self) -> int:
        return len(self.images) or len(self.texts)

    @property
    def usable(self) -> NDArray[np.int64]:
        return np.arange(len(self))

    def image_bytes(self, sample: int) -> bytes:
        try:
            return self.images[sample].encoded()
        except OSError as error:
            raise UnreadableImage(f"cannot be read: {error.strerror}") from None

    def captions(self, sample: int) -> tuple[str, ...]:
        return (self.texts[sample],)


def _digest_of(samples: Sequence[EvaluationSample]) -> str:
    """Hex digest of what pixels depend on: files with size and time of change, and where in them an image lies.

    Of an image that no file of its own or tar holds, its bytes.
    """
    digest = hashlib.blake2b(digest_size=16)
    number: dict[Path, int] = {}
    for sample in samples:
        if isinstance(sample, ReadSample):
            try:
                content = sample.encoded()
            except UnreadableImage as error:
                content = str(error).encode("utf-8", "surrogatepass")
            digest.update(hashlib.blake2b(content, digest_size=16).digest())
        else:
            file = number.setdefault(sample.shard, len(number))
            digest.update(f"{file} {sample.offset} {sample.size}\n".encode())
    files = [str(file.absolute()) for file in number]
    digest.update("\n".join(files).encode("utf-8", "surrogateescape"))
    parts = (files[start : start + FILES_AT_ONCE] for start in range(0, len(files), FILES_AT_ONCE))
    digest.update(hash_of_files(parts).encode())
    return digest.hexdigest()
