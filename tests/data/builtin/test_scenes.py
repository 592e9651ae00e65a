"""Scenes: the same bytes every time, Zipfian in training, balanced in validation, captions that are true."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from disttempnet.data import decode, generated_shards, resolve_shards
from disttempnet.errors import UserError
from disttempnet.evaluation.tasks import read_samples

# what the words of a caption mean; everything else in a caption is grammar
MEANING = {
    **dict.fromkeys(["red", "crimson"], ("colour", "red")),
    **dict.fromkeys(["blue", "azure"], ("colour", "blue")),
    **dict.fromkeys(["yellow", "golden"], ("colour", "yellow")),
    **dict.fromkeys(["green"], ("colour", "green")),
    **dict.fromkeys(["purple", "violet"], ("colour", "purple")),
    **dict.fromkeys(["orange"], ("colour", "orange")),
    **dict.fromkeys(["maroon", "wine"], ("colour", "maroon")),
    **dict.fromkeys(["turquoise", "teal"], ("colour", "turquoise")),
    **dict.fromkeys(["lime"], ("colour", "lime")),
    **dict.fromkeys(["pink", "rosy"], ("colour", "pink")),
    **dict.fromkeys(["plain", "solid"], ("pattern", "plain")),
    **dict.fromkeys(["striped", "stripy"], ("pattern", "striped")),
    **dict.fromkeys(["dotted", "spotted"], ("pattern", "dotted")),
    **dict.fromkeys(["checked", "chequered"], ("pattern", "checked")),
    **dict.fromkeys(["circle", "disc"], ("shape", "circle")),
    **dict.fromkeys(["triangle"], ("shape", "triangle")),
    **dict.fromkeys(["cross", "plus"], ("shape", "cross")),
    **dict.fromkeys(["bar", "beam"], ("shape", "bar")),
    **dict.fromkeys(["ring", "hoop"], ("shape", "ring")),
    **dict.fromkeys(["small", "little"], ("size", "small")),
    **dict.fromkeys(["large", "big"], ("size", "large")),
}
PLACES = {
    "left of": {"left"},
    "right of": {"right"},
    "beside": {"left", "right"},
    "above": {"above"},
    "over": {"above"},
    "below": {"below"},
    "under": {"below"},
}
GRAMMAR = {"a", "an", "picture", "image", "of", "this", "here", "is", "shape", "thing", "figure"}


def facts(split: str) -> list[dict]:
    return [dict(sample.facts) for sample in read_samples(f"generated:scenes/{split}")]


def words(text: str) -> dict[str, str]:
    assert set(text.split()) <= MEANING.keys() | GRAMMAR, text
    meanings = [MEANING[word] for word in text.split() if word in MEANING]
    assert len(dict(meanings)) == len(meanings), text
    return dict(meanings)


def test_two_generations_have_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = generated_shards("scenes/val")
    assert generated_shards("scenes/val") == first
    monkeypatch.setenv("DISTTEMPNET_CACHE", str(tmp_path))
    second = generated_shards("scenes/val")
    assert second != first
    versions = [".".join(version(package).split(".")[:2]) for package in ("numpy", "pillow")]
    assert first.parent.name.endswith("-numpy-{}-pillow-{}".format(*versions))
    names = [path.name for path in sorted(first.iterdir())]
    assert names == [path.name for path in sorted(second.iterdir())] == ["00000.tar", "00001.tar"]
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_training_counts_are_zipfian_and_stated() -> None:
    every = facts("train")
    assert len(every) == 6000
    counts = Counter(row["label"] for row in every)
    sizes = sorted(counts.values(), reverse=True)
    harmonic = sum(1 / rank for rank in range(1, 201))
    assert len(sizes) == 200
    assert all(abs(size - 6000 / harmonic / rank) < 1 for rank, size in enumerate(sizes, 1))
    assert sizes[-1] >= 5
    for row in [*every, *facts("val")]:
        assert row["frequency"] == counts[row["label"]] == sizes[row["concept"]]


def test_validation_is_balanced_and_unlike_training() -> None:
    assert set(Counter(row["label"] for row in facts("val")).values()) == {6}
    assert len(facts("val")) == 1200
    images = {
        split: {sample.image().tobytes() for sample in read_samples(f"generated:scenes/{split}")[:1200]}
        for split in ("train", "val")
    }
    assert len(images["train"]) == len(images["val"]) == 1200
    assert not images["train"] & images["val"]


def test_tail_concepts_are_made_of_parts_of_the_head() -> None:
    rows = {row["concept"]: row for row in facts("val")}
    for part in ("colour", "pattern", "shape"):
        head, tail = ({rows[rank][part] for rank in ranks} for ranks in (range(67), range(134, 200)))
        assert tail <= head


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_caption_is_true_and_as_ambiguous_as_stated(split: str) -> None:
    rows = facts(split)
    concepts = {row["label"]: row for row in rows}
    assert len(concepts) == 200
    parts = ("colour", "pattern", "shape")
    for row in rows:
        assert row["label"] == f"{row['pattern']} {row['colour']} {row['shape']}"
        about, relation, other = (*re.split(f" ({'|'.join(PLACES)}) ", row["caption"]), None, None)[:3]
        about, _, background = about.partition(" on ")
        said = words(about)
        assert all(row[key] == value for key, value in said.items()), row
        assert not background or background == row["background"], row
        if other:
            assert row["relation"] in PLACES[relation], row
            assert set(words(other).values()) <= set(row["other"].split()), row
        assert bool(row["other"]) == bool(row["relation"])
        fits = [one for one in concepts.values() if all(one[key] == said.get(key, one[key]) for key in parts)]
        assert row["ambiguity"] == len(fits) < 200, row
    assert 0.4 < np.mean([row["ambiguity"] == 1 for row in rows]) < 0.8


def test_pictures_show_the_colour_of_a_plain_thing() -> None:
    """The pixel in the middle of plain circles and crosses without a neighbour."""
    rgb = {"red": (215, 40, 40), "blue": (50, 90, 210), "green": (50, 160, 70)}
    seen: dict[str, list] = {colour: [] for colour in rgb}
    for sample in read_samples("generated:scenes/train"):
        row = sample.facts
        lone = row["pattern"] == "plain" and row["shape"] in ("circle", "cross") and row["other"] is None
        if lone and row["colour"] in rgb:
            pixels = np.asarray(sample.image())
            assert pixels.shape == (48, 48, 3)
            seen[row["colour"]].append(pixels[24, 24])
    for colour, pixels in seen.items():
        assert len(pixels) > 20
        assert np.abs(np.mean(pixels, 0) - rgb[colour]).max() < 15


def test_members_are_those_of_the_embedded_shards() -> None:
    shards = resolve_shards("generated:scenes/train")
    assert shards.names == tuple(f"{number:05d}.tar" for number in range(6))
    with tarfile.open(shards.folder / "00000.tar") as tar:
        names = tar.getnames()
        assert names[:3] == ["000000000.png", "000000000.txt", "000000000.json"]
        assert len(names) == 3 * 1000
        image, caption, record = (tar.extractfile(name).read() for name in names[:3])
    assert decode(image).size == Image.open(io.BytesIO(image)).size == (48, 48)
    assert json.loads(record)["caption"] == caption.decode()


@pytest.mark.parametrize("name", ["scenes/tests", "scenes", "emoji/train", ""])
def test_unknown_names_say_what_is_known(name: str) -> None:
    with pytest.raises(UserError, match=r"unknown generated data set .*scenes/train, scenes/val"):
        resolve_shards(f"generated:{name}")
