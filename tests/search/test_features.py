"""Features of images: their order, what is left out, and that no shard stays in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from disttempnet.config import SourceConfig
from disttempnet.data import decode, eval_transform
from disttempnet.features import store
from disttempnet.models import Towers, encode_images
from disttempnet.search.features import Embedding, embed_images, open_images
from tests.search.conftest import UNREADABLE, readable


def test_unit_features_come_shard_by_shard(towers: Towers, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LEAST_ROWS", 8)
    source = open_images([SourceConfig(path=str(photos))])
    how = Embedding(torch.device("cpu"), batch=5, workers=0, folder=photos.parent / "kept")
    found = embed_images(towers, source, how)
    assert sorted(source.name(sample) for sample in found.unreadable) == UNREADABLE
    assert (len(source), len(found), found.computed) == (48, 45, 48)
    parts = list(found.by_shard())
    assert len(parts) == 6, "shards of eight"
    assert not found.store._open, "none stays mapped"
    ids = np.concatenate([part for part, _ in parts])
    assert ids.tolist() == sorted(set(range(48)) - found.unreadable.keys())
    images = readable(photos)
    assert [source.name(sample) for sample in ids.tolist()] == list(images)
    transform = eval_transform(towers.image_size, towers.resizing)
    with torch.no_grad():
        expected = encode_images(towers, torch.stack([transform(image) for image in images.values()]))
    assert_close(torch.cat([features for _, features in parts]), expected)
    again = embed_images(towers, source, how)
    assert (again.computed, again.store.folder) == (0, found.store.folder)
    assert again.describe() == f"features of 45 images, 0 embedded now: {found.store.folder}"


def test_a_file_that_changes_is_embedded_anew(towers: Towers, here: Path) -> None:
    (here / "one").mkdir()
    how = Embedding(torch.device("cpu"), workers=0)
    folders = []
    for name in ("red.png", "red.png", "blue.png"):
        if not (here / "one" / name).exists():
            Image.new("RGB", (9, 9), name.partition(".")[0]).save(here / "one" / name)
        folders.append(embed_images(towers, open_images([SourceConfig(path="one")]), how).store.folder)
    assert folders[0] == folders[1] != folders[2]
    assert {folder.parent for folder in folders} == {here / "cache" / "features"}
    (here / "one" / "red.png").write_bytes((here / "one" / "blue.png").read_bytes())
    changed = embed_images(towers, open_images([SourceConfig(path="one")]), how)
    assert changed.store.folder not in folders
    [(_, features)] = changed.by_shard()
    assert torch.equal(features[0], features[1])
    assert decode((here / "one" / "red.png").read_bytes()).getpixel((0, 0)) == (0, 0, 255)
