"""A scan of a shard: which members are samples, which of them are usable, and damage."""

import os
import pickle
import tarfile
from pathlib import Path

import pytest

from disttempnet.data import (
    open_index,
)
from disttempnet.data.images import UnreadableImage
from disttempnet.data.shards import index as index_module
from disttempnet.data.shards import scan as scan_module
from disttempnet.data.source import UnreadableCaption
from tests.data.conftest import png, sample, write_shard
from tests.data.shards.refusals import Write, link_entry, member_entry, refusal


def test_captions_under_a_key_of_the_json(tmp_path: Path) -> None:
    facts: list[bytes] = [
        b'{"texts": "one", "number": 0}',
        '{"texts": [" two ", "", "zwei é"]}'.encode(),
        b'{"other": "x"}',
        b'{"texts": null}',
        b'{"texts": []}',
        b'{"texts": ["", " "]}',
        b'{"texts": 7}',
        b'{"texts": ["a", 7]}',
        b'{"texts": "half of one \\ud83d"}',
        b'{"texts": "\xff"}',
        b"{",
        b"[1]",
    ]
    samples = {f"{n:02d}": {"jpg": png(n), "json": data, "txt": b"plain"} for n, data in enumerate(facts)}
    write_shard(tmp_path / "0.tar", samples | {"12": {"jpg": png(12), "txt": b"no json"}})
    index = open_index(str(tmp_path), progress=False, caption_key="texts")
    assert index.usable.tolist() == [0, 1]
    assert [index.captions(0), index.captions(1)] == [("one",), ("two", "zwei é")]
    assert index.left_out(9) == [
        ("no caption", 5, ["0.tar:02", "0.tar:03", "0.tar:04", "0.tar:11", "0.tar:12"]),
        ("empty caption", 1, ["0.tar:05"]),
        ("caption is not UTF-8", 2, ["0.tar:08", "0.tar:09"]),
        ("its .json cannot be read", 1, ["0.tar:10"]),
        ("caption is not a text", 2, ["0.tar:06", "0.tar:07"]),
    ]
    assert pickle.loads(pickle.dumps(index)).captions(1) == ("two", "zwei é")
    plain = open_index(str(tmp_path), progress=False)
    assert plain.captions(1) == ("plain",)
    assert len(plain.usable) == 13
    assert index.path.name == "all.texts.index"  # both can be used at once
    assert index.digest != plain.digest
    assert "indexed with caption key 'texts', not ''" in refusal(tmp_path, str(index.path))


def test_a_sample_is_a_run_of_members_of_one_key(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        shard.addfile(link_entry("folder", tarfile.DIRTYPE))
    first = {"a": {"txt": b"x", "seg.png": png(1), "JPG": png(2)}, "b": sample(7)}
    write_shard(tmp_path / "1.tar", first)
    with tarfile.open(tmp_path / "2.tar", "w") as shard:  # the same key twice in a row, folders between
        for name in ("c.txt", "folder", "c.png", "c.txt", "c.png", "d", ".hidden"):
            shard.addfile(*member_entry(name))
    index = open_index(str(tmp_path), progress=False)
    assert [index.name(n) for n in range(len(index))] == ["1.tar:a", "1.tar:b", "2.tar:c", "2.tar:c"]
    assert index.image_bytes(0) == png(2)
    assert index.metadata(0) is None
    assert index.image_bytes(2) == index.image_bytes(3) == b"c.png"
    assert "0.tar: has no samples" in index.problems()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_names_with_dots_are_samples_too(tmp_path: Path, format: int) -> None:
    """Where the name up to the first dot gives no image and no caption, the last dot divides."""
    keys = ["mr. b 001", "000", "shot_v1.0", "shot_v1.1", "x.y/5.input", "001"]
    write_shard(tmp_path / "0.tar", {key: sample(n) for n, key in enumerate(keys)}, format)
    index = open_index(str(tmp_path), progress=False)
    assert [index.name(n) for n in range(len(index))] == [f"0.tar:{key}" for key in keys]
    assert [index.captions(n)[0] for n in range(6)] == [f"caption {n}" for n in range(6)]
    assert [index.image_bytes(n) for n in range(6)] == [png(n) for n in range(6)]
    assert [index.metadata(n) for n in range(6)] == [{"number": n} for n in range(6)]
    assert index.problems() == ""
    assert index.shards[0].tally["png"][0] == index.shards[0].tally["caption characters"][0] == 6
    assert index.shards[0].tally["image width"] == [6, 54, 9, 9]


@pytest.mark.parametrize("cut", [700, 520, 1540])
def test_a_whole_shard_of_names_with_dots(tmp_path: Path, cut: int) -> None:
    write_shard(tmp_path / "0.tar", {f"{n}.in.put": sample(n) for n in range(40)})
    os.truncate(tmp_path / "0.tar", 512 * 6 * 30 + cut)  # a header and a block for each of three members
    index = open_index(str(tmp_path), progress=False)
    assert index.usable.tolist() == list(range(30))
    assert "1 samples left out, cut off by the end of the shard: 0.tar:30.in.put" in index.problems()


def test_parts_of_another_sample_are_no_samples_and_what_is_lost_is_told(tmp_path: Path) -> None:
    members = {
        "a": {"jpg": png(0), "txt": b"a", "seg.png": png(9), "v2.json": b"{}"},  # as webdataset has it: all of sample a
        "b": {"1.png": png(1), "1.txt": b"b.1", "jpg": png(2), "txt": b"b"},  # b.1 could be one, but b is
        "c": {"v1.png": png(3)},
        "d": {"v1.txt": b"no image"},
        ".e": {"x.png": png(3), "x.txt": b"hidden"},
        "f/._g": {"png": png(3), "txt": b"of macOS"},
        "h": {"tar.gz": b"x", "v1.json": b"{}"},
    }
    write_shard(tmp_path / "0.tar", members)
    index = open_index(str(tmp_path), progress=False)
    assert [index.name(n) for n in range(len(index))] == ["0.tar:a", "0.tar:b"]
    assert [index.image_bytes(n) for n in range(2)] == [png(0), png(2)]
    lost = "0.tar: 4 files with several dots in their names belong to no sample: b.1.png, b.1.txt, c.v1.png, …"
    assert index.problems() == lost
    plain = {key: {"jpg": png(0), "txt": b"a", "seg.png": png(9)} for key in "ab"}
    write_shard(tmp_path / "0.tar", plain)
    index.path.unlink()
    index = open_index(str(tmp_path), progress=False)
    assert (len(index), index.problems()) == (2, "")


@pytest.mark.parametrize(("cut", "usable"), [(512 * 13 + 5, [0, 1]), (512 * 14 + 100, [0, 1]), (512 * 18, [0, 1, 2])])
def test_a_shard_cut_before_indexing_gives_what_is_whole(shards: Write, cut: int, usable: list[int]) -> None:
    """Each sample takes 3 members of a header and one block: sample 2 begins at block 12."""
    folder = shards(4, 2)
    os.truncate(folder / "00000.tar", cut)
    index = open_index(str(folder), progress=False)
    assert index.usable.tolist() == [*usable, len(index) - 2, len(index) - 1]
    assert "00000.tar: " in index.problems()
    assert f"byte {cut:,}" in index.problems()
    if len(usable) == 2:
        assert "1 samples left out, cut off by the end of the shard: 00000.tar:000000002" in index.problems()


def test_a_damaged_header_is_named_and_ends_the_shard(shards: Write) -> None:
    folder = shards(4)
    data = bytearray((folder / "00000.tar").read_bytes())
    data[512 * 12 + 20] ^= 0xFF
    (folder / "00000.tar").write_bytes(data)
    index = open_index(str(folder), progress=False)
    assert index.usable.tolist() == [0, 1]
    assert "00000.tar: no tar header at byte 6,144" in index.problems()


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"<html>" * 1000, b"\x1f\x8b" * 600])
def test_files_that_are_no_tar(shards: Write, content: bytes) -> None:
    folder = shards(1, 1)
    (folder / "00001.tar").write_bytes(content)
    assert "00001.tar: not a readable .tar shard" in refusal(folder)
    assert not list(folder.glob("*.index"))
    write_shard(folder / "00001.tar", {"a": sample(1)})
    assert len(open_index(str(folder), progress=False)) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["00000.tar", "00001.tar", "all.index"]


def test_a_folder_without_a_usable_sample(shards: Write) -> None:
    message = refusal(shards(2, changes={0: {"txt": b"a"}, 1: {"txt": b"b"}}))
    assert "none of its 1 shards has a usable sample: 2 samples left out, no image" in message


def test_members_that_are_too_large_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "MAX_TEXT", 40)
    monkeypatch.setattr(index_module, "MAX_BYTES", 2000)
    write_shard(
        tmp_path / "0.tar",
        {"a": sample(0), "b": {"png": png(1), "txt": b"x" * 41}, "c": {"png": png(2) + bytes(2000), "txt": b"c"}},
    )
    index = open_index(str(tmp_path), progress=False)
    assert index.left_out() == [("its .txt or .json is over 16 MiB", 1, ["0.tar:b"])]
    with pytest.raises(UnreadableImage, match="over 2,000 bytes"):
        index.image_bytes(2)
    monkeypatch.setattr(index_module, "MAX_TEXT", 5)  # of an index of before there was a limit
    with pytest.raises(UnreadableCaption, match="over 5 bytes"):
        index.captions(0)
