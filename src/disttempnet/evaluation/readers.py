"""Evaluation tasks and their data: rows of tasks.toml, and the labelled webdataset shards that they point to.

A shard is a tar of KEY.webp (or png, jpg, jpeg), KEY.txt (a caption a line) and KEY.json (with a `label`).
Shards are indexed, not loaded: an image is read from its byte range when it is decoded.
"""

from __future__ import annotations

import json
import tarfile
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from disttempnet.config import Section
from disttempnet.data.decoding import decode
from disttempnet.data.shards import IMAGE_SUFFIXES, resolve_shards
from disttempnet.errors import UserError, unknown_name

TASKS_FILE = Path(__file__).with_name("tasks.toml")


class Task(Section):
    """A row of tasks.toml; the file's head explains the fields."""

    name: str
    display: str
    about: str
    data: str
    classes_from: tuple[str, ...]
    protocols: tuple[str, ...]
    metrics: tuple[str, ...]
    templates: tuple[str, ...]
    tags: tuple[str, ...]
    frequency_from: str = ""
    frequency_by: str = "label"


@dataclass(frozen=True)
class Sample:
    """One image of a shard with its words.

    Attributes:
        key: SHARD/KEY, which names it to a person.
        shard, offset, size: where the bytes of its image lie.
        captions: one or more.
        label: name of its class; empty where the shard gives none.
        facts: all that its JSON says.
    """

    key: str
    shard: Path
    offset: int
    size: int
    captions: tuple[str, ...]
    label: str
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)

    def image(self) -> Image.Image:
        """The decoded RGB image; UnreadableImage where its bytes are none."""
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return decode(file.read(self.size))


@dataclass(frozen=True)
class TaskData:
    """What a task measures on.

    Attributes:
        samples: n images.
        class_names: C names in order; labels: of each sample, the index of its class.
        frequency: of each sample, how many training samples share its value of `frequency_by`; and
        third: 0 head, 1 middle, 2 tail. Both are empty where the task names no `frequency_from`.
    """

    task: Task
    samples: tuple[Sample, ...]
    class_names: tuple[str, ...]
    labels: tuple[int, ...]
    frequency: tuple[int, ...]
    third: tuple[int, ...]


@cache
def all_tasks() -> dict[str, Task]:
    """Every row of tasks.toml by name, in its order."""
    rows = tomllib.loads(TASKS_FILE.read_text(encoding="utf-8"))
    return {name: Task.model_validate({"name": name, **row}) for name, row in rows.items()}


def find_task(name: str) -> Task:
    """The task of that name; UserError lists those that exist."""
    tasks = all_tasks()
    if name not in tasks:
        raise UserError(unknown_name("task", name, tasks))
    return tasks[name]


def task_title(name: str) -> str:
    """A task's heading in tables; the name itself where tasks.toml no longer has it."""
    tasks = all_tasks()
    return tasks[name].display if name in tasks else name


@cache
def load_task(task: Task) -> TaskData:
    """Index a task's shards; kept in memory, as training evaluates again and again.

    Raises:
        UserError: missing or broken shards; a sample without label, or with one that is no class name; one
            without the value that frequencies are counted of.
    """
    samples = read_samples(task.data)
    sources = task.classes_from or (task.data,)
    class_names = tuple(sorted({s.label for source in sources for s in read_samples(source)}))
    index = {name: i for i, name in enumerate(class_names)}
    for sample in samples:
        if not sample.label or sample.label not in index:
            what = f"label '{sample.label}' is no class name" if sample.label else "no label"
            raise UserError(f"task '{task.name}': sample {sample.key}: {what}")
    frequency, third = _frequencies(task, samples) if task.frequency_from else ((), ())
    return TaskData(task, samples, class_names, tuple(index[s.label] for s in samples), frequency, third)


def _frequencies(task: Task, samples: Sequence[Sample]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Training frequency of each sample's group, and its third, as the head of tasks.toml defines them."""

    def group(sample: Sample) -> str:
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


@cache
def read_samples(data: str) -> tuple[Sample, ...]:
    """All samples of the shards that `data` names, by shard and by place in it."""
    shards = resolve_shards(data)
    if shards.remote:
        raise UserError(f"{data}: evaluation reads shards of this machine only; copy them")
    return tuple(sample for name in shards.names for sample in _read_shard(shards.folder / name))


def _read_shard(shard: Path) -> Iterator[Sample]:
    try:
        with tarfile.open(shard) as tar:
            members: dict[str, dict[str, tarfile.TarInfo]] = {}
            for member in tar:
                if member.isfile():
                    key, _, suffix = member.name.partition(".")
                    members.setdefault(key, {})[suffix.lower()] = member
            for key, parts in members.items():
                yield _sample(tar, shard, key, parts)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{shard}: not a readable tar shard: {error}") from None


def _sample(tar: tarfile.TarFile, shard: Path, key: str, parts: dict[str, tarfile.TarInfo]) -> Sample:
    def text(suffix: str) -> str:
        file = tar.extractfile(parts[suffix]) if suffix in parts else None
        return file.read().decode("utf-8") if file else ""

    name = f"{shard.name}/{key}"
    image = next((parts[suffix] for suffix in parts if suffix in IMAGE_SUFFIXES), None)
    try:
        captions = tuple(line.strip() for line in text("txt").splitlines() if line.strip())
        facts = json.loads(text("json") or "{}")
        label = str(facts.get("label", ""))
    except ValueError as error:
        raise UserError(f"{shard}: sample {key}: unreadable caption or label: {error}") from None
    if image is None or not captions:
        raise UserError(f"{shard}: sample {key}: no {'image' if image is None else 'caption'}")
    return Sample(name, shard, image.offset_data, image.size, captions, label, facts)
