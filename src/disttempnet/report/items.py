"""Items whose τ is computed: pairs of a source, images of a folder, or captions of a file."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image

from disttempnet.config import SourceConfig
from disttempnet.data import Source, decode, open_source
from disttempnet.data.images import IMAGE_SUFFIXES, UnreadableImage
from disttempnet.data.open import open_training_source
from disttempnet.errors import UserError
from disttempnet.evaluation.tasks import EvaluationSample
from disttempnet.io.files import read_regular
from disttempnet.training.checkpoint import Run

PAIR = ("image", "text")


@dataclass(frozen=True)
class Item(EvaluationSample):
    """A sample with its metadata.

    Attributes:
        id: id of a training sample of the run; None for other data.
        facts: its .json, or the other fields of its row.
        load: returns the bytes of an image that lies in a source; then `shard` names the source, offset and size are 0.
    """

    id: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict, compare=False)
    load: Callable[[], bytes] | None = field(default=None, compare=False, repr=False)

    def image(self) -> Image.Image:
        """Return the decoded RGB image. Raises UnreadableImage."""
        try:
            return decode(self.load()) if self.load else super().image()
        except OSError as error:
            raise UnreadableImage(str(error.strerror)) from None


class Items:
    """A data set that is read a few items at a time.

    Attributes:
        sides: `image`, `text`, or both.
        about: description for messages.
    """

    sides: tuple[str, ...] = PAIR
    about: str = ""

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, positions: Sequence[int] | np.ndarray) -> list[Item]:
        """Return the items at these positions of 0 … len − 1; images are not decoded yet."""
        raise NotImplementedError


class Pairs(Items):
    """Usable pairs of a source in the order of ids; only the first `limit`, unless that is 0."""

    def __init__(self, source: Source, about: str, training: bool, limit: int = 0) -> None:
        self.source, self.about, self.training = source, about, training
        self.ids = source.usable[: limit or None]
        self._one_at_a_time = Lock()  # many threads decode, one at a time reads the source

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, positions: Sequence[int] | np.ndarray) -> list[Item]:
        return [self._item(int(i)) for i in self.ids[np.asarray(positions, dtype=np.int64)]]

    def _item(self, i: int) -> Item:
        source = self.source
        with self._one_at_a_time:
            try:
                facts = source.metadata(i)
            except ValueError:  # training does not read it, so it may be invalid
                facts = None
            return Item(
                key=source.name(i),
                shard=Path(source.where),
                offset=0,
                size=0,
                captions=source.captions(i),
                label="",
                id=i if self.training else None,
                facts=facts if isinstance(facts, dict) else {},
                load=partial(self._load, i),
            )

    def _load(self, i: int) -> bytes:
        with self._one_at_a_time:
            return self.source.image_bytes(i)


def training_pairs(run: Run) -> Pairs:
    """Return the training samples of a run.

    Raises:
        UserError: they are missing, or are not the samples that it was trained on.
    """
    config = run.config.data
    source = open_training_source(config, progress=False)
    if run.index_digest != source.digest:
        raise UserError(
            f"{config.about}: these are not the samples that {run.config.name} was trained on (index "
            f"{run.index_digest[:12]}, now {source.digest[:12]}): ids do not fit; name other data with --shards"
        )
    return Pairs(source, f"the training data, {config.about}", True, config.limit)


def shard_pairs(run: Run, spec: str) -> Pairs:
    """Return the pairs of any training data; ids are known where it is the training data of the run."""
    source = open_source((SourceConfig(path=spec),))
    return Pairs(source, spec, training=source.digest == run.index_digest)


class ImageFolder(Items):
    """All images below a folder, sorted by path."""

    sides = ("image",)

    def __init__(self, folder: str) -> None:
        self.root, self.about = Path(folder), folder
        if not self.root.is_dir():
            raise UserError(f"{folder}: no such folder of images")
        found = (path for path in self.root.rglob("*") if path.suffix[1:].lower() in IMAGE_SUFFIXES)
        self.paths = sorted(path for path in found if not path.is_dir())
        if not self.paths:
            raise UserError(f"{folder}: no images in it ({', '.join(sorted(IMAGE_SUFFIXES))})")

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, positions: Sequence[int] | np.ndarray) -> list[Item]:
        paths = [self.paths[int(i)] for i in positions]
        return [Item(path.relative_to(self.root).as_posix(), path, 0, -1, ("",), "") for path in paths]


class CaptionFile(Items):
    """Non-blank lines of a UTF-8 text file; keys are line numbers from 1."""

    sides = ("text",)

    def __init__(self, file: str) -> None:
        self.about = file
        try:
            lines = [line.rstrip("\n") for line in io.StringIO(read_regular(file).decode("utf-8"), newline=None)]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: captions cannot be read: {getattr(error, 'strerror', None) or error}") from None
        self.lines = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
        if not self.lines:
            raise UserError(f"{file}: no captions in it (one a line)")

    def __len__(self) -> int:
        return len(self.lines)

    def read(self, positions: Sequence[int] | np.ndarray) -> list[Item]:
        chosen = [self.lines[int(i)] for i in positions]
        return [Item(str(number), Path(self.about), 0, 0, (line,), "") for number, line in chosen]
