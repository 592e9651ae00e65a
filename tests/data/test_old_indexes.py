"""Indexes of an earlier version (tests/fixtures/indexes) still open, with the same ids, content and digests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from disttempnet.config import SourceConfig
from disttempnet.data import open_source
from disttempnet.data.shards.index import load_index

FIXTURES = Path(__file__).parents[1] / "fixtures" / "indexes"
SHARDS_DIGEST = "af3e0fdf59d3cdd052bf1e3403b7de9b4b88510e57735ed9db672f6b0ef23d36"
LISTING_DIGEST = "cce544dd6c1443db234f40c4820f1d6994cb4c90d6c96078fdfbcbb3c5c80ef1"


@pytest.fixture
def indexed(tmp_path: Path) -> Path:
    """A copy of the data with their indexes, whose times are not those of indexing."""
    return Path(shutil.copytree(FIXTURES, tmp_path / "indexes", copy_function=shutil.copyfile))


def test_an_old_index_of_shards_opens(indexed: Path) -> None:
    before = (indexed / "shards" / "all.index").read_bytes()
    source = open_source([SourceConfig(path=str(indexed / "shards"))], progress=False)
    assert source.digest == SHARDS_DIGEST
    assert [source.name(sample) for sample in range(len(source))] == ["00000.tar:a", "00000.tar:b", "00001.tar:c"]
    assert [source.status_of(sample) for sample in range(3)] == [0, 3, 0]
    assert source.captions(2) == ("ein grünes Bild",)
    assert source.metadata(2) == {"n": 3}
    assert source.image_bytes(0).startswith(b"\x89PNG")
    assert (indexed / "shards" / "all.index").read_bytes() == before, "opened, not made again"


def test_an_old_index_of_a_listing_opens(indexed: Path) -> None:
    before = (indexed / "table.csv.index").read_bytes()
    source = open_source(
        [SourceConfig(path=str(indexed / "table.csv"), images=str(indexed / "images"))], progress=False
    )
    assert source.digest == LISTING_DIGEST
    assert [source.name(sample) for sample in range(len(source))] == [
        "table.csv:red.png",
        "table.csv:blue.png",
        "table.csv:no.png",
    ]
    assert source.captions(0) == ("a red picture", "red again")
    assert source.metadata(1) == {"split": "val"}
    assert source.image_bytes(1) == (indexed / "images" / "blue.png").read_bytes()
    assert source.usable.tolist() == [0, 1]
    assert (indexed / "table.csv.index").read_bytes() == before, "opened, not made again"


def test_a_new_index_has_the_digest_of_the_old_one(indexed: Path) -> None:
    for name in ("shards/all.index", "table.csv.index"):
        (indexed / name).unlink()
    source = open_source([SourceConfig(path=str(indexed / "shards"))], progress=False)
    assert source.digest == SHARDS_DIGEST
    new, old = (load_index(path / "shards" / "all.index", path / "shards", verify=True) for path in (indexed, FIXTURES))
    assert new.shards == old.shards
    source = open_source(
        [SourceConfig(path=str(indexed / "table.csv"), images=str(indexed / "images"))], progress=False
    )
    assert source.digest == LISTING_DIGEST
