"""Members of a tar: all dialects, long names, links."""

import tarfile
from pathlib import Path

import pytest

from disttempnet.data import (
    open_index,
)
from tests.data.conftest import png, sample, write_shard
from tests.data.shards.refusals import link_entry, member_entry


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("key", ["a.b/0001", "é" * 30, "folder/" + "n" * 40, "y" * 90])
def test_reads_all_tar_dialects(tmp_path: Path, format: int, key: str) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(folder / "0.tar", {key: sample(3), "next": sample(4)}, format)
    index = open_index(str(folder), progress=False)
    assert [index.name(n) for n in range(len(index))] == [f"0.tar:{key}", "0.tar:next"]
    assert [index.captions(n)[0] for n in range(2)] == ["caption 3", "caption 4"]
    assert index.image_bytes(1) == png(4)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_names_longer_than_a_header(tmp_path: Path, format: int) -> None:
    key = "folder/" * 30 + "sample-é"
    write_shard(tmp_path / "0.tar", {key: sample(3), "next": sample(4)}, format)
    index = open_index(str(tmp_path), progress=False)
    assert [index.name(n) for n in range(len(index))] == [f"0.tar:{key}", "0.tar:next"]
    assert index.metadata(0) == {"number": 3}


def test_links_with_long_targets_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT) as shard:
        link = link_entry("folder/" * 30 + "link.png", tarfile.SYMTYPE)
        link.linkname = "target/" * 30
        for entry in (
            member_entry("a.png"),
            member_entry("a.txt"),
            (link, None),
            member_entry("b.png"),
            member_entry("b.txt"),
        ):
            shard.addfile(*entry)
    index = open_index(str(tmp_path), progress=False)
    assert index.problems() == ""
    assert [index.captions(n) for n in range(len(index))] == [("a.txt",), ("b.txt",)]
