"""Evaluation data below a data root, as DataComp's and CLIP_benchmark's tools lay it out, and as it is published.

    wds_vtab-dtd_test/                          a task's key with "/" as "-"; `fairness/` may be left out
        classnames.txt                          a name a line, line i = label i
        zeroshot_classification_templates.txt   a template a line, {c} = the name
        test/nshards.txt  test/0.tar …          KEY.webp|png|jpg|jpeg, KEY.cls, KEY.npy (metadata), KEY.txt (captions)
    flickr_1k_test_image_text_retrieval/        a published retrieval set: a CSV and a folder of images
    wds_winogavil_test/                         test/*.tar of images, and puzzles.jsonl
    sizes.toml                                  optional: "vtab/dtd" = 500, where a folder holds a part of the task

A data set with captions only needs its tars or its CSV: there is nothing to convert.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np

from disttempnet.errors import UserError
from disttempnet.evaluation.folders import folder_data
from disttempnet.evaluation.protocols import PROTOCOLS
from disttempnet.evaluation.readers import (
    FOLDER,
    Head,
    Puzzle,
    Sample,
    Span,
    Tar,
    Task,
    TaskData,
    embedded_data,
    find_task,
    image_of,
    read_tar,
)

COMPATIBLE = ("datacomp-1.4",)  # CLIP_benchmark 1.4, which DataComp pins: blank lines are no class names
FACES = ("race", "gender", "age", "toxic")
SCAN_THREADS = 16  # tars are indexed side by side: on a network disk each header is a wait


class MissingData(UserError):
    """A task whose data is not below the data root; the message says where to get it."""


def load_task(task: Task, root: Path | None = None, compat: str = "") -> TaskData:
    """What a task measures on.

    Args:
        task: a row of tasks.toml.
        root: the data root; tasks whose data ships with the package need none.
        compat: "" or one of `COMPATIBLE`.

    Raises:
        MissingData: nothing of it is there.
        UserError: it cannot be read, or is not what the task says.
    """
    if task.data.startswith(FOLDER):
        return folder_data(task)
    if not task.below_root:
        return embedded_data(task)
    if root is None:
        raise UserError(f"task '{task.name}' needs its data: set --data-root, or eval.data_root in a config")
    folder = find_data(task, root)
    if folder is None:
        raise MissingData(
            f"none of {', '.join(folder_names(task))} is below {root}; get huggingface.co/datasets/{task.source}"
        )
    size = sizes_of(root).get(task.name, task.size)
    if task.protocols == ("winogavil",):
        data = _winogavil(task, folder)
    elif task.protocols == ("caption_retrieval",):
        data = _captioned(task, folder)
    else:
        data = _labelled(task, folder, compat)
    notes = [*data.notes]
    if size != task.size:
        notes.append(f"sizes.toml: {size:,} samples, the task has {task.size:,}")
    return TaskData(**{**vars(data), "notes": tuple(notes), "size": size})


def require(names: Sequence[str], root: Path | None) -> None:
    """Raise UserError where one of the tasks does not exist or its data is not there: learnt before the work."""
    for task in map(find_task, names):
        if not task.below_root:
            continue
        if root is None or find_data(task, root) is None:
            load_task(task, root)


def folder_names(task: Task) -> list[str]:
    """Folders below a data root that a task may lie in, in the order in which they are tried."""
    key = task.name.replace("/", "-")
    names = [f"wds_{key}_test", f"wds_{key.removeprefix('fairness-')}_test", task.source.rpartition("/")[2], *task.also]
    return list(dict.fromkeys(names))


def find_data(task: Task, root: Path) -> Path | None:
    """A task's folder below a data root; None where it is not there."""
    return next((root / name for name in folder_names(task) if (root / name).is_dir()), None)


def is_there(task: Task, root: Path) -> bool:
    """Whether a task's data is below a data root, or needs none."""
    return not task.below_root or find_data(task, root) is not None


@cache
def sizes_of(root: Path) -> dict[str, int]:
    """Sizes by task that a data root claims for itself: of one that holds parts of the tasks."""
    path = root / "sizes.toml"
    try:
        sizes = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise UserError(f"{path}: '{name}' is no number of samples: {size!r}")
    return sizes


def _labelled(task: Task, folder: Path, compat: str) -> TaskData:
    """A classification task: its tars, class names and templates."""
    heads = _heads(task, folder, compat)
    columns = PROTOCOLS[task.protocols[0]].columns
    faces = task.protocols == ("faces",)
    samples: list[Sample] = []
    labels: list[int] = []
    rows: list[list[int]] = []
    broken: list[str] = []
    shards, notes = _shards(folder / "test")
    for name, shard, members in _members(shards, broken):
        image = image_of(members)
        try:
            if image is None:
                raise ValueError("no image")
            label = 0 if faces else _label(members)
            row = _metadata(members, columns)
        except ValueError as error:
            broken.append(f"{name}: {error}")
            continue
        # what CLIP_benchmark 1.4 has no class for can be no hit; otherwise names and labels do not belong together
        if label >= len(heads[0].names) and not compat:
            raise UserError(f"{folder}: sample {name}: label {label}, but {len(heads[0].names)} class names")
        samples.append(Sample(name, shard, image.offset, image.size, (), ""))
        labels.append(label)
        rows.append(row)
    if task.classes and len(heads[0].names) != task.classes:
        notes.append(f"{len(heads[0].names)} class names, the task has {task.classes}")
    if task.prompts and len(heads[0].templates) != task.prompts:
        notes.append(f"{len(heads[0].templates)} templates, the published data has {task.prompts}")
    return TaskData(
        task,
        tuple(samples),
        heads,
        () if faces else tuple(labels),
        metadata=np.array(rows, dtype=np.int64).reshape(len(rows), len(columns)),
        broken=tuple(broken),
        notes=tuple(notes),
    )


def _heads(task: Task, folder: Path, compat: str) -> tuple[Head, ...]:
    names, templates = (
        _lines(folder / name, blanks=not compat) for name in ("classnames.txt", "zeroshot_classification_templates.txt")
    )
    for template in templates:
        if template and "{c}" not in template:
            raise UserError(f"{folder}: template '{template}' has no {{c}} for the class name")
    if task.protocols != ("faces",):
        return (Head(names, templates),)
    parted: list[dict[str, list[str]]] = [{kind: [] for kind in FACES} for _ in range(2)]
    for lines, parts in zip((names, templates), parted, strict=True):
        for line in lines:
            kind, _, text = line.partition(":")
            if kind not in parts:
                raise UserError(f"{folder}: '{line}' begins with none of {', '.join(FACES)} and a colon")
            parts[kind].append(text)
    for kind in FACES:
        if not parted[0][kind] or not parted[1][kind]:
            raise UserError(f"{folder}: no class names or no templates that begin with '{kind}:'")
    return tuple(Head(tuple(parted[0][kind]), tuple(parted[1][kind])) for kind in FACES)


def _lines(path: Path, blanks: bool) -> tuple[str, ...]:
    """Stripped lines of a text file; a blank line is a class name too (CLEVR's fourth), unless `blanks` is off."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    lines = [line for line in lines if line or blanks]
    if not lines:
        raise UserError(f"{path}: is empty")
    return tuple(lines)


def _shards(folder: Path) -> tuple[list[Path], list[str]]:
    """All tars of a folder, 0.tar, 1.tar, … 10.tar, and what is odd about their number."""
    shards = sorted(folder.glob("*.tar"), key=lambda path: (len(path.name), path.name))
    if not shards:
        raise UserError(f"{folder}: holds no .tar")
    path, notes = folder / "nshards.txt", []
    text = path.read_text(encoding="utf-8").strip() if path.is_file() else None
    if text is None:
        notes.append(f"nshards.txt is missing; all {len(shards)} tars are read")
    elif text != str(len(shards)):
        notes.append(f"nshards.txt says {text or 'nothing'}; all {len(shards)} tars that are there are read")
    return shards, notes


def _members(shards: Sequence[Path], broken: list[str]) -> Iterator[tuple[str, Path, Mapping[str, Span]]]:
    """(SHARD/KEY, shard, its files) of all samples; a tar that is cut off is named in `broken`."""
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        for shard, tar in zip(shards, pool.map(_read_tar, shards), strict=True):
            if tar.note:
                broken.append(f"{shard.name}: {tar.note}")
            for key, members in tar.samples.items():
                yield sys.intern(f"{shard.name}/{key}"), shard, members


def _read_tar(path: Path) -> Tar:
    try:
        return read_tar(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _label(members: Mapping[str, Span]) -> int:
    text = (members["cls"].content or b"").decode("ascii", "replace").strip() if "cls" in members else ""
    if not text.isdecimal():
        raise ValueError(f"its label is '{text}', no number" if text else "no label")
    return int(text)


def _metadata(members: Mapping[str, Span], columns: Sequence[str]) -> list[int]:
    """The first columns of a sample's .npy, as many as the protocol has names for."""
    if not columns:
        return []
    if "npy" not in members:
        raise ValueError("no metadata")
    row = np.load(io.BytesIO(members["npy"].content or b""), allow_pickle=False).reshape(-1)
    if len(row) < len(columns):
        raise ValueError(f"metadata of {len(row)} columns, {len(columns)} needed: {', '.join(columns)}")
    values = row[: len(columns)].astype(np.float64)
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"metadata is no row of group numbers: {values.tolist()}")
    return [int(value) for value in values]


def _captioned(task: Task, folder: Path) -> TaskData:
    """A retrieval task: CLIP_benchmark's tars of images and captions, or the published CSV and images."""
    broken: list[str] = []
    notes: list[str] = []
    samples = []
    if (folder / "test").is_dir():
        shards, notes = _shards(folder / "test")
        for name, shard, members in _members(shards, broken):
            image = image_of(members)
            text = (members["txt"].content or b"").decode("utf-8", "replace") if "txt" in members else ""
            if image is None or not text:
                broken.append(f"{name}: no {'image' if image is None else 'caption'}")
                continue
            samples.append(Sample(name, shard, image.offset, image.size, tuple(text.splitlines()), ""))
    else:
        files = _files_below(folder)
        for row in _csv_rows(folder, ("filename", "raw")):
            captions = tuple(_list(row["raw"], folder))
            path = files.get(row["filename"])
            if path is None or not captions:
                broken.append(f"{row['filename']}: no {'such image' if path is None else 'caption'}")
                continue
            samples.append(Sample(row["filename"], path, 0, -1, captions, ""))
    return TaskData(task, tuple(samples), broken=tuple(broken), notes=tuple(notes))


def _winogavil(task: Task, folder: Path) -> TaskData:
    """WinoGAViL: a pool of images by name, and puzzles about some of them."""
    broken: list[str] = []
    notes: list[str] = []
    pool: dict[str, Sample] = {}
    if (folder / "test").is_dir():
        shards, notes = _shards(folder / "test")
        for name, shard, members in _members(shards, broken):
            if (image := image_of(members)) is not None:
                pool[name.partition("/")[2]] = Sample(name, shard, image.offset, image.size, (), "")
        rows = _jsonl(folder / "puzzles.jsonl")
    else:
        rows = [
            {"cue": row["cue"], **{key: _list(row[key], folder) for key in ("candidates", "associations")}}
            for row in _csv_rows(folder, ("cue", "candidates", "associations"))
        ]
        for file, path in _files_below(folder).items():
            pool[Path(file).stem] = Sample(file, path, 0, -1, (), "")
    used: dict[str, int] = {}
    puzzles = []
    for number, row in enumerate(rows, 1):
        missing = [name for name in row["candidates"] if name not in pool]
        if missing or not row["associations"]:
            broken.append(f"puzzle {number}: " + (f"no image '{missing[0]}'" if missing else "no associations"))
            continue
        places = tuple(used.setdefault(name, len(used)) for name in row["candidates"])
        puzzles.append(Puzzle(row["cue"], places, tuple(name in row["associations"] for name in row["candidates"])))
    samples = tuple(pool[name] for name in used)
    return TaskData(task, samples, puzzles=tuple(puzzles), broken=tuple(broken), notes=tuple(notes))


def _files_below(folder: Path) -> dict[str, Path]:
    """File name → path, of a folder and its folders."""
    return {path.name: path for path in sorted(folder.glob("*/*")) if path.is_file()}


def _csv_rows(folder: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of the folder's one CSV with these columns."""
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if set(columns) <= set(reader.fieldnames or ()):
                return list(reader)
    raise UserError(f"{folder}: neither test/*.tar nor a CSV with columns {', '.join(columns)}")


def _list(text: str, folder: Path) -> list[str]:
    """A cell that holds a list, in JSON or as Python prints it."""
    try:
        try:
            value = json.loads(text)
        except ValueError:
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{folder}: '{text[:60]}' in its CSV is no list of texts")
    return value


def _jsonl(path: Path) -> list[dict]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        for row in rows:
            if not isinstance(row["cue"], str) or not all(
                isinstance(name, str) for key in ("candidates", "associations") for name in row[key]
            ):
                raise ValueError("a row without cue, candidates and associations")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return rows
