"""Features depend on the files behind a source and on the code that computes them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from disttempnet.config import SourceConfig
from disttempnet.data import open_source
from disttempnet.features import cache_key
from disttempnet.models import load_model
from disttempnet.models.trunk import trunk_of
from tests.data.pictures import encoded, gradient


@pytest.fixture
def listing(tmp_path: Path) -> Path:
    """A listing of three images of one file each."""
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(encoded(gradient(40), "PNG"))
    rows = [json.dumps({"image": f"{name}.png", "caption": f"letter {name}"}) for name in ("a", "b", "c")]
    (tmp_path / "list.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    return tmp_path / "list.jsonl"


def states(*paths: Path, side: str = "image") -> list[list[str]]:
    return cache_key.file_states(open_source(tuple(SourceConfig(path=str(path)) for path in paths)), side)


def test_a_replaced_image_has_another_state(listing: Path) -> None:
    before = states(listing)
    assert states(listing) == before
    assert before[0][0] == str(listing.parent)
    path = listing.parent / "b.png"
    stamp = path.stat().st_mtime_ns
    os.utime(path, ns=(stamp, stamp + 1))
    touched = states(listing)
    assert touched != before
    path.write_bytes(path.read_bytes() + b"0")
    os.utime(path, ns=(stamp, stamp + 1))
    assert states(listing) not in (before, touched)
    path.unlink()
    assert states(listing)[0][1] not in (before[0][1], touched[0][1])
    assert states(listing, side="text") == [], "captions are in the index"


def test_parts_of_a_mixture_have_their_own(listing: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "d.png").write_bytes(encoded(gradient(50), "PNG"))
    (other / "d.txt").write_text("letter d", "utf-8")
    assert states(listing, other) == states(listing) + states(other)


def test_facts_name_the_versions(listing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    towers = load_model("demo-vit-32")
    towers.module.requires_grad_(False)
    source, trunk = open_source((SourceConfig(path=str(listing)),)), trunk_of(towers, "image")
    before = cache_key.facts_of(trunk, source, None)
    assert before["versions"].keys() == {"open_clip_torch"}
    assert before["precision"] == "float32"
    assert cache_key.facts_of(trunk, source, torch.bfloat16)["precision"] == "bfloat16"
    monkeypatch.setattr(cache_key, "FEATURES_VERSION", cache_key.FEATURES_VERSION + 1)
    assert cache_key.facts_of(trunk, source, None) != before
