"""Retrieval and WinoGAViL data: CLIP_benchmark's tars of images and captions, or the published CSV and images.

Both are read as they are; convert.py writes the second as tars.
"""

from __future__ import annotations

import ast
import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path

from disttempnet.data.images import is_image
from disttempnet.errors import UserError
from disttempnet.evaluation.tars import Span, has_tars, image_of, members_of, task_tars
from disttempnet.evaluation.tasks import EvaluationSample, Puzzle, Task, TaskData, sample_of
from disttempnet.io.files import open_regular, read_regular

RAW_PROTOCOLS = (("caption_retrieval",), ("winogavil",))  # of tasks that are published as a CSV and images
WHOLE_FILE = Span(0, -1, None)  # an image that is a file of its own


def captioned_data(task: Task, folder: Path) -> TaskData:
    """Read a retrieval task: CLIP_benchmark's tars of images and captions, or the published CSV and images."""
    broken: list[str] = []
    notes: list[str] = []
    samples = []
    if has_tars(folder):
        shards, notes = task_tars(folder / "test")
        for name, shard, members in members_of(shards, broken):
            image = image_of(members)
            text = (members["txt"].content or b"").decode("utf-8", "replace") if "txt" in members else ""
            if image is None or not text:
                broken.append(f"{name}: no {'image' if image is None else 'caption'}")
                continue
            samples.append(sample_of(name, shard, image, tuple(text.splitlines())))
    else:
        files = _files_below(folder)
        for row in _csv_rows(folder, ("filename", "raw")):
            captions = tuple(_list(row["raw"], folder))
            path = files.get(row["filename"])
            if path is None or not captions:
                broken.append(f"{row['filename']}: no {'such image' if path is None else 'caption'}")
                continue
            samples.append(sample_of(row["filename"], path, WHOLE_FILE, captions))
    return TaskData(task, tuple(samples), broken=tuple(broken), notes=tuple(notes))


def winogavil_data(task: Task, folder: Path) -> TaskData:
    """Read WinoGAViL: a pool of images by name, and puzzles about some of them."""
    broken: list[str] = []
    notes: list[str] = []
    pool: dict[str, EvaluationSample] = {}
    if has_tars(folder):
        shards, notes = task_tars(folder / "test")
        for name, shard, members in members_of(shards, broken):
            if (image := image_of(members)) is not None:
                pool[name.partition("/")[2]] = sample_of(name, shard, image)
        rows = _jsonl(folder / "puzzles.jsonl")
    else:
        rows = [
            {"cue": row["cue"], **{key: _list(row[key], folder) for key in ("candidates", "associations")}}
            for row in _csv_rows(folder, ("cue", "candidates", "associations"))
        ]
        for file, path in _files_below(folder).items():
            pool[Path(file).stem] = sample_of(file, path, WHOLE_FILE)
    used: dict[str, int] = {}
    puzzles = []
    for number, row in enumerate(rows, 1):
        missing = [name for name in row["candidates"] if name not in pool]
        if missing or not set(row["associations"]) & set(row["candidates"]):
            broken.append(f"puzzle {number}: " + (f"no image '{missing[0]}'" if missing else "no associations"))
            continue
        places = tuple(used.setdefault(name, len(used)) for name in row["candidates"])
        puzzles.append(Puzzle(row["cue"], places, tuple(name in row["associations"] for name in row["candidates"])))
    samples = tuple(pool[name] for name in used)
    return TaskData(task, samples, puzzles=tuple(puzzles), broken=tuple(broken), notes=tuple(notes))


def _files_below(folder: Path) -> dict[str, Path]:
    """Return file name → path of all images below a folder, however they were unzipped; of equal names the first."""
    names: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.*")):
        if is_image(path.name) and not path.name.startswith("."):
            names.setdefault(path.name, path)
    return names


def _csv_rows(folder: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read the rows of the folder's one CSV with these columns."""
    for path in sorted(folder.glob("*.csv")):
        try:
            with os.fdopen(open_regular(path), encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file, restval="")
                if set(columns) <= set(reader.fieldnames or ()):
                    return list(reader)
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None
    raise UserError(f"{folder}: neither test/*.tar nor a CSV with columns {', '.join(columns)}")


def _list(text: str, folder: Path) -> list[str]:
    """Parse a cell that holds a list, in JSON or as Python prints it."""
    try:
        try:
            value = json.loads(text)
        except ValueError:
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{folder}: '{text[:60]}' in its CSV is not a list of strings")
    return value


def _jsonl(path: Path) -> list[dict]:
    try:
        rows = [json.loads(line) for line in read_regular(path).decode("utf-8").splitlines() if line.strip()]
        for row in rows:
            if not isinstance(row["cue"], str) or not all(
                isinstance(name, str) for key in ("candidates", "associations") for name in row[key]
            ):
                raise ValueError("a row without cue, candidates and associations")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return rows
