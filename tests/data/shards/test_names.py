"""Specs of shards: the files that folders, patterns and URLs name, and the message where they name none."""

import re
from pathlib import Path

import pytest

from disttempnet.data import (
    embedded_shards,
    open_index,
    resolve_shards,
)
from disttempnet.data.shards.patterns import expand_braces
from disttempnet.errors import UserError
from tests.data.conftest import sample, write_shard
from tests.data.shards.refusals import Write


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
        ("s3://", "a URL of no place: name the bucket or host"),
        ("s3://{a,b}/0.tar", "a URL of no place"),
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
