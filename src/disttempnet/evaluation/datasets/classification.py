"""Classification data in the layout that DataComp's and CLIP_benchmark's tools share; open.py shows it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from disttempnet.errors import UserError
from disttempnet.evaluation.datasets.class_names import read_lines, without_trailing_blanks
from disttempnet.evaluation.tars import Span, image_of, members_of, task_tars
from disttempnet.evaluation.tasks import EvaluationSample, Head, Task, TaskData, sample_of

MOST_GROUPS = 1_000_000  # the largest group number sizes a table
FACES = ("race", "gender", "age", "toxic")


def labelled_data(task: Task, folder: Path, compat: str, tars: Path | None = None) -> TaskData:
    """Read a classification task: its tars, class names and templates.

    Args:
        folder: with test/*.tar and the words of the classes.
        tars: folder of the tars of another split; None = the test split.
    """
    heads, about_words = _heads(task, folder, compat)
    faces = task.protocols == ("faces",)
    samples: list[EvaluationSample] = []
    labels: list[int] = []
    rows: list[list[int]] = []
    broken: list[str] = []
    shards, notes = task_tars(folder / "test" if tars is None else tars)
    notes += about_words
    # Each sample's image, label and first columns of metadata; what lacks one is named in `broken`.
    for name, shard, members in members_of(shards, broken):
        image = image_of(members)
        try:
            if image is None:
                raise ValueError("no image")
            label = 0 if faces else _label(members)
            row = _metadata(members, task.metadata)
        except ValueError as error:
            broken.append(f"{name}: {error}")
            continue
        # CLIP_benchmark 1.4 has no class for some labels: never a hit; else names and labels do not belong together
        if label >= len(heads[0].names) and not compat:
            raise UserError(f"{folder}: sample {name}: label {label}, but {len(heads[0].names)} class names")
        samples.append(sample_of(name, shard, image))
        labels.append(label)
        rows.append(row)
    # Other numbers of classes or templates than those published are noted.
    if task.classes and len(heads[0].names) != task.classes:
        notes.append(f"{len(heads[0].names)} class names, the task has {task.classes}")
    if task.prompts and len(heads[0].templates) != task.prompts:
        notes.append(f"{len(heads[0].templates)} templates, the published data has {task.prompts}")
    return TaskData(
        task,
        tuple(samples),
        heads,
        () if faces else tuple(labels),
        metadata=np.array(rows, dtype=np.int64).reshape(len(rows), len(task.metadata)),
        broken=tuple(broken),
        notes=tuple(notes),
    )


def _heads(task: Task, folder: Path, compat: str) -> tuple[tuple[Head, ...], list[str]]:
    """Return classifiers, and notes on the files that they are read from."""
    names, notes = _lines(folder / "classnames.txt", blanks=not compat)
    templates, more = _lines(folder / "zeroshot_classification_templates.txt", blanks=not compat)
    notes += more
    if task.classes and len(names) > task.classes:  # blank lines at the end that are no classes
        names = [*names[: task.classes], *without_trailing_blanks(names[task.classes :])]
    for template in templates:
        if template and "{c}" not in template:
            raise UserError(f"{folder}: template '{template}' has no {{c}} for the class name")
    if task.protocols != ("faces",):
        return (Head(tuple(names), tuple(templates)),), notes
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
    return tuple(Head(tuple(parted[0][kind]), tuple(parted[1][kind])) for kind in FACES), notes


def _lines(path: Path, blanks: bool) -> tuple[list[str], list[str]]:
    """Return stripped lines of a text file, and notes. A blank line is a class name too (CLEVR's fourth), unless
    `blanks` is off."""
    lines, notes = read_lines(path)
    lines = [line for line in lines if line or blanks]
    if not lines:
        raise UserError(f"{path}: is empty")
    return lines, notes


def _label(members: Mapping[str, Span]) -> int:
    text = (members["cls"].content or b"").decode("ascii", "replace").strip() if "cls" in members else ""
    if not text.isdecimal():
        raise ValueError(f"its label is '{text}', not a number" if text else "no label")
    return int(text)


def _metadata(members: Mapping[str, Span], columns: Sequence[str]) -> list[int]:
    """Return the first columns of a sample's .npy, as many as the task has names for."""
    if not columns:
        return []
    if "npy" not in members:
        raise ValueError("no metadata")
    try:
        row = np.load(io.BytesIO(members["npy"].content or b""), allow_pickle=False).reshape(-1)
    except Exception as error:  # NumPy raises all kinds on damaged bytes
        raise ValueError(f"its metadata cannot be read: {' '.join(str(error).split())}") from None
    if len(row) < len(columns):
        raise ValueError(f"metadata of {len(row)} columns, {len(columns)} needed: {', '.join(columns)}")
    if row.dtype.kind not in "biuf":
        raise ValueError(f"its metadata is not a row of numbers but {row.dtype}")
    values = row[: len(columns)].astype(np.float64)
    if not np.isfinite(values).all() or (values < 0).any() or (values > MOST_GROUPS).any():
        raise ValueError(f"metadata is not a row of group numbers: {values.tolist()}")
    return [int(value) for value in values]
