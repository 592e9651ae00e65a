"""Indexes of an earlier version (tests/fixtures/indexes) still open, with the same ids, content and digests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from disttempnet.config import SourceConfig
from disttempnet.data import open_source
from disttempnet.data.shards.index import load_index
from disttempnet.data.source import Source

FIXTURES = Path(__file__).parents[1] / "fixtures" / "indexes"
SHARDS_DIGEST = "af3e0fdf59d3cdd052bf1e3403b7de9b4b88510e57735ed9db672f6b0ef23d36"
LISTING_DIGEST = "cce544dd6c1443db234f40c4820f1d6994cb4c90d6c96078fdfbcbb3c5c80ef1"
JOINED_DIGEST = "5baa59b418ff5e6c9abbc7d724d33e18085352c049809eb8019ba080c0d84623"


@pytest.fixture
def indexed(tmp_path: Path) -> Path:
    """A copy of the data with their indexes, whose times are not those of indexing."""
    return Path(shutil.copytree(FIXTURES, tmp_path / "indexes", copy_function=shutil.copyfile))


def listing(folder: Path, name: str) -> Source:
    return open_source([SourceConfig(path=str(folder / name), images=str(folder / "images"))], progress=False)


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
    """It was made before rows of one image were joined, and stays as it is."""
    before = (indexed / "table.csv.index").read_bytes()
    source = listing(indexed, "table.csv")
    assert source.digest == LISTING_DIGEST
    assert [source.captions(sample) for sample in source.usable.tolist()] == [
        ("a red picture",),
        ("ein blaues Bild mit ü",),
        ("red again",),
    ]
    assert source.reason(3) == "empty caption"
    assert (indexed / "table.csv.index").read_bytes() == before, "opened, not made again"


def test_an_old_index_of_joined_rows_opens(indexed: Path) -> None:
    before = (indexed / "joined.csv.index").read_bytes()
    source = listing(indexed, "joined.csv")
    assert source.digest == JOINED_DIGEST
    names = [source.name(sample) for sample in range(len(source))]
    assert names == ["joined.csv:red.png", "joined.csv:blue.png", "joined.csv:no.png"]
    assert source.captions(0) == ("a red picture", "red again")
    assert source.metadata(1) == {"split": "val"}
    assert source.image_bytes(1) == (indexed / "images" / "blue.png").read_bytes()
    assert source.usable.tolist() == [0, 1]
    assert (indexed / "joined.csv.index").read_bytes() == before, "opened, not made again"


def test_a_new_index_has_the_digest_of_the_old_one(indexed: Path) -> None:
    for name in ("shards/all.index", "joined.csv.index"):
        (indexed / name).unlink()
    source = open_source([SourceConfig(path=str(indexed / "shards"))], progress=False)
    assert source.digest == SHARDS_DIGEST
    new, old = (load_index(path / "shards" / "all.index", path / "shards", verify=True) for path in (indexed, FIXTURES))
    assert [shard.identity for shard in new.shards] == [shard.identity for shard in old.shards]
    assert listing(indexed, "joined.csv").digest == JOINED_DIGEST
