"""CIFAR for Python, as published and as people pickle it again."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from disttempnet.errors import UserError
from disttempnet.evaluation.datasets.open import load_task
from disttempnet.evaluation.tasks import find_task
from tests.evaluation.datasets.folders import loaded, scores_of, write_pickle


@pytest.mark.parametrize(
    ("batch", "meta", "labels", "names"),
    [
        ("test_batch", "batches.meta", "labels", "label_names"),
        ("test", "meta", "fine_labels", "fine_label_names"),
    ],
)
def test_cifar_for_python(batch: str, meta: str, labels: str, names: str, tmp_path: Path) -> None:
    rows = np.zeros((3, 3, 32, 32), np.uint8)
    rows[0, 0], rows[1, 2], rows[2, 2] = 255, 255, 255  # planes of red, of blue, of blue
    write_pickle(tmp_path / batch, {b"data": rows.reshape(3, -1), labels.encode(): [0, 1, 0]})
    write_pickle(tmp_path / meta, {names.encode(): [b"red", b"blue"]})
    data = load_task(find_task(f"folder:{tmp_path}"))
    assert data.samples[0].image().getpixel((5, 7)) == (255, 0, 0)
    assert data.class_names == ("red", "blue")
    assert scores_of(tmp_path)["acc1"] == pytest.approx(2 / 3)


class Harm:
    def __reduce__(self) -> tuple:
        return (print, ("harm",))


def test_pickles_that_do_more_than_hold_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_batch").write_bytes(pickle.dumps({"data": Harm()}))
    with pytest.raises(UserError, match=r"test_batch: cannot be read: it holds builtins\.print"):
        load_task(find_task(f"folder:{tmp_path}"))
    assert capsys.readouterr().out == ""


PLANES = np.zeros((3, 3, 32, 32), np.uint8)
PLANES[0, 0], PLANES[1, 2], PLANES[2, 2, :, :16] = 255, 255, 255  # red, blue, half of it blue
ROWS = PLANES.transpose(0, 2, 3, 1)


def write_cifar(
    root: Path, data: Any, labels: Any = (0, 1, 1), protocol: int = 2, names: Any = ("red", "blue")
) -> None:
    root.mkdir(exist_ok=True)
    (root / "test_batch").write_bytes(pickle.dumps({"data": data, "labels": labels}, protocol))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, protocol))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("data", "note"),
    [
        (PLANES.reshape(3, -1), ""),
        (PLANES, ""),
        (ROWS.copy(), ""),
        (np.ascontiguousarray(ROWS).reshape(3, -1), "read as interleaved RGB pixels"),
        (PLANES.reshape(3, -1).astype(np.int64), ""),
        (PLANES.astype(np.float32), ""),
        (PLANES.reshape(3, -1).astype(np.float64) / 255, "pixels from 0 to 1 are multiplied by 255"),
        (PLANES.reshape(3, -1).tolist(), ""),
        (list(PLANES), ""),
    ],
    ids=["published", "nchw", "nhwc", "flat nhwc", "int64", "float", "0 to 1", "lists", "list of arrays"],
)
def test_cifar_pickled_again(data: Any, note: str, protocol: int, tmp_path: Path) -> None:
    write_cifar(tmp_path, data, np.array([0, 1, 1]), protocol, [b"red", b"blue"])
    task = loaded(tmp_path)
    for sample, rows in zip(task.samples, ROWS, strict=True):
        assert np.array_equal(np.asarray(sample.image()), rows)
    assert task.labels == (0, 1, 1)
    assert task.class_names == ("red", "blue")
    assert len(task.notes) == bool(note)
    assert note in "".join(task.notes)


def test_numbers_and_keys_of_other_kinds(tmp_path: Path) -> None:
    content = {b"data": PLANES.reshape(3, -1), b"labels": [np.int64(0), np.float32(1), 1]}
    for protocol in (2, 5):
        write_cifar(tmp_path, None)
        (tmp_path / "test_batch").write_bytes(pickle.dumps(content, protocol))
        assert loaded(tmp_path).labels == (0, 1, 1)


@pytest.mark.parametrize(
    ("data", "labels", "message"),
    [
        (PLANES, [0, 1], r"labels of shape \[2\] for 3 images"),
        (PLANES, np.eye(3), r"labels of shape \[3, 3\] for 3 images"),
        (PLANES, [1, 2, 2], "labels run from 1 to 2, but there are 2 class names: they count from 1; subtract 1"),
        (PLANES, [0, 1, 5], "labels run from 0 to 5, but there are 2 class names"),
        (PLANES, [0, -1, 1], "labels run from -1 to 1"),
        (PLANES, [0, 0.5, 1], "its labels are not integers"),
        (PLANES, ["red", "red", "blue"], "its labels are not integers"),
        (PLANES[:, :1], [0, 1, 1], r"its data is \[3, 1, 32, 32\], not \[n, 3072\]"),
        (PLANES.reshape(3, -1)[:, :3000], [0, 1, 1], r"its data is \[3, 3000\], not \[n, 3072\]"),
        (PLANES.astype(np.float32) / 127.5 - 1, [0, 1, 1], "its pixels run from -1 to 1: not 0 to 255, nor 0 to 1"),
        (PLANES // 255, [0, 1, 1], "its pixels are all 0 or 1: floats from 0 to 1 that were truncated to integers"),
        (np.full((3, 3072), np.nan), [0, 1, 1], "its pixels run from nan to nan"),
        ([[1, 2], [3]], [0, 1], "its images differ in size"),
        ("pixels", [0], "its data is not an array of pixels"),
    ],
)
def test_cifar_that_cannot_be_right(data: Any, labels: Any, message: str, tmp_path: Path) -> None:
    write_cifar(tmp_path, data, labels)
    with pytest.raises(UserError, match=f"test_batch: {message}"):
        loaded(tmp_path)


def test_other_pickles_are_refused_in_a_line(tmp_path: Path) -> None:
    cases: list[tuple[Callable[[], bytes], str]] = [
        (lambda: pickle.dumps([1, 2]), "holds a list, not a dict"),
        (lambda: pickle.dumps({"images": 1}), "no 'data'; it has images"),
        (lambda: b"", "cannot be read"),
        (lambda: pickle.dumps({"data": PLANES})[:-9000], "cannot be read"),
        (lambda: pickle.dumps({"data": Harm()}, 5), r"cannot be read: it holds builtins\.print"),
        (lambda: pickle.dumps({"data": np.load}, 4), r"cannot be read: it holds numpy"),
    ]
    for content, message in cases:
        write_cifar(tmp_path, PLANES)
        (tmp_path / "test_batch").write_bytes(content())
        with pytest.raises(UserError, match=message) as raised:
            loaded(tmp_path)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("names", [5, "red", [], [1, 2], None, np.array([["red", "blue"]]), np.zeros(2)])
def test_cifar_names_that_are_none(names: Any, tmp_path: Path) -> None:
    write_cifar(tmp_path, PLANES)
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    with pytest.raises(UserError, match=r"batches\.meta: its 'label_names' is not a list of class names$"):
        loaded(tmp_path)


@pytest.mark.parametrize("names", [("red", "dark_blue"), [b"red", "dark_blue"], np.array(["red", "dark_blue"])])
def test_cifar_names_in_any_list(names: Any, tmp_path: Path) -> None:
    write_cifar(tmp_path, PLANES)
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    assert loaded(tmp_path).class_names == ("red", "dark blue")
