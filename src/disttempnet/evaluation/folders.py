"""Images of one's own as a task, `folder:PATH`: a folder a class, or CIFAR as its authors publish it for Python.

PATH/CLASS/…/*.jpg|jpeg|png|webp      classes in the order of their folders' names, as torchvision has them
PATH/classnames.txt                   optional: a name a line, in that order; else the folders' names, _ as a space
PATH/templates.txt                    optional: a template a line, {c} = the name; else "a photo of a {c}."
PATH/test_batch, batches.meta         cifar-10-batches-py
PATH/test, meta                       cifar-100-python
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from disttempnet.data.shards import IMAGE_SUFFIXES
from disttempnet.errors import UserError
from disttempnet.evaluation.readers import FOLDER, Head, Sample, Task, TaskData

TEMPLATE = "a photo of a {c}."
CIFAR = {"test_batch": ("batches.meta", "labels", "label_names"), "test": ("meta", "fine_labels", "fine_label_names")}
RECONSTRUCT = np.zeros(0).__reduce__()[0]  # numpy.core.multiarray._reconstruct, wherever it lives now
NUMPY = {("multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}  # all that a CIFAR pickle holds


@dataclass(frozen=True)
class Pixels(Sample):
    """A sample whose pixels, uint8 [height, width, 3], are in memory."""

    pixels: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 0, 3), np.uint8), compare=False, repr=False)

    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)


@cache
def folder_data(task: Task) -> TaskData:
    """Read the folder that a `folder:PATH` task names; kept in memory, as training evaluates again and again.

    Raises:
        UserError: no such folder, no images in it, or class names that do not fit.
    """
    folder = Path(task.data.removeprefix(FOLDER)).expanduser()
    if not folder.is_dir():
        raise UserError(f"task '{task.name}': no such folder")
    cifar = next((name for name in CIFAR if (folder / name).is_file()), None)
    samples, labels, names = _cifar(folder, cifar) if cifar else _class_folders(folder)
    given = _lines(folder / "classnames.txt")
    if given and len(given) != len(names):
        raise UserError(f"{folder / 'classnames.txt'}: {len(given)} names, but {len(names)} classes")
    templates = _lines(folder / "templates.txt") or [TEMPLATE]
    for template in templates:
        if "{c}" not in template:
            raise UserError(f"{folder / 'templates.txt'}: '{template}' has no {{c}} for the class name")
    return TaskData(task, tuple(samples), (Head(tuple(given or names), tuple(templates)),), tuple(labels))


def _class_folders(folder: Path) -> tuple[list[Sample], list[int], list[str]]:
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    samples: list[Sample] = []
    labels = []
    for label, path in enumerate(classes):
        for file in sorted(file for file in path.rglob("*") if file.suffix[1:].lower() in IMAGE_SUFFIXES):
            samples.append(Sample(file.relative_to(folder).as_posix(), file, 0, -1, (), "", plain=True))
            labels.append(label)
    if not samples:
        raise UserError(f"{folder}: no images in folders of classes ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return samples, labels, [path.name.replace("_", " ") for path in classes]


def _cifar(folder: Path, batch: str) -> tuple[list[Sample], list[int], list[str]]:
    meta, labels, names = CIFAR[batch]
    data, words = _unpickled(folder / batch), _unpickled(folder / meta)
    try:
        pixels = np.asarray(data["data"], np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        samples: list[Sample] = [
            Pixels(f"{batch}/{i:05d}", folder / batch, 0, 0, (), "", pixels=np.ascontiguousarray(one))
            for i, one in enumerate(pixels)
        ]
        return samples, [int(label) for label in data[labels]], [name.replace("_", " ") for name in words[names]]
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{folder}: not CIFAR for Python: {error}") from None


class _OnlyArrays(pickle.Unpickler):
    """A pickle may call anything; CIFAR's need three names of NumPy."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.rpartition(".")[2], name) not in NUMPY or module.partition(".")[0] != "numpy":
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return RECONSTRUCT if name == "_reconstruct" else getattr(np, name)


def _unpickled(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return _OnlyArrays(file, encoding="latin1").load()
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
