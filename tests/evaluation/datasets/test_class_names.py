"""Class names: files of them, synsets, numbers before names."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttempnet.evaluation.datasets.class_names import imagenet_names, names_of
from tests.evaluation.datasets.folders import loaded, put


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
