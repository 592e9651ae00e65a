"""Images in folders of classes as a task, `folder:PATH`; or CIFAR as its authors publish it for Python.

PATH/CLASS/…/*.jpg, …         classes in the order of their folders' names, as torchvision has them
PATH/classnames.txt           optional: a name a line, in that order; else the folders' names, of synsets ImageNet's
PATH/templates.txt            optional: a template a line, {c} = the name; else "a photo of a {c}."
PATH/test_batch, …            see cifar.py

Whatever is left out is named: hidden and empty folders, files that are not images.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from disttempnet.data.folder import FolderScan, is_dead_link, is_hidden, scan_folder
from disttempnet.data.images import DECODED_SUFFIXES, is_image
from disttempnet.data.listings.readers import leads_to_folder
from disttempnet.errors import UserError
from disttempnet.evaluation.datasets.cifar import batch_of, read_cifar
from disttempnet.evaluation.datasets.class_names import (
    about_equal,
    first_few,
    names_of,
    read_lines,
    templates_of,
    without_trailing_blanks,
)
from disttempnet.evaluation.tasks import OWN_FOLDER, EvaluationSample, Head, Task, TaskData
from disttempnet.sanitize import one_line

EVALUATED = ("test", "val", "valid", "validation", "dev")  # folders that are splits of a data set, best first
SPLIT_FOLDERS = frozenset({*EVALUATED, "train", "training"})


@dataclass
class ClassFolders:
    """Samples with the number of their class; keys: names of the classes' folders; empty: folders without images."""

    samples: list[EvaluationSample] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def folder_data(task: Task, folder: Path) -> TaskData:
    """Read a folder of classes, or of CIFAR.

    Raises:
        UserError: no classes with images in it, or class names that do not fit.
    """
    if batch_of(folder):
        cifar = read_cifar(folder)
        found = ClassFolders([*cifar.samples], [*cifar.labels], [*cifar.names], notes=[*cifar.notes])
    else:
        try:
            found = _class_folders(folder)
        except OSError as error:
            raise UserError(f"{error.filename or folder}: cannot be read: {error.strerror}") from None
    names, about_names = _class_names(folder, found)
    head = Head(tuple(names), tuple(templates_of(folder / "templates.txt")))
    return TaskData(task, tuple(found.samples), (head,), tuple(found.labels), notes=(*found.notes, *about_names))


def _class_names(folder: Path, found: ClassFolders) -> tuple[list[str], list[str]]:
    """Return class names and notes, from classnames.txt where there is one.

    It has a line a class or, where some folders have no images, a line a folder. A blank line may be a name; surplus
    blank lines at the end are not.
    """
    path = folder / "classnames.txt"
    if not path.is_file():
        return names_of(found.keys)
    lines, notes = read_lines(path)
    for folders in (found.keys, sorted([*found.keys, *found.empty])):
        if len(lines) >= len(folders) and not any(lines[len(folders) :]):
            names = [name for name, key in zip(lines, folders, strict=False) if key in found.keys]
            return names, notes + about_equal(names)
    given = len(without_trailing_blanks(lines))
    raise UserError(f"{path}: {given} names, but {len(found.keys)} classes with images: {first_few(found.keys)}")


def _class_folders(folder: Path) -> ClassFolders:
    top, notes = _split_of(folder)
    found, every = ClassFolders(notes=notes), FolderScan()
    for path in _folders_in(top, every):
        seen = scan_folder(path)
        every.hidden += [str(Path(path.name, name)) for name in seen.hidden]
        every.dead += [str(Path(path.name, name)) for name in seen.dead]
        every.others += seen.others
        if not seen.images:
            found.empty.append(path.name)
            continue
        for file in sorted(path / name for name in seen.images):
            name = one_line(file.relative_to(folder).as_posix())
            found.samples.append(EvaluationSample(name, file, 0, -1, (), "", plain=True))
            found.labels.append(len(found.keys))
        found.keys.append(path.name)
    outside = [file.name for file in top.iterdir() if is_image(file.name, DECODED_SUFFIXES) and os.path.isfile(file)]
    _refuse_no_classes(top, found.keys, outside, every)
    notes += [f"left out, hidden: {first_few(every.hidden)}"] if every.hidden else []
    notes += [f"left out, dead links: {first_few(every.dead)}"] if every.dead else []
    notes += [f"left out, without images: {first_few(found.empty)}"] if found.empty else []
    notes += (
        [f"left out, in no folder of a class: {len(outside):,} images ({first_few(sorted(outside))})"]
        if outside
        else []
    )
    if every.others:
        notes.append(f"left out, not images that can be read: {every.kinds}")
    return found


def _refuse_no_classes(folder: Path, classes: Sequence[str], outside: Sequence[str], seen: FolderScan) -> None:
    if len(classes) > 1:
        return
    there = (
        f"; there are {seen.kinds}"
        if seen.others
        else f"; {len(outside):,} images lie beside each other"
        if outside
        else ""
    )
    if not classes:
        raise UserError(f"{folder}: no images in folders of classes ({', '.join(sorted(DECODED_SUFFIXES))}){there}")
    raise UserError(
        f"{folder}: all images are in one folder, '{classes[0]}', and a task needs two classes: name the folder "
        "whose folders are the classes"
    )


def _split_of(folder: Path) -> tuple[Path, list[str]]:
    """Return the folder that holds the folders of classes, and notes: of splits (train/, val/, test/) the best one."""
    inside = {path.name.lower(): path for path in _folders_in(folder, FolderScan())}
    if not inside or not inside.keys() <= SPLIT_FOLDERS:
        return folder, []
    names = ", ".join(sorted(path.name for path in inside.values()))
    for split in EVALUATED:
        if split in inside and any(scan_folder(path).images for path in _folders_in(inside[split], FolderScan())):
            return inside[split], [f"{inside[split].name}/ is evaluated, of the splits {names}"]
    raise UserError(f"{folder}: holds the splits {names}, none to evaluate on; name one: {OWN_FOLDER}{folder}/…")


def _folders_in(folder: Path, seen: FolderScan) -> list[Path]:
    found = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if not leads_to_folder(entry):
                if is_dead_link(entry):
                    seen.dead.append(entry.name)
            elif is_hidden(entry.name):
                seen.hidden.append(entry.name)
            else:
                found.append(folder / entry.name)
    return found
