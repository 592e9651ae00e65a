"""CIFAR for Python, as its authors publish it and as people pickle it again.

test_batch, batches.meta      cifar-10-batches-py: `data` and `labels`; `label_names`
test, meta                    cifar-100-python: `data` and `fine_labels`; `fine_label_names`

Pixels may be planes (as published) or rows of colours, integers of 0 to 255 or floats of 0 to 1; what they are is
detected and noted. What could be read in two ways, or fits no class, is refused.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from disttempnet.errors import UserError
from disttempnet.evaluation.tasks import EvaluationSample

TEST_BATCHES = {
    "test_batch": ("batches.meta", "labels", "label_names"),
    "test": ("meta", "fine_labels", "fine_label_names"),
}
CIFAR_SIZE = 32
CHANNELS = 3
SMOOTHER = 0.8  # colours side by side are believed where neighbours differ by less than this share of what planes give


@dataclass(frozen=True)
class PixelSample(EvaluationSample):
    """A sample whose pixels, uint8 [height, width, 3], are in memory."""

    pixels: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 0, 3), np.uint8), compare=False, repr=False)

    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)


@dataclass(frozen=True)
class Cifar:
    """A test batch: samples, the class of each, the names of the classes, notes for the reader."""

    samples: tuple[PixelSample, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]
    notes: tuple[str, ...]


def batch_of(folder: Path) -> str:
    """Return the name of a folder's test batch; empty where it has none."""
    return next((name for name in TEST_BATCHES if (folder / name).is_file()), "")


def read_cifar(folder: Path) -> Cifar:
    """Read the test batch of a folder. Raises UserError where it is missing, damaged or not CIFAR."""
    batch = batch_of(folder)
    meta, labels_key, names_key = TEST_BATCHES[batch]
    content = _unpickled(folder / batch)
    names = _names(_value(_unpickled(folder / meta), names_key, folder / meta), names_key, folder / meta)
    pixels, notes = _pixels(_value(content, "data", folder / batch), folder / batch)
    labels = _labels(_value(content, labels_key, folder / batch), len(pixels), names, folder / batch)
    samples = tuple(
        PixelSample(f"{batch}/{i:05d}", folder / batch, 0, 0, (), "", pixels=np.ascontiguousarray(one))
        for i, one in enumerate(pixels)
    )
    return Cifar(samples, tuple(labels), tuple(name.replace("_", " ") for name in names), tuple(notes))


def _value(content: dict[str, Any], key: str, path: Path) -> Any:
    if key not in content:
        raise UserError(f"{path}: not CIFAR for Python: no '{key}'; it has {', '.join(sorted(content)) or 'nothing'}")
    return content[key]


def _names(given: Any, key: str, path: Path) -> list[str]:
    if isinstance(given, np.ndarray) and given.ndim == 1:
        given = given.tolist()
    names = given if isinstance(given, list | tuple) else ()
    if not names or not all(isinstance(name, str | bytes) for name in names):
        raise UserError(f"{path}: its '{key}' is not a list of class names")
    return [_text(name) for name in names]


def _pixels(data: Any, path: Path) -> tuple[NDArray[np.uint8], list[str]]:
    """Return CIFAR's `data`, in any of its forms, as uint8 [n, height, width, 3], and notes."""
    try:
        array = np.asarray(data)
    except ValueError:
        raise UserError(f"{path}: its images differ in size") from None
    if array.dtype.kind not in "iuf" or not array.size:
        raise UserError(f"{path}: its data is not an array of pixels but {array.dtype} {list(array.shape)}")
    array, notes = _bytes_of(array, path)
    if array.ndim == 4 and array.shape[1] == CHANNELS:
        return array.transpose(0, 2, 3, 1), notes
    if array.ndim == 4 and array.shape[3] == CHANNELS:
        return array, notes
    flat = CHANNELS * CIFAR_SIZE * CIFAR_SIZE
    if array.ndim != 2 or array.shape[1] != flat:
        raise UserError(
            f"{path}: its data is {list(array.shape)}, not [n, {flat}], [n, 3, height, width] or [n, height, width, 3]"
        )
    planes = array.reshape(-1, CHANNELS, CIFAR_SIZE, CIFAR_SIZE).transpose(0, 2, 3, 1)
    rows = array.reshape(-1, CIFAR_SIZE, CIFAR_SIZE, CHANNELS)
    if _roughness(rows) < SMOOTHER * _roughness(planes):
        return rows, [*notes, "read as interleaved RGB pixels, not as CIFAR's colour planes"]
    return planes, notes


def _bytes_of(array: NDArray[Any], path: Path) -> tuple[NDArray[np.uint8], list[str]]:
    """Return pixels as bytes, and notes. Raises UserError where their range is neither 0 to 255 nor 0 to 1."""
    low, high = float(array.min()), float(array.max())  # NaN where any is
    if not (low >= 0 and high <= 255):
        raise UserError(f"{path}: its pixels run from {low:g} to {high:g}: not 0 to 255, nor 0 to 1")
    if high > 1 or low == high == 0:
        return np.rint(array).astype(np.uint8), []
    if array.dtype.kind == "f":
        return np.rint(array * 255).astype(np.uint8), ["pixels from 0 to 1 are multiplied by 255"]
    raise UserError(f"{path}: its pixels are all 0 or 1: floats from 0 to 1 that were truncated to integers")


def _roughness(images: NDArray[np.uint8]) -> float:
    """Return the mean difference of neighbouring pixels of the first thousand images [n, height, width, 3]."""
    some = images[:1000].astype(np.float32)
    return float(np.abs(np.diff(some, axis=1)).mean() + np.abs(np.diff(some, axis=2)).mean())


def _labels(given: Any, images: int, names: Sequence[str], path: Path) -> list[int]:
    try:
        labels = np.asarray(given)
    except ValueError:
        labels = np.zeros(0)
    if labels.ndim != 1 or len(labels) != images:
        raise UserError(f"{path}: labels of shape {list(labels.shape)} for {images} images")
    if labels.dtype.kind not in "iuf" or not (labels == np.rint(labels)).all():
        raise UserError(f"{path}: its labels are not integers")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(names):
        what = ": they count from 1; subtract 1" if low == 1 and high == len(names) else ""
        raise UserError(f"{path}: labels run from {low} to {high}, but there are {len(names)} class names{what}")
    return [int(label) for label in labels]


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _latin_1(text: str, encoding: str) -> bytes:
    """Encode text as Latin-1: pickles of bytes in protocol 2 call this."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it encodes as {encoding}")
    return text.encode("latin-1")


# all that pickles of arrays, of their scalars and of bytes need; numpy's functions wherever they live now
_ARRAY = np.zeros(1)
ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "_reconstruct"): _ARRAY.__reduce__()[0],
    ("numpy", "_frombuffer"): _ARRAY.__reduce_ex__(5)[0],
    ("numpy", "scalar"): np.int64(1).__reduce__()[0],
    ("_codecs", "encode"): _latin_1,
}


class _OnlyArrays(pickle.Unpickler):
    """Unpickler that may call nothing but what is in `ALLOWED`."""

    def find_class(self, module: str, name: str) -> Any:
        found = ALLOWED.get((module.partition(".")[0], name))
        if found is None:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return found


def _unpickled(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = _OnlyArrays(file, encoding="latin1").load()
    except MemoryError:
        raise
    except Exception as error:  # damaged pickles raise all kinds
        why = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be read: {why}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not CIFAR for Python: it holds a {type(content).__name__}, not a dict")
    return {_text(key): value for key, value in content.items()}
