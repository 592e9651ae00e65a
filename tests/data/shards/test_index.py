"""The index gives every sample one id for ever, reads it back, and names every fault of the shards."""

import io
import json
import os
import pickle
import re
import resource
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from disttempnet import distributed
from disttempnet.data import (
    ShardIndex,
    embedded_shards,
    open_index,
    resolve_shards,
)
from disttempnet.data.images import UnreadableImage
from disttempnet.data.shards import index as index_module
from disttempnet.data.shards import open as indexing
from disttempnet.data.shards import scan as scan_module
from disttempnet.data.shards.patterns import expand_braces
from disttempnet.data.source import UnreadableCaption
from disttempnet.distributed import collectives
from disttempnet.errors import UserError
from disttempnet.io import machine
from tests.data.conftest import png, sample, write_shard
from tests.gloo import Pools

Write = Callable[..., Path]


def refusal(spec: object, index_path: str = "") -> str:
    """The one line that opening fails with."""
    with pytest.raises(UserError) as caught:
        open_index(str(spec), index_path, progress=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_resolves_folders_patterns_and_embedded_names(shards: Write) -> None:
    folder = shards(1, 1, 1, 1)
    names = tuple(f"{n:05d}.tar" for n in range(4))
    assert resolve_shards(str(folder)).names == names
    assert resolve_shards(f"{folder}/{{00001..00003}}.tar").names == names[1:]
    assert resolve_shards(f"{folder}/0000{{0..1}}.tar").names == names[:2]
    assert resolve_shards(f"{folder}/000{{00..01}}.tar").names == names[:2]
    assert resolve_shards(f"{folder}/00002.tar").names == names[2:3]
    assert resolve_shards(f"{folder}/{{00003,00001}}.tar").names == (names[3], names[1])
    assert resolve_shards("embedded:emoji/val").names == names[:2]
    assert resolve_shards("embedded:emoji/val").folder == embedded_shards("emoji/val")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{8..011}", ["008", "009", "010", "011"]),
        ("{0..1}/x{a,b}.tar", ["0/xa.tar", "0/xb.tar", "1/xa.tar", "1/xb.tar"]),
        ("a{b,}c", ["abc", "ac"]),
        ("{00..07..3}", ["00", "03", "06"]),
        ("x{8..12..2}", ["x8", "x10", "x12"]),
        ("{a..e..2}{X..Y}", ["aX", "aY", "cX", "cY", "eX", "eY"]),
        ("{a{1..2},b/{x,y{3,4}}}.tar", ["a1.tar", "a2.tar", "b/x.tar", "b/y3.tar", "b/y4.tar"]),
        ("{{a,b},{c,{d,}}}", ["a", "b", "c", "d", ""]),
        ("a,b{c,d},e", ["a,bc,e", "a,bd,e"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern: str, names: list[str]) -> None:
    """The names are what bash 5.2 prints for `echo PATTERN`."""
    assert list(expand_braces(pattern)) == names


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{0..999999999}.tar", r"expands to over 1,000,000 names: narrow its ranges"),
        ("{0..999}{0..999}{0..1}", r"expands to over 1,000,000 names"),
        ("{0..9}" * 5000, r"expands to over 1,000,000 names"),
        ("{" * 60 + "a,b" + "}" * 60, "nested over 50 deep"),
        ("{0..99999999999999999999}", r"is no range and no list of names"),
        ("{0..4..0}", r"the range \{0\.\.4\.\.0\} has step 0"),
        ("{a..3}", r"\{a\.\.3\} is no range and no list"),
        ("{e..a}", "runs backwards"),
        ("{-3..3}", "is no range"),
        ("{}", "is no range"),
        ("{{a,b}}", "is no range"),
        ("a}", "a brace has no partner"),
        ("{a,{b,c}", "a brace has no partner"),
    ],
)
def test_patterns_that_stand_for_nothing_are_refused_before_they_are_built(pattern: str, message: str) -> None:
    begun = time.process_time()
    with pytest.raises(UserError, match=message):
        expand_braces(pattern)
    assert time.process_time() - begun < 0.5


def test_wildcards_and_folders(tmp_path: Path) -> None:
    for name in ("cc3m/00", "cc3m/01", "cc3m/.02", "cc12m/00", "cc12m/10", "cc12m/deep/00", "odd[1]/00", "odd[1]/0*"):
        (tmp_path / f"{name}.tar").parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / f"{name}.tar").touch()
    (tmp_path / "cc3m" / "all.index").touch()
    (tmp_path / "empty").mkdir()
    expected = {
        "cc3m/*.tar": ("cc3m", ["00.tar", "01.tar"]),
        "cc12m/?0.tar": ("cc12m", ["00.tar", "10.tar"]),
        "cc12m/{0,1}*.tar": ("cc12m", ["00.tar", "10.tar"]),
        "cc12m/[1-9]0.tar": ("cc12m", ["10.tar"]),
        "cc*/00.tar": ("", ["cc12m/00.tar", "cc3m/00.tar"]),
        "{cc3m,cc12m}/*.tar": ("", ["cc3m/00.tar", "cc3m/01.tar", "cc12m/00.tar", "cc12m/10.tar"]),
        "{cc3m,cc12m}": ("", ["cc3m/00.tar", "cc3m/01.tar", "cc12m/00.tar", "cc12m/10.tar"]),
        "{cc3m/{00..01},cc12m/10}.tar": ("", ["cc3m/00.tar", "cc3m/01.tar", "cc12m/10.tar"]),
        "cc12m/**/00.tar": ("cc12m", ["00.tar", "deep/00.tar"]),
        "odd[1]/00.tar": ("odd[1]", ["00.tar"]),
        "odd[1]/0*.tar": ("odd[1]", ["0*.tar"]),  # which is there
    }
    labels = set()
    for pattern, (folder, names) in expected.items():
        shards = resolve_shards(f"{tmp_path}/{pattern}")
        assert (shards.folder, [*shards.names]) == (tmp_path / folder, names), pattern
        labels.add((shards.folder, shards.label))
        assert not re.search(r"[][{}*?/]", shards.label)
    assert len(labels) == len(expected), "each has an index of its own"


def test_ranges_in_folders(tmp_path: Path) -> None:
    for folder in ("0", "1"):
        (tmp_path / folder).mkdir()
        for name in ("00.tar", "01.tar"):
            write_shard(tmp_path / folder / name, {"same": sample(int(folder) * 2 + int(name[1]))})
    index = open_index(f"{tmp_path}/{{0..1}}/{{00..01}}.tar", progress=False)
    assert re.fullmatch(r"0\.\.1-00\.\.01-\w{8}\.index", index.path.name)
    assert index.path.parent == tmp_path
    assert [index.name(n) for n in range(4)] == ["0/00.tar:same", "0/01.tar:same", "1/00.tar:same", "1/01.tar:same"]
    assert [index.captions(n) for n in range(4)] == [(f"caption {n}",) for n in range(4)]


def test_every_pattern_has_an_index_of_its_own(tmp_path: Path) -> None:
    patterns = ["{1,2}{3,4}", "{1,23,4}", "{1,2}/{3,4}", "{1,2}-{3,4}", "1-3", "{1..2}", "0{1..2}", "{01..2}"]
    patterns += ["{01..02}", "x{1..2}y", "{x1..2y,a}", "all", "2", "{1..2}0", "{1..20}"]
    for name in {name for pattern in patterns for name in expand_braces(pattern)}:
        (tmp_path / f"{name}.tar").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.tar").touch()
    labels = [resolve_shards(f"{tmp_path}/{pattern}.tar").label for pattern in patterns]
    assert len({*labels, resolve_shards(str(tmp_path)).label}) == len(patterns) + 1
    assert [labels[n] for n in (5, 8, 9, 12)] == ["1..2", "01..02", "x1..2y", "2"]
    assert not [label for label in labels if re.search(r"[{}/]", label)]


def test_names_that_climb_are_names_only(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "shards"
    folder.mkdir(parents=True)
    write_shard(folder / "0.tar", {"../../up": sample(1), "/tmp/../etc/root": sample(2), "a/../b": sample(3)})
    index = open_index(str(folder), progress=False)
    assert [index.name(n) for n in range(3)] == ["0.tar:../../up", "0.tar:/tmp/../etc/root", "0.tar:a/../b"]
    assert [index.captions(n)[0] for n in range(3)] == ["caption 1", "caption 2", "caption 3"]
    assert {path.name for path in tmp_path.rglob("*")} == {"deep", "shards", "0.tar", "all.index"}


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


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", r"nowhere: no such folder; set data\.train"),
        ("nowhere/{0..3}.tar", r"nowhere: no such folder"),
        ("empty", r"empty: no \.tar shards in this folder"),
        ("shards/{00000..00004}.tar", r"00002\.tar: no such shard \(and 2 more\)"),
        ("shards/{00004..00000}.tar", "runs backwards"),
        ("shards/{abc}.tar", "braces hold a range of numbers"),
        ("shards/{0..1.tar", "a brace has no partner"),
        ("shards/{00000,00001,00000}.tar", "names a shard twice"),
        ("shards/{00000,later}.tar", r"later\.tar: no such shard; '\{00000,later\}\.tar' names 2"),
        ("{shards,more}/00000.tar", r"more/00000\.tar: no such shard"),
        ("{shards,empty}", r"empty: no \.tar shards in this folder"),
        ("{shards,gone}", r"gone: no such folder of shards; '\{shards,gone\}' names 2"),
        ("shards/9*.tar", r"9\*\.tar: no such shard"),
        ("shards/{00000..00001}.tar.gz", r"\.tar\.gz: no such folder of shards"),
        ("shards/0.tar.gz", r"0\.tar\.gz: a compressed tar has no random access; unpack it to a \.tar"),
        ("shards/readme", r"readme: not a \.tar or a listing"),
        ("", r"no \.tar shards in this folder; its subfolders have some: write '\S+/shards'"),
        ("{" + "a" * 300 + ",b}", r"no such folder of shards"),
        ("pipe:cat /d/{00..03}.tar", r"commands are not run; name the shards: /d/\{00\.\.03\}\.tar"),
        ("pipe:aws s3 cp s3://b/{0..3}.tar -", r"name the shards: s3://b/\{0\.\.3\}\.tar"),
        ("s3://bucket/*.tar", r"wildcards do not work in a URL; name the folder"),
        ("s3://bucket/{a,b}", r"a URL with braces has to end in \.tar"),
        ("s3://bucket/{a,a}.tar", "names a shard twice"),
        ("embedded:emoji/tests", r"unknown embedded data set 'emoji/tests'.*emoji/train"),
    ],
)
def test_specs_that_name_nothing(shards: Write, tmp_path: Path, spec: str, message: str) -> None:
    shards(1, 1)
    (tmp_path / "empty").mkdir()
    for name in ("0.tar.gz", "readme"):
        (tmp_path / "shards" / name).touch()
    with pytest.raises(UserError, match=message):
        resolve_shards(spec if ":" in spec else str(tmp_path / spec))


def test_reads_back_what_tarfile_reads() -> None:
    index = open_index("embedded:emoji/val", progress=False)
    sizes, number = 0, 0
    for name in ("00000.tar", "00001.tar"):
        with tarfile.open(index.folder / name) as shard:
            contents = [(member.name, shard.extractfile(member).read()) for member in shard]  # type: ignore[union-attr]
        for (image_name, image), (_, caption), (_, text) in zip(*[iter(contents)] * 3, strict=True):
            assert index.image_bytes(number) == image
            assert index.captions(number)[0] == caption.decode()
            assert index.metadata(number) == json.loads(text)
            assert index.name(number) == f"{name}:{image_name.removesuffix('.webp')}"
            sizes, number = sizes + len(image), number + 1
    assert number == len(index) == 1172
    assert sizes == int(index.spans[:, 0, 1].sum())
    assert (index.status == 0).all()
    assert index.problems() == ""


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
        link = _entry("folder/" * 30 + "link.png", tarfile.SYMTYPE)
        link.linkname = "target/" * 30
        for entry in (_member("a.png"), _member("a.txt"), (link, None), _member("b.png"), _member("b.txt")):
            shard.addfile(*entry)
    index = open_index(str(tmp_path), progress=False)
    assert index.problems() == ""
    assert [index.captions(n) for n in range(len(index))] == [("a.txt",), ("b.txt",)]


def test_a_sample_is_a_run_of_members_of_one_key(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        shard.addfile(_entry("folder", tarfile.DIRTYPE))
    first = {"a": {"txt": b"x", "seg.png": png(1), "JPG": png(2)}, "b": sample(7)}
    write_shard(tmp_path / "1.tar", first)
    with tarfile.open(tmp_path / "2.tar", "w") as shard:  # the same key twice in a row, folders between
        for name in ("c.txt", "folder", "c.png", "c.txt", "c.png", "d", ".hidden"):
            shard.addfile(*_member(name))
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


def _entry(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    return info


def _member(name: str) -> tuple[tarfile.TarInfo, object]:
    info = _entry(name, tarfile.DIRTYPE if name == "folder" else tarfile.REGTYPE)
    info.size = 0 if name == "folder" else len(name)
    return info, io.BytesIO(name.encode())


def test_ids_digest_and_file_are_stable(shards: Write) -> None:
    folder = shards(3, 2)
    first = open_index(str(folder), progress=False)
    content, digest = first.path.read_bytes(), first.digest
    again = open_index(str(folder), progress=False)
    assert again.path.read_bytes() == content  # the second time nothing is written
    assert again.digest == digest
    first.path.unlink()
    assert open_index(str(folder), progress=False).digest == digest
    assert again.first.tolist() == [0, 3, 5]
    assert [again.captions(n)[0] for n in range(5)] == [f"caption {n}" for n in range(5)]
    assert len(content) <= 33 * 5 + 2048
    copy = pickle.loads(pickle.dumps(again))
    assert isinstance(copy, ShardIndex)
    assert copy.digest == digest
    assert copy.captions(4)[0] == "caption 4"


def test_digest_tells_data_sets_apart(shards: Write) -> None:
    folder = shards(3, 2)
    whole = open_index(str(folder), progress=False)
    part = open_index(f"{folder}/{{00000..00000}}.tar", progress=False)
    assert whole.path != part.path
    assert len(part) == 3
    assert whole.digest != part.digest


def test_unusable_samples_keep_their_ids_and_are_named(shards: Write) -> None:
    changes = {
        1: {"txt": b"no image"},
        2: {"png": png(2)},
        3: {"png": png(3), "txt": b" \n"},
        4: {"png": png(4), "txt": b"\xff\xfe"},
        5: {"png": b"", "txt": b"empty image"},
        6: {"png": png(6), "txt": b""},
    }
    index = open_index(str(shards(3, 5, changes=changes)), progress=False)
    assert len(index) == 8
    assert index.usable.tolist() == [0, 7]
    assert index.usable_counts.tolist() == [1, 1]
    assert index.usable_in(1).tolist() == [7]
    assert index.captions(7)[0] == "caption 7"
    problems = index.problems()
    for line in (
        "2 samples left out, no image: 00000.tar:000000001, 00001.tar:000000005",
        "1 samples left out, no caption: 00000.tar:000000002",
        "2 samples left out, empty caption: 00001.tar:000000003, 00001.tar:000000006",
        "1 samples left out, caption is not UTF-8: 00001.tar:000000004",
    ):
        assert line in problems


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


def _rename(folder: Path) -> None:
    (folder / "00001.tar").rename(folder / "00009.tar")


def _cut(folder: Path) -> None:
    os.truncate(folder / "00001.tar", 3000)


def _change(folder: Path) -> None:
    data = bytearray((folder / "00001.tar").read_bytes())
    data[600] ^= 1
    (folder / "00001.tar").write_bytes(data)


def _grow(folder: Path) -> None:
    with (folder / "00001.tar").open("ab") as file:
        file.write(bytes(512))


def _swap(folder: Path) -> None:
    first, second = ((folder / f"0000{n}.tar").read_bytes() for n in range(2))
    (folder / "00000.tar").write_bytes(second)
    (folder / "00001.tar").write_bytes(first)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_rename, r"00009\.tar: this shard was renamed: it was indexed as 00001\.tar\. Rename it back"),
        (lambda folder: (folder / "00001.tar").unlink(), r"00001\.tar: this shard is missing: .*2 samples, ids 3 to 4"),
        (_cut, r"00001\.tar: this shard was cut off: it has 3,000 bytes, indexed were 10,240 bytes and 2 samples"),
        (_change, r"00001\.tar: this shard has other content"),
        (_grow, r"00001\.tar: this shard was changed: it has 10,752 bytes"),
        (_swap, r"00000\.tar: this shard has other content"),
        (lambda folder: write_shard(folder / "00002.tar", {"x": sample(1)}), r"00002\.tar: this shard was not there"),
    ],
    ids=["renamed", "deleted", "cut", "changed", "grown", "swapped", "added"],
)
def test_shards_that_differ_from_the_index(shards: Write, fault: Callable[[Path], object], message: str) -> None:
    folder = shards(3, 2)
    if fault is _swap:
        folder = _same_size(folder)
    open_index(str(folder), progress=False)
    fault(folder)
    text = refusal(folder)
    assert re.search(message, text), text
    assert f"or index again: disttempnet data index {folder} (older" in text
    assert "older checkpoints will not fit" in text


def _same_size(folder: Path) -> Path:
    for n in range(2):
        write_shard(folder / f"0000{n}.tar", {"a": sample(n), "b": sample(n + 5)})
    return folder


def test_a_shard_that_changes_while_it_is_read(shards: Write) -> None:
    folder = shards(3, 2)
    index = open_index(str(folder), progress=False)
    assert index.captions(4) == ("caption 4",)
    os.truncate(folder / "00001.tar", 1000)
    with pytest.raises(UserError, match=r"00001\.tar: ends inside sample 4: .*restore it"):
        index.image_bytes(4)
    (folder / "00000.tar").unlink()
    with pytest.raises(UserError, match=r"00000\.tar: cannot be read: No such file"):
        index.image_bytes(0)


def test_a_name_that_cannot_be_read_is_the_id(shards: Write) -> None:
    """Messages name samples; a header that is damaged by then must not hide what they say."""
    index = open_index(str(shards(3, 2)), progress=False)
    assert index.captions(3) == ("caption 3",)  # now the shard is open
    with (index.folder / "00001.tar").open("r+b") as file:
        file.write(b"x" * 512)
    assert index.name(3) == "00001.tar:sample 3"


@pytest.mark.parametrize("by", ["rewriting", "renaming", "cutting"])
def test_a_shard_that_is_replaced_after_the_start_is_refused(shards: Write, by: str) -> None:
    folder = _same_size(shards(3, 2))
    index = open_index(str(folder), progress=False)
    assert index.captions(2) == ("caption 1",)
    index.close()
    if by == "renaming":
        os.replace(folder / "00000.tar", folder / "00001.tar")
    elif by == "rewriting":
        (folder / "00001.tar").write_bytes((folder / "00000.tar").read_bytes())
    else:
        os.truncate(folder / "00001.tar", 512)
    what = "it has 512 bytes, not 10,240" if by == "cutting" else "its content differs"
    for reader in (index, pickle.loads(pickle.dumps(index))):
        with pytest.raises(UserError, match=rf"00001\.tar: this shard has changed since it was indexed: {what}\. Res"):
            reader.captions(2)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_a_damaged_index_says_how_to_make_it_again(shards: Write, damage: str) -> None:
    folder = shards(3, 2)
    path = open_index(str(folder), progress=False).path
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    content = {"flip": bytes(data), "cut": bytes(data[:-20]), "empty": b"", "other": b'{"index": 1}' * 10}
    path.write_bytes(content[damage])
    assert "all.index: not a usable shard index" in refusal(folder)
    path.unlink()
    assert len(open_index(str(folder), progress=False)) == 5


def test_the_index_may_lie_elsewhere(shards: Write, tmp_path: Path) -> None:
    folder = shards(3, 2)
    path = tmp_path / "new" / "shards.index"
    assert open_index(str(folder), str(path), progress=False).path == path
    assert path.is_file()
    assert [entry.suffix for entry in folder.iterdir()] == [".tar", ".tar"]
    assert "is a folder; name a file" in refusal(folder, str(tmp_path))
    (tmp_path / "file").write_text("")
    message = refusal(folder, str(tmp_path / "file" / "index"))
    assert "the index cannot be written" in message
    assert "name another file" in message


def test_many_shards_need_few_open_files(shards: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disttempnet.data.shards.store.LocalStore.open_files", 3)
    index = open_index(str(shards(*[1] * 8)), progress=False)
    for _ in range(2):
        assert [index.captions(n)[0] for n in range(8)] == [f"caption {n}" for n in range(8)]
        assert len(index._files) == 3
    for number in (-1, 8):
        with pytest.raises(IndexError):
            index.captions(number)[0]


def open_on_a_rank(spec: str) -> str:
    try:
        return open_index(spec, progress=False).digest
    except UserError as error:
        return str(error)


def test_ranks_agree(shards: Write, gloo: Pools) -> None:
    folder = shards(3, 2)
    answers = gloo(2, open_on_a_rank, str(folder))
    assert set(answers) == {open_index(str(folder), progress=False).digest}


def open_in_own_cache(spec: str, folder: Path) -> tuple[str, int, str, list[str]]:
    """As on a node whose cache is a disk of its own."""
    cache = folder / str(distributed.rank())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTTEMPNET_CACHE", str(cache))
        patch.setattr(collectives, "PIECE", 1000)  # bytes: several pieces
        index = open_index(spec, progress=False)
        there = sorted(path.name for path in index.path.parent.iterdir())
        return index.digest, index.path.stat().st_size, index.captions(4)[0], there


def test_nodes_without_a_common_disk_share_an_index(shards: Write, tmp_path: Path, gloo: Pools) -> None:
    folder = shards(*[9] * 4)
    spec = f"file://{folder}/{{00000..00003}}.tar"
    first, second = gloo(2, open_in_own_cache, spec, tmp_path)
    assert first[:3] == second[:3]
    assert first[0] == open_index(str(folder), progress=False).digest
    assert first[1] > 2000
    assert second[3] == ["00000..00003.index"], "shards are fetched when they are read"
    again = gloo(2, open_in_own_cache, spec, tmp_path)
    assert [answer[:3] for answer in again] == [first[:3]] * 2


def open_where_a_file_is(spec: str, folder: Path) -> str:
    """On the second rank the cache is no folder."""
    cache = folder / str(distributed.rank())
    if distributed.rank():
        cache.write_text("")
    try:
        return open_index(spec, cache=str(cache), progress=False).digest
    except UserError as error:
        return str(error)


def test_a_rank_that_cannot_keep_the_index_ends_all(shards: Write, tmp_path: Path, gloo: Pools) -> None:
    spec = f"file://{shards(3, 2)}/{{00000..00001}}.tar"
    first, second = gloo(2, open_where_a_file_is, spec, tmp_path)
    assert "/00000..00001.index: the index cannot be written (Not a directory)" in second
    assert first == f"rank 1: {second}"


def open_under_a_limit(spec: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "WHILE_RANKS_WAIT", 15_000)
        return open_on_a_rank(spec)


def test_ranks_do_not_wait_for_a_long_first_scan(shards: Write, gloo: Pools) -> None:
    folder = shards(3, 2)  # of 10,240 bytes each
    first, second = gloo(2, open_under_a_limit, str(folder))
    assert first == (
        f"{folder}: 20.5 kB of shards are not indexed yet, which can take longer than the other ranks wait; "
        f"index them first: disttempnet data index {folder}"
    )
    assert second == f"rank 0: {first}"
    open_index(f"{folder}/{{00000..00000}}.tar", progress=False)
    digests = gloo(2, open_under_a_limit, str(folder))  # what is left to scan is little
    assert set(digests) == {open_index(str(folder), progress=False).digest}


def test_an_index_that_is_gone_says_so(shards: Write) -> None:
    index = open_index(str(shards(3, 2)), progress=False)
    copy = pickle.dumps(index)
    index.path.unlink()
    with pytest.raises(UserError, match=r"all\.index: this index is gone; start again to build it$"):
        pickle.loads(copy)


def test_what_one_rank_finds_wrong_all_ranks_raise(shards: Write, gloo: Pools) -> None:
    folder = shards(3, 2)
    (folder / "00001.tar").write_bytes(b"no tar" * 200)
    answers = gloo(2, open_on_a_rank, str(folder))
    assert "00001.tar: not a readable .tar shard" in answers[0]
    assert answers[1] == f"rank 0: {answers[0]}"


def test_columns_are_small_and_typed(shards: Write) -> None:
    index = open_index(str(shards(2)), progress=False)
    assert (index.start.dtype, index.spans.dtype, index.status.dtype) == (np.int64, np.uint32, np.uint8)
    assert sum(column.nbytes for column in (index.start, index.spans, index.status)) == 33 * 2


def test_shards_that_are_no_regular_files_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.tar")
    assert f"{tmp_path}/0.tar: cannot be read: not a regular file; restore the shard" in refusal(tmp_path)
    (tmp_path / "0.tar").unlink()
    (tmp_path / "0.tar").symlink_to("/dev/zero")
    assert "0.tar: cannot be read: not a regular file" in refusal(tmp_path)


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


def test_a_low_limit_of_open_files_is_named(shards: Write) -> None:
    folder = shards(*[1] * 40)
    index = open_index(str(folder), progress=False)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 4, limits[1]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(machine, "open_files", lambda: used + 4)  # which would raise it again
            patch.setattr(index_module, "open_files", lambda: 1000)
            with pytest.raises(UserError, match=rf"too many open files: this process may open {used + 4}; raise"):
                [index.captions(n) for n in range(40)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    index.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "open_files", lambda: 64)
        few = open_index(str(folder), progress=False)
        assert [few.captions(n)[0] for n in range(40)] == [f"caption {n}" for n in range(40)]
    assert len(few._files) == 16, "a quarter of what is allowed"
