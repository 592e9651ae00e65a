"""Your own data as a task: retrieval and, where samples have labels, zero-shot classification.

folder:PATH        images with captions beside them (x.jpg, x.txt); else as image_folder.py has it
shards:SPEC        webdataset shards of this machine: KEY.jpg, KEY.txt (a caption a line), KEY.json, KEY.cls
captions:FILE      a listing of images and captions, as data.train takes it
…?label=KEY        options after the path, joined by &: keys of label and caption; of a listing, the key of the image
                   and the folder `images`

Equal captions are hits for each of their images; an image may have several. Labels are what `label` names in a
sample's JSON or a listing's row ("label", unless it is said), or KEY.cls. classnames.txt and templates.txt beside the
data are read as those of a folder of classes; classnames.txt is needed where labels are numbers.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from disttempnet.data.images import UnreadableImage
from disttempnet.data.listings.listed import read_listing
from disttempnet.data.listings.readers import FolderLayout
from disttempnet.data.shards.names import resolve_shards
from disttempnet.data.source import UnreadableCaption, usable_captions
from disttempnet.errors import UserError, unknown_name
from disttempnet.evaluation.datasets.cifar import batch_of
from disttempnet.evaluation.datasets.class_names import (
    about_equal,
    names_of,
    read_lines,
    templates_of,
    without_trailing_blanks,
)
from disttempnet.evaluation.datasets.image_folder import folder_data
from disttempnet.evaluation.tars import Span, image_of, members_of
from disttempnet.evaluation.tasks import OWN_CAPTIONS, OWN_SHARDS, EvaluationSample, Head, Task, TaskData, own_path
from disttempnet.sanitize import printable

OPTION_KEYS = ("label", "caption", "images", "image")
LABEL_KEY = "label"
WHOLE_NUMBER = re.compile(r"\d+(\.0*)?")  # pandas writes whole numbers so where some are missing
LONGEST = 40  # characters of a value in a message
LOOKED_AT = 100  # images of a folder that show whether it holds captions or classes
EVALUATED_SPLITS = ("test", "val")  # of a listing that has splits, best first
# readers of training data say where a config would be changed
CONFIG_WORDS = {
    "in data.train = [{path = …, images = FOLDER}]": "after the file's: ?images=FOLDER",
    "name them with image_key and caption_key": "name them: ?image=KEY&caption=KEY",
    "set data.train to": "name",
    "data.train: ": "",
}
_READING = Lock()  # sources keep files open that threads would close on each other


@dataclass(frozen=True)
class ReadSample(EvaluationSample):
    """A sample whose encoded image is what `read` gives."""

    read: Callable[[], bytes] = field(default=bytes, compare=False, repr=False)

    def encoded(self) -> bytes:
        try:
            with _READING:
                return self.read()
        except UserError as error:  # in training it ends a run; here it is one image that counts as missing
            raise UnreadableImage(str(error)) from None


class OwnSamples(NamedTuple):
    """Samples with their labels, "" where there is none; what could not be used; notes."""

    samples: list[EvaluationSample]
    labels: list[str]
    broken: list[str]
    notes: list[str]


def own_data(task: Task) -> TaskData:
    """Read the data that a task names.

    Raises:
        UserError: it is missing, cannot be read, or has no usable samples.
    """
    path, options = _parts(task.name)
    try:
        if task.name.startswith(OWN_SHARDS):
            return _with_labels(task, _shards(path, options), _beside(path), options)
        where = Path(path).expanduser()
        if task.name.startswith(OWN_CAPTIONS):
            if not where.exists():
                raise UserError(f"{where}: no such listing")
            return _with_labels(task, _listing(where, options), where if where.is_dir() else where.parent, options)
        if not where.is_dir():
            raise UserError("no such folder")
        if not batch_of(where) and _holds_captions(where, options):
            return _with_labels(task, _listing(where, options), where, options)
        if options:
            raise UserError(f"no captions beside its images, which {'&'.join(options)} need")
        return folder_data(task, where)
    except OSError as error:
        raise UserError(f"task '{task.name}': cannot be read: {error.strerror}") from None
    except UserError as error:
        why = str(error)
        for in_a_config, here in CONFIG_WORDS.items():
            why = why.replace(in_a_config, here)
        raise UserError(f"task '{task.name}': {why}") from None


def _parts(name: str) -> tuple[str, dict[str, str]]:
    """Return path and options of a task's name."""
    path = own_path(name)
    given = name.partition(":")[2][len(path) + 1 :]
    options = dict(part.partition("=")[::2] for part in given.split("&") if part)
    for key in options:
        if key not in OPTION_KEYS:
            raise UserError(f"task '{name}': {unknown_name('option', key, OPTION_KEYS)}")
    return path, options


def _beside(spec: str) -> Path:
    """Return the folder of classnames.txt and templates.txt beside shards."""
    path = Path(spec.partition("{")[0]).expanduser()
    return path if path.is_dir() else path.parent


def _holds_captions(folder: Path, options: Mapping[str, str]) -> bool:
    """Return whether most of the first images have captions beside them."""
    rows = FolderLayout(folder, options.get("caption", ""))
    first = [fields or {} for fields, _ in islice(rows.rows(), LOOKED_AT)]
    return 2 * sum(rows.caption_key in fields for fields in first) > len(first)


def _listing(where: Path, options: Mapping[str, str]) -> OwnSamples:
    listed = read_listing(where, *(options.get(key, "") for key in ("images", "image", "caption")))
    notes, images = [*listed.notes], listed.images
    splits = Counter(image.split for image in images if image.split)
    for split in EVALUATED_SPLITS:
        if split in splits:
            images = tuple(image for image in images if image.split == split)
            there = ", ".join(f"{name} {count:,}" for name, count in sorted(splits.items()))
            notes.append(f"its split '{split}' is evaluated, of {there} images")
            break
    key = options.get("label", LABEL_KEY)
    samples: list[EvaluationSample] = [
        ReadSample(image.name, where, 0, 0, image.captions, "", image.fields, plain=True, read=image.read)
        for image in images
    ]
    broken = [f"{', '.join(names)}{', …' * (rows > len(names))}: {why}" for why, rows, names in listed.left_out]
    return OwnSamples(samples, [_label(image.fields.get(key)) for image in images], broken, notes)


def _shards(spec: str, options: Mapping[str, str]) -> OwnSamples:
    shards = resolve_shards(spec)
    if shards.remote:
        raise UserError(f"{spec}: evaluation reads shards of this machine only: disttempnet data download copies them")
    own = OwnSamples([], [], [], [])
    for name, shard, members in members_of([shards.folder / one for one in shards.names], own.broken):
        try:
            image, facts = image_of(members), _facts(members)
            if image is None:
                raise UnreadableCaption("no image")
            captions = _captions(members, facts, options.get("caption", ""))
        except UnreadableCaption as error:
            own.broken.append(f"{name}: {error}")
            continue
        label = _label(facts.get(options.get("label", LABEL_KEY)))
        if not label and "label" not in options and "cls" in members:
            label = _text(members["cls"]).strip()
        own.samples.append(EvaluationSample(name, shard, image.offset, image.size, captions, label, facts, plain=True))
        own.labels.append(label)
    return own


def _captions(members: Mapping[str, Span], facts: Mapping[str, Any], key: str) -> tuple[str, ...]:
    if not key and "txt" not in members:
        raise UnreadableCaption("no caption")
    found = facts.get(key) if key else (members["txt"].content or b"").splitlines()
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not all(isinstance(text, str | bytes) for text in texts):
        raise UnreadableCaption("caption is not text" if found is not None else f"no '{key}' in its .json")
    return usable_captions(texts)


def _facts(members: Mapping[str, Span]) -> dict[str, Any]:
    try:
        facts = json.loads(_text(members["json"]) if "json" in members else "{}")
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise UnreadableCaption("its .json cannot be read")
    return facts


def _text(span: Span) -> str:
    return (span.content or b"").decode("utf-8", "replace")


def _label(value: Any) -> str:
    """Return a class as a string; empty where the value is none. Tables with gaps have whole numbers as 0.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""


def _with_labels(task: Task, own: OwnSamples, beside: Path, options: Mapping[str, str]) -> TaskData:
    """Return the task's data, with classification where samples have labels."""
    asked = options.get("label", "")
    samples, broken = own.samples, [*own.broken]
    labels = own.labels
    if asked and not any(labels):
        if odd := [sample.facts[asked] for sample in samples if sample.facts.get(asked) is not None]:
            raise UserError(
                f"'{asked}' holds no classes: {printable(repr(odd[0])[:LONGEST])} is not a string or a whole number"
            )
        keys = ", ".join(sorted({key for sample in samples[:LOOKED_AT] for key in sample.facts}))
        raise UserError(f"no sample has '{asked}'; there are {keys or 'no other fields'}")
    if asked:
        broken += [f"{s.key}: no '{asked}'" for s, label in zip(samples, labels, strict=True) if not label]
        samples = [sample for sample, label in zip(samples, labels, strict=True) if label]
        labels = [label for label in labels if label]
    if not samples:
        raise UserError(f"no usable samples; {next(iter(broken), 'no samples')}")
    task = task.model_copy(update={"protocols": ("retrieval",), "main": "mean_recall"})
    data = TaskData(task, tuple(samples), broken=tuple(broken), notes=tuple(own.notes))
    names, numbers, notes = _classes(labels, beside)
    if asked and not names:
        raise UserError(f"no classes in '{asked}': {'; '.join(notes) or 'all samples have the same'}")
    data = replace(data, notes=(*data.notes, *notes))
    if not names:
        return data
    both = task.model_copy(update={"protocols": ("classification", "retrieval")})
    head = Head(tuple(names), tuple(templates_of(beside / "templates.txt")))
    return replace(data, task=both, heads=(head,), labels=tuple(numbers))


def _classes(labels: Sequence[str], beside: Path) -> tuple[list[str], list[int], list[str]]:
    """Return class names, the class of each sample, notes; no names where the labels make no classes."""
    known = [label for label in labels if label]
    if not known:
        return [], [], []
    if len(known) < len(labels):
        return [], [], [f"{len(labels) - len(known):,} of {len(labels):,} samples have no label: no zero-shot"]
    path, notes = beside / "classnames.txt", list[str]()
    if all(map(WHOLE_NUMBER.fullmatch, labels)):
        if not path.is_file():
            return [], [], [f"labels are numbers, and {path} with their names is missing: no zero-shot"]
        lines, notes = read_lines(path)
        names, numbers = without_trailing_blanks(lines), [int(label.partition(".")[0]) for label in labels]
        if max(numbers) >= len(names):
            raise UserError(f"{path}: {len(names)} names, but a label is {max(numbers)} (they count from 0)")
        return names, numbers, notes + about_equal(names)
    keys = sorted(set(labels))
    if len(keys) < 2:
        return [], [], [f"all samples are labelled '{keys[0]}': no zero-shot"]
    place = {key: number for number, key in enumerate(keys)}
    names, notes = names_of(keys)
    return names, [place[label] for label in labels], notes
