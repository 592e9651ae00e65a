"""Images of one's own: folders of classes, and CIFAR for Python as published and as pickled again."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from disttempnet.errors import UserError
from disttempnet.evaluation import evaluate
from disttempnet.evaluation.datasets.class_names import imagenet_names, names_of
from disttempnet.evaluation.datasets.open import load_task
from disttempnet.evaluation.tasks import TaskData, find_task
from tests.evaluation.colours import COLOURS
from tests.evaluation.formats import picture
from tests.evaluation.toy import meaning_towers


def loaded(root: Path) -> TaskData:
    return load_task(find_task(f"folder:{root}"))


def class_folders(root: Path) -> Path:
    for name, colours in {"pale_red": ["pink", "red"], "blue": ["blue", "blue and blue and red"]}.items():
        for number, colour in enumerate(colours):
            file = root / name / f"part{number}" / f"{number}.JPG"
            file.parent.mkdir(parents=True)
            file.write_bytes(picture(colour, "jpg"))
    return root


def scores_of(root: Path) -> dict[str, float]:
    return evaluate(meaning_towers(), [f"folder:{root}"], device="cpu")[f"folder:{root}"].metrics


def test_a_folder_a_class(tmp_path: Path) -> None:
    data = load_task(find_task(f"folder:{class_folders(tmp_path)}"))
    assert data.heads == ((("blue", "pale red"), ("a photo of a {c}.",)),)
    assert data.labels == (0, 0, 1, 1)
    assert [sample.key for sample in data.samples][:2] == ["blue/part0/0.JPG", "blue/part1/1.JPG"]
    assert scores_of(tmp_path) == {"acc1": 1.0, "mean_per_class_recall": 1.0}


def test_names_and_templates_of_a_folder(tmp_path: Path) -> None:
    class_folders(tmp_path)
    (tmp_path / "classnames.txt").write_text("red\nblue\n")
    (tmp_path / "templates.txt").write_text("{c}\na {c} thing\n")
    assert scores_of(tmp_path)["acc1"] == 0.0, "the names are turned round"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("classnames.txt", "red\n", "1 names, but 2 classes"),
        ("templates.txt", "thing\n", "'thing' has no {c} for the class name"),
    ],
)
def test_words_that_do_not_fit_a_folder(name: str, text: str, message: str, tmp_path: Path) -> None:
    (class_folders(tmp_path) / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_task(find_task(f"folder:{tmp_path}"))


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_task(find_task(f"folder:{tmp_path / 'x'}"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in folders of classes"):
        load_task(find_task(f"folder:{tmp_path}"))


class PythonTwo(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, as CIFAR's files have them."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_string(self, data: bytes) -> None:
        self.write(b"T" + len(data).to_bytes(4, "little") + data)

    dispatch[bytes] = save_string


def write_pickle(path: Path, content: object) -> None:
    with path.open("wb") as file:
        PythonTwo(file, protocol=2).dump(content)


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


# --- what else lies in such folders -----------------------------------------------------------------------------------


def put(path: Path, colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(colour, "jpg" if path.suffix.lower() in (".jpg", ".jpeg") else "png"))


def test_imagenets_synsets_have_the_names_of_its_labels() -> None:
    names = imagenet_names()
    assert len(names) == 1000
    assert list(names) == sorted(names), "label i is the i-th synset"
    for place, synset, name in (
        (0, "n01440764", "tench"),
        (1, "n01443537", "goldfish"),
        (134, "n02012849", "crane bird"),
        (285, "n02124075", "Egyptian Mau"),
        (517, "n03126707", "construction crane"),
        (999, "n15075141", "toilet paper"),
    ):
        assert (list(names)[place], names[synset]) == (synset, name)


def test_folders_of_synsets_are_named_as_imagenet_names_them(tmp_path: Path) -> None:
    for name in ("n01443537", "n01440764", "n00000001", "n02085620-Chihuahua", "001.Black_footed_Albatross", "7"):
        put(tmp_path / name / "0.JPEG")
    data = loaded(tmp_path)
    assert data.class_names == ("Black footed Albatross", "7", "n00000001", "tench", "goldfish", "Chihuahua")
    assert data.notes == (
        "2 synsets take ImageNet's class names: n01440764 = tench, n01443537 = goldfish",
        "1 synsets are not in ImageNet-1k and make no class names: n00000001: name them in classnames.txt",
        "numbers before class names are removed: 001.Black_footed_Albatross = Black footed Albatross, "
        "n02085620-Chihuahua = Chihuahua",
        "1 classes are named by numbers, which mean nothing to a text tower: 7: name them in classnames.txt",
    )


def test_splits_are_no_classes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("red", "blue"):
            put(tmp_path / split / name / f"{split}.jpg", name)
    (tmp_path / "test" / "all").mkdir(parents=True)  # ImageNet's own: without labels, here without images
    data = loaded(tmp_path)
    assert data.class_names == ("blue", "red")
    assert [sample.key for sample in data.samples] == ["val/blue/val.jpg", "val/red/val.jpg"]
    assert data.notes == ("val/ is evaluated, of the splits test, train, val",)
    put(tmp_path / "other" / "train" / "red" / "0.jpg")
    with pytest.raises(UserError, match=r"holds the splits train, none of them to evaluate on; name one: folder:"):
        loaded(tmp_path / "other")
    for name in ("train", "plane"):
        put(tmp_path / "vehicles" / name / "0.jpg")
    assert loaded(tmp_path / "vehicles").class_names == ("plane", "train"), "a train, not a split"


def test_one_folder_is_no_class(tmp_path: Path) -> None:
    put(tmp_path / "images" / "red" / "0.jpg")
    put(tmp_path / "images" / "blue" / "0.jpg")
    with pytest.raises(UserError, match="all images are in one folder, 'images', and a task needs two classes"):
        loaded(tmp_path)


def test_what_is_left_out_of_a_folder_is_said(tmp_path: Path) -> None:
    for name in ("cat", "dog", ".ipynb_checkpoints", "__MACOSX/cat", "cat/.ipynb_checkpoints"):
        put(tmp_path / name / "0.jpg")
    put(tmp_path / "dog" / "._0.jpg")
    put(tmp_path / "loose.png")
    (tmp_path / "owl").mkdir()
    (tmp_path / "dog" / "0.heic").touch()
    (tmp_path / "cat" / "README").touch()
    (tmp_path / "dog" / "back").symlink_to(tmp_path / "dog")
    data = loaded(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert [sample.key for sample in data.samples] == ["cat/0.jpg", "dog/0.jpg"]
    hidden, empty, outside, others = data.notes
    assert hidden.startswith("left out, hidden: ")
    found = {name.strip() for name in hidden.partition(": ")[2].split(",")}
    assert found == {".ipynb_checkpoints", "__MACOSX", "cat/.ipynb_checkpoints", "dog/._0.jpg"}
    assert empty == "left out, without images: owl"
    assert outside == "left out, in no folder of a class: 1 images (loose.png)"
    assert others == "left out, not images that can be read: 1 .heic, 1 without suffix"


def test_images_of_all_formats_that_are_decoded(tmp_path: Path) -> None:
    suffixes = ("bmp", "gif", "jfif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "TIFF", "webp")
    for suffix in suffixes:
        (tmp_path / "red").mkdir(exist_ok=True)
        image = Image.new("L" if suffix == "pgm" else "RGB", (8, 8), 255 if suffix == "pgm" else COLOURS["red"])
        image.save(tmp_path / "red" / f"0.{suffix}", {"jfif": "JPEG", "pgm": "PPM"}.get(suffix))
    put(tmp_path / "blue" / "0.png", "blue")
    data = loaded(tmp_path)
    assert [sample.key for sample in data.samples if "red" in sample.key] == sorted(f"red/0.{s}" for s in suffixes)
    assert all(sample.image().size in ((8, 8), (12, 10)) for sample in data.samples)
    assert not data.notes


@pytest.mark.parametrize(
    ("content", "names", "notes"),
    [
        ("café\nnaïf\n\n\n".encode("latin-1"), ("café", "naïf"), ("classnames.txt is not UTF-8: read as Latin-1",)),
        ("\ufeffcafé\r\nnaïf\r\n".encode(), ("café", "naïf"), ()),
        ("café\nnaïf".encode("utf-16"), ("café", "naïf"), ()),
        (b"a\nb\nc\n", ("a", "c"), ()),  # of all three folders: the second is without images
        (b"a\n\n\n", ("a", ""), ()),  # a blank name, as CLEVR has one
    ],
)
def test_class_names_as_people_write_them(
    content: bytes, names: tuple[str, ...], notes: tuple[str, ...], tmp_path: Path
) -> None:
    for name in ("x", "z"):
        put(tmp_path / name / "0.jpg")
    (tmp_path / "y").mkdir()
    (tmp_path / "classnames.txt").write_bytes(content)
    data = loaded(tmp_path)
    assert data.class_names == names
    assert data.notes[1:] == notes


def test_an_image_that_is_gone_is_named(tmp_path: Path) -> None:
    for name in ("red", "blue"):
        put(tmp_path / name / "0.jpg", name)
    (tmp_path / "blue" / "1.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(tmp_path / "blue" / "2.jpg")
    (tmp_path / "blue" / "3.jpg").symlink_to("/dev/zero")
    scores = evaluate(meaning_towers(), [f"folder:{tmp_path}"], device="cpu")[f"folder:{tmp_path}"]
    assert (scores.samples, scores.complete) == (2, False)
    assert scores.corrupt == ("blue/1.jpg", "blue/2.jpg", "blue/3.jpg"), "not read without end"


# --- CIFAR pickled again ----------------------------------------------------------------------------------------------

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


def test_digits_inside_class_names_stay() -> None:
    cars = ["Audi_A4_Sedan", "Audi_A6_Sedan", "BMW_3_Series"]
    assert names_of(cars) == (["Audi A4 Sedan", "Audi A6 Sedan", "BMW 3 Series"], [])


def test_numbers_before_names_stay_where_they_tell_classes_apart() -> None:
    names, notes = names_of(["2011_Audi_A4", "2012_Audi_A4", "001.Albatross"])
    assert names == ["2011 Audi A4", "2012 Audi A4", "Albatross"]
    assert notes == ["numbers before class names are removed: 001.Albatross = Albatross"]


def test_equal_class_names_are_told_of() -> None:
    assert names_of(["a_b", "a b", "c"]) == (
        ["a b", "a b", "c"],
        ["classes with equal names, which no prompt can distinguish: 'a b' 2 times"],
    )


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


def test_links_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    class_folders(tmp_path)
    (tmp_path / "green").symlink_to(tmp_path / "gone")
    (tmp_path / "round").symlink_to("round")
    (tmp_path / "blue" / "self").symlink_to("self")
    data = loaded(tmp_path)
    assert data.class_names == ("blue", "pale red")
    assert len(data.samples) == 4
    assert data.notes == ("left out, dead links: green, round, blue/self",)
