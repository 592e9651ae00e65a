"""Features depend on the files behind a source and on the code that computes them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from disttempnet.config import SourceConfig
from disttempnet.data import open_source
from disttempnet.data.held_out import HeldOut
from disttempnet.data.source import Source
from disttempnet.features import cache_key
from disttempnet.models import load_model
from disttempnet.models.trunk import Trunk, trunk_of
from tests.data.pictures import encoded, gradient
from tests.gloo import Pools


@pytest.fixture
def listing(tmp_path: Path) -> Path:
    """A listing of three images of one file each."""
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(encoded(gradient(40), "PNG"))
    rows = [json.dumps({"image": f"{name}.png", "caption": f"letter {name}"}) for name in ("a", "b", "c")]
    (tmp_path / "list.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    return tmp_path / "list.jsonl"


def opened(*paths: Path, weights: Sequence[float] = ()) -> Source:
    given = zip(paths, weights or [1.0] * len(paths), strict=True)
    return open_source([SourceConfig(path=str(path), weight=weight) for path, weight in given])


def states(*paths: Path, side: str = "image") -> list[str]:
    return cache_key.file_states(opened(*paths), [side])[side]


def test_a_replaced_image_has_another_state(listing: Path) -> None:
    before = states(listing)
    assert states(listing) == before
    assert len(before) == 1
    path = listing.parent / "b.png"
    stamp = path.stat().st_mtime_ns
    os.utime(path, ns=(stamp, stamp + 1))
    touched = states(listing)
    assert touched != before
    path.write_bytes(path.read_bytes() + b"0")
    os.utime(path, ns=(stamp, stamp + 1))
    assert states(listing) not in (before, touched)
    path.unlink()
    assert states(listing) not in (before, touched)
    assert states(listing, side="text") == [], "captions are in the index"


def test_a_copy_with_its_times_has_the_same_state(listing: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = tmp_path_factory.mktemp("copy") / "data"
    shutil.copytree(listing.parent, copy)  # with times, as `cp -p`
    assert states(copy / listing.name) == states(listing)
    plain = tmp_path_factory.mktemp("plain") / "data"
    shutil.copytree(listing.parent, plain, copy_function=shutil.copyfile)
    assert states(plain / listing.name) != states(listing)


def test_parts_of_a_mixture_have_their_own(listing: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "d.png").write_bytes(encoded(gradient(50), "PNG"))
    (other / "d.txt").write_text("letter d", "utf-8")
    assert states(listing, other) == states(listing) + states(other)


def test_weights_of_a_mixture_are_no_part_of_its_content(listing: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"image": "a.png", "caption": "another"}) + "\n", "utf-8")
    equal, unequal = opened(listing, other), opened(listing, other, weights=(2.0, 0.5))
    assert equal.digest != unequal.digest
    assert cache_key.content_digest(equal) == cache_key.content_digest(unequal)
    assert cache_key.content_digest(opened(other, listing)) != cache_key.content_digest(equal)
    assert cache_key.content_digest(opened(listing, weights=(3.0,))) == opened(listing).digest
    assert cache_key.content_digest(HeldOut(equal, 0.5)) == cache_key.content_digest(equal)


def looked_at(listing: Path, at_once: int, a_round: int) -> tuple[list[str], int]:
    """States of images, and how many files this rank looked at."""
    source, seen = opened(listing), []

    def stat(path: str) -> os.stat_result:
        seen.append(path)
        return os.lstat(path)

    with (
        mock.patch.object(cache_key, "FILES_AT_ONCE", at_once),
        mock.patch.object(cache_key, "BLOCKS_A_ROUND", a_round),
        mock.patch.object(cache_key.os, "stat", stat),
    ):
        return cache_key.file_states(source, ["image"])["image"], len(seen)


def test_ranks_of_a_node_share_the_files(tmp_path: Path, gloo: Pools) -> None:
    (tmp_path / "a.png").write_bytes(encoded(gradient(40), "PNG"))
    for number in range(11):
        shutil.copy(tmp_path / "a.png", tmp_path / f"{number}.png")
        os.utime(tmp_path / f"{number}.png", ns=(number, number))
    rows = [json.dumps({"image": f"{number}.png", "caption": f"letter {number}"}) for number in range(11)]
    (tmp_path / "list.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    alone, seen = looked_at(tmp_path / "list.jsonl", 2, 1)
    assert seen == 11
    both = gloo(2, looked_at, tmp_path / "list.jsonl", 2, 1)  # blocks 01 23, 45 67, 89 10
    assert [state for state, _ in both] == [alone, alone]
    assert [seen for _, seen in both] == [6, 5]
    assert looked_at(tmp_path / "list.jsonl", 2, 64)[0] == alone, "rounds do not matter"


def facts(trunk: Trunk, source: Source, autocast: torch.dtype | None) -> dict[str, Any]:
    return cache_key.facts_of({trunk.side: trunk}, source, autocast)[trunk.side]


def test_facts_name_the_versions(listing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    towers = load_model("demo-vit-32")
    towers.module.requires_grad_(False)
    source, trunk = open_source((SourceConfig(path=str(listing)),)), trunk_of(towers, "image")
    before = facts(trunk, source, None)
    assert before["versions"].keys() == {"open_clip_torch"}
    assert before["precision"] == "float32"
    assert facts(trunk, source, torch.bfloat16)["precision"] == "bfloat16"
    monkeypatch.setattr(cache_key, "FEATURES_VERSION", cache_key.FEATURES_VERSION + 1)
    assert facts(trunk, source, None) != before
