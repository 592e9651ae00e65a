"""Evaluation tasks and their data: rows of tasks.toml, and the samples that they are measured on.

Read here: data that ships with the package or that it makes, tars of KEY.webp (or png, jpg, jpeg), KEY.txt (a caption a
line) and KEY.json (with a `label`). datasets/open.py reads what lies below a data root. Tars are indexed, not loaded:
an image is read from its byte range when it is decoded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from disttempnet.config import Section
from disttempnet.data.icons.built import BUILT
from disttempnet.data.images import MAX_BYTES, UnreadableImage, decode
from disttempnet.data.shards.names import resolve_shards
from disttempnet.errors import UserError, unknown_name
from disttempnet.evaluation.tars import Span, image_of, read_tar
from disttempnet.io.files import open_regular, read_regular

TASKS_FILE = Path(__file__).with_name("tasks.toml")
OWN_FOLDER = "folder:"  # begins the name of a task that is your own data, no row of tasks.toml: datasets/own.py
OWN_SHARDS, OWN_CAPTIONS = "shards:", "captions:"
OWN_DATA = (OWN_FOLDER, OWN_SHARDS, OWN_CAPTIONS)
VALIDATION_TASK = "validation"  # of a run's own data: validation.py
OPTIONS_START = re.compile(r"\?(?=\w+=)")  # what follows the path in the name of such a task: ?label=species&…


class Task(Section):
    """A row of tasks.toml; the file explains the fields."""

    name: str
    display: str
    about: str = ""
    data: str = ""
    classes_from: tuple[str, ...] = ()
    protocols: tuple[str, ...]
    metrics: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    tags: tuple[str, ...]
    frequency_from: str = ""
    frequency_by: str = "label"
    frequency_bounds: tuple[int, ...] = ()
    label_key: str = "label"
    half: Literal["", "tune", "test"] = ""
    main: str = ""
    metadata: tuple[str, ...] = ()
    size: int = 0
    classes: int = 0
    prompts: int = 0
    seconds: float = 0.0
    source: str = ""
    also: tuple[str, ...] = ()

    @property
    def below_root(self) -> bool:
        """True where its data lies below a data root."""
        return not self.data

    @property
    def is_built(self) -> bool:
        """True where a command has to build its data first."""
        return self.data.startswith(BUILT)


@dataclass(frozen=True)
class EvaluationSample:
    """One image of a shard with its words.

    Attributes:
        key: SHARD/KEY, which names it to a person.
        shard, offset, size: where the bytes of its image lie; size −1 is all of a file.
        captions: one or more.
        label: name of its class; empty where the shard gives none.
        facts: content of its JSON.
        plain: decode it as other evaluators do; see `decode`.
    """

    key: str
    shard: Path
    offset: int
    size: int
    captions: tuple[str, ...]
    label: str
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)
    plain: bool = False

    def image(self) -> Image.Image:
        """Decode the RGB image. Raises UnreadableImage where the bytes are none, OSError where they cannot be read."""
        return decode(self.encoded(), self.plain)

    def encoded(self) -> bytes:
        """Return the encoded image. Raises as `image`."""
        if self.size > MAX_BYTES:
            raise UnreadableImage(f"over {MAX_BYTES:,} bytes")
        if self.size < 0:
            return read_regular(self.shard, MAX_BYTES)
        descriptor = open_regular(self.shard)
        try:
            return os.pread(descriptor, self.size, self.offset)
        finally:
            os.close(descriptor)


def sample_of(name: str, file: Path, image: Span, captions: tuple[str, ...] = ()) -> EvaluationSample:
    """Return a sample of a published data set."""
    return EvaluationSample(name, file, image.offset, image.size, captions, "", plain=True)


class Head(NamedTuple):
    """A zero-shot classifier in words: C class names, and the templates that each of them is put into."""

    names: tuple[str, ...]
    templates: tuple[str, ...]


class Puzzle(NamedTuple):
    """A cue, the candidates as places in a task's samples, and which of them belong to the cue."""

    cue: str
    candidates: tuple[int, ...]
    right: tuple[bool, ...]


@dataclass(frozen=True)
class TaskData:
    """Data of a task.

    Attributes:
        samples: n images.
        heads: classifiers of its images; as a rule one, none for retrieval.
        labels: of each sample, the index of its class in the first head; empty where there are no classes.
        frequency: of each sample, how many training samples share its value of `frequency_by`; and
        third: 0 head, 1 middle, 2 tail. Both are empty where frequencies are not known.
        metadata: int64 [n, columns], numbers of each sample under the names of the task's `metadata`.
        puzzles: of `winogavil`.
        broken: name and reason of what could not be used; it counts as missing.
        notes: for the reader of the result.
        size: expected number of samples; 0 = not known.
    """

    task: Task
    samples: tuple[EvaluationSample, ...]
    heads: tuple[Head, ...] = ()
    labels: tuple[int, ...] = ()
    frequency: tuple[int, ...] = ()
    third: tuple[int, ...] = ()
    metadata: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    puzzles: tuple[Puzzle, ...] = ()
    broken: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    size: int = 0

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the C classes of the first head, in order."""
        return self.heads[0].names if self.heads else ()


@cache
def all_tasks() -> dict[str, Task]:
    """Return every row of tasks.toml by name, in its order."""
    rows = tomllib.loads(TASKS_FILE.read_text(encoding="utf-8"))
    return {name: Task.model_validate({"name": name, **row}) for name, row in rows.items()}


def find_task(name: str) -> Task:
    """Return the task of that name, or your own data as a task (`OWN_DATA`). Raises UserError with those that exist."""
    if name.startswith(OWN_FOLDER):
        return Task(name=name, display=_own_title(name), data=name, protocols=("classification",), main="acc1", tags=())
    if name.startswith(OWN_DATA):
        return Task(
            name=name, display=_own_title(name), data=name, protocols=("retrieval",), main="mean_recall", tags=()
        )
    if name == VALIDATION_TASK:
        raise UserError(f"task '{name}' needs a run whose config has data.validation")
    tasks = all_tasks()
    if name not in tasks:
        raise UserError(unknown_name("task", name, tasks))
    return tasks[name]


def own_path(name: str) -> str:
    """Return the path, file or spec in the name of a task of your own data. Raises UserError where there is none."""
    kind, _, rest = name.partition(":")
    path = OPTIONS_START.split(rest)[0]
    if not path.strip() or "\0" in path:
        raise UserError(f"task '{name}': lacks its path: {kind}:PATH")
    return path


def _own_title(name: str) -> str:
    """Return the last part of the path; the last two of a file or pattern, as any file may be called captions.csv."""
    path = Path(os.path.abspath(Path(own_path(name)).expanduser()))
    parts = (path.parent.name, path.name) if path.suffix and not os.path.isdir(path) else (path.name,)
    return "/".join(filter(None, parts)) or name


def choose_tasks(names: Sequence[str] = (), tags: Sequence[str] = ()) -> list[Task]:
    """Return tasks by name, and all rows with one of the tags, each once. Raises UserError where one does not exist."""
    known = dict.fromkeys(tag for task in all_tasks().values() for tag in task.tags)
    for tag in tags:
        if tag not in known:
            raise UserError(unknown_name("tag", tag, known))
    chosen = {name: find_task(name) for name in names}
    chosen |= {name: task for name, task in all_tasks().items() if set(task.tags) & set(tags)}
    return list(chosen.values())


def task_title(name: str) -> str:
    """Return a task's heading in tables; an unknown task's name."""
    if name == VALIDATION_TASK:
        return "Validation"
    return find_task(name).display if name in all_tasks() or name.startswith(OWN_DATA) else name


@cache
def embedded_data(task: Task) -> TaskData:
    """Index the shards that a task's row names; kept in memory, as training evaluates again and again.

    Raises:
        UserError: missing or broken shards; a sample without label, or with one that is no class name; one
            without the value that frequencies are counted of.
    """
    samples = tuple(sample for sample in read_samples(task.data) if not task.half or half_of(sample.label) == task.half)
    sources = task.classes_from or (task.data,)
    class_names = tuple(sorted({s.label for source in sources for s in read_samples(source)}))
    index = {name: i for i, name in enumerate(class_names)}
    for sample in samples:
        if not sample.label or sample.label not in index:
            what = f"label '{sample.label}' is not a class name" if sample.label else "no label"
            raise UserError(f"task '{task.name}': sample {sample.key}: {what}")
    frequency, third = _frequencies(task, samples) if task.frequency_from else ((), ())
    heads = (Head(class_names, task.templates),)
    return TaskData(task, samples, heads, tuple(index[s.label] for s in samples), frequency, third)


def half_of(label: str) -> str:
    """Return the half that a class belongs to, `tune` or `test`, by a hash of its name: the same on every machine."""
    return ("tune", "test")[hashlib.blake2b(label.encode(), digest_size=1).digest()[0] % 2]


def _frequencies(task: Task, samples: Sequence[EvaluationSample]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the training frequency of each sample's group, and its third, as the head of tasks.toml defines them."""

    def group(sample: EvaluationSample) -> str:
        if task.frequency_by not in sample.facts:
            raise UserError(f"task '{task.name}': sample {sample.key}: no '{task.frequency_by}' to count")
        return str(sample.facts[task.frequency_by])

    trained = Counter(group(sample) for sample in read_samples(task.frequency_from))
    groups = [group(sample) for sample in samples]
    images = Counter(groups)
    third, before = {}, 0
    for name in sorted(images, key=lambda name: (-trained[name], name)):
        middle = 2 * before + images[name]  # twice the place of the group's middle image
        third[name] = 3 * middle // (2 * len(samples))
        before += images[name]
    return tuple(trained[name] for name in groups), tuple(third[name] for name in groups)


def read_samples(data: str) -> tuple[EvaluationSample, ...]:
    """Return all samples of the shards that `data` names, by shard and by place in it."""
    shards = resolve_shards(data)
    if shards.remote:
        raise UserError(f"{data}: evaluation reads shards of this machine only; copy them")
    return tuple(sample for name in shards.names for sample in _read_shard(shards.folder / name))


@cache
def _read_shard(shard: Path) -> tuple[EvaluationSample, ...]:
    try:
        tar = read_tar(shard)
    except OSError as error:
        raise UserError(f"{shard}: not a readable tar shard: {error}") from None
    if tar.note:
        raise UserError(f"{shard}: not a readable tar shard: {tar.note}")
    if tar.repeated:
        raise UserError(f"{shard}: sample {tar.repeated[0]}: the key comes twice in this tar")
    return tuple(_sample(shard, key, members) for key, members in tar.samples.items())


def _sample(shard: Path, key: str, members: Mapping[str, Span]) -> EvaluationSample:
    def text(suffix: str) -> str:
        return (members[suffix].content or b"").decode("utf-8") if suffix in members else ""

    image = image_of(members)
    try:
        captions = tuple(line.strip() for line in text("txt").splitlines() if line.strip())
        facts = json.loads(text("json") or "{}")
        label = str(facts.get("label", ""))
    except ValueError as error:
        raise UserError(f"{shard}: sample {key}: unreadable caption or label: {error}") from None
    if image is None or not captions:
        raise UserError(f"{shard}: sample {key}: no {'image' if image is None else 'caption'}")
    return EvaluationSample(f"{shard.name}/{key}", shard, image.offset, image.size, captions, label, facts)
