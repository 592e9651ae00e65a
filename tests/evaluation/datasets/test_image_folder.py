"""Folders of classes as tasks: names, splits, and what is left out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from disttempnet.errors import UserError
from disttempnet.evaluation import evaluate
from disttempnet.evaluation.datasets.open import load_task
from disttempnet.evaluation.tasks import find_task
from tests.evaluation.colours import COLOURS
from tests.evaluation.datasets.folders import loaded, put, scores_of
from tests.evaluation.formats import picture
from tests.evaluation.toy import meaning_towers


def class_folders(root: Path) -> Path:
    for name, colours in {"pale_red": ["pink", "red"], "blue": ["blue", "blue and blue and red"]}.items():
        for number, colour in enumerate(colours):
            file = root / name / f"part{number}" / f"{number}.JPG"
            file.parent.mkdir(parents=True)
            file.write_bytes(picture(colour, "jpg"))
    return root


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
    with pytest.raises(UserError, match=r"holds the splits train, none to evaluate on; name one: folder:"):
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


def test_an_image_that_is_gone_is_named(tmp_path: Path) -> None:
    for name in ("red", "blue"):
        put(tmp_path / name / "0.jpg", name)
    (tmp_path / "blue" / "1.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(tmp_path / "blue" / "2.jpg")
    (tmp_path / "blue" / "3.jpg").symlink_to("/dev/zero")
    scores = evaluate(meaning_towers(), [f"folder:{tmp_path}"], device="cpu")[f"folder:{tmp_path}"]
    assert (scores.samples, scores.complete) == (2, False)
    assert scores.corrupt == ("blue/1.jpg", "blue/2.jpg", "blue/3.jpg"), "not read without end"


def test_links_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    class_folders(tmp_path)
    (tmp_path / "green").symlink_to(tmp_path / "gone")
    (tmp_path / "round").symlink_to("round")
    (tmp_path / "blue" / "self").symlink_to("self")
    data = loaded(tmp_path)
    assert data.class_names == ("blue", "pale red")
    assert len(data.samples) == 4
    assert data.notes == ("left out, dead links: green, round, blue/self",)
