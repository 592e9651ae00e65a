"""The index of a listing: checked at every start, atomic, and rows that cannot be used keep their ids."""

import errno
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from disttempnet.cli.main import main
from disttempnet.data import (
    open_source,
)
from disttempnet.data.listings import readers as rows_module
from disttempnet.data.listings.index import ROW_REASONS
from tests.data.conftest import png
from tests.data.listings.layouts import cc3m, images_and_texts, open_one, refusal, write_images


def test_rows_that_cannot_be_used_keep_their_ids(tmp_path: Path) -> None:
    captions = ["fine", None, "", " \n", 5, ["a", 7], {"a": "b"}, [], ["", " two "], "\ud800"]
    write_images(tmp_path, *(f"{n}.png" for n in range(len(captions))))
    rows: list[Any] = [{"image": f"{n}.png", "caption": caption} for n, caption in enumerate(captions)]
    rows += [{"image": "0.png"}, ["no", "object"], {"caption": "c"}, {"image": 3, "caption": "c"}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    source = open_one(tmp_path / "list.json")
    assert [ROW_REASONS[code] for code in source.status] == [
        *("ok", "no caption", "empty caption", "empty caption", *["caption is not text"] * 3, "empty caption"),
        *("ok", "caption is not UTF-8", "no caption", "fields are not those of the header", "no image"),
        "image is not a path",
    ]
    assert source.captions(8) == ("two",)
    assert source.usable.tolist() == [0, 8]
    assert len(source.problems().splitlines()) == 7


def test_keys_are_named_or_found(tmp_path: Path) -> None:
    write_images(tmp_path, "0.png")
    (tmp_path / "a.csv").write_text("photo,filepath,title,de\n0.png,x,first,erste\n", encoding="utf-8-sig")
    source = open_one(tmp_path / "a.csv", image_key="photo", caption_key="de")
    assert (source.captions(0), source.metadata(0)) == (("erste",), {"filepath": "x", "title": "first"})
    assert "was indexed with caption_key = 'de', not 'title': set caption_key = 'de', or delete" in refusal(
        tmp_path / "a.csv", image_key="photo", caption_key="title"
    )
    other = str(tmp_path / "other.index")
    assert open_one(tmp_path / "a.csv", image_key="photo", index=other).captions(0) == ("first",)
    os.unlink(other)
    assert "no row has 'fr'; its keys are photo, filepath, title, de; name them" in refusal(
        tmp_path / "a.csv", image_key="photo", caption_key="fr", index=other
    )


@pytest.mark.parametrize(
    ("name", "named", "lacks", "flags"),
    [
        ("a.csv", {}, "no row has images (any of image, ", "--image-key picture --caption-key words"),
        (
            "a.csv",
            {"image_key": "picture"},
            "no row has captions (any of caption, ",
            "--image-key picture --caption-key words",
        ),
        (
            "a.csv",
            {"image_key": "x"},
            "no row has 'x' nor captions (any of ",
            "--image-key picture --caption-key words",
        ),
        ("a.csv", {"caption_key": "words"}, "no row has images (any of ", "--image-key picture --caption-key words"),
        ("a.jsonl", {}, " nor captions (any of caption, ", "--image-key pic --caption-key KEY"),
    ],
)
def test_all_that_is_missing_is_said_at_once_with_a_command_that_works(
    name: str, named: dict[str, str], lacks: str, flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my photos").mkdir()
    write_images(tmp_path / "my photos", "0.png")
    (tmp_path / "a.csv").write_text("nr,picture,group,words\n7,0.png,b,a red apple\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"pic": "0.png", "n": 3}\n' * 2, encoding="utf-8")
    said = refusal(tmp_path / name, images=str(tmp_path / "my photos"), **named)
    assert lacks in said
    command = said.partition("as in: disttempnet ")[2].partition(" (in data.train")[0]
    assert command.endswith(flags)
    if "KEY" not in flags.split():
        assert main(shlex.split(command)) == 0
        assert "1, of which 1 usable" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["rows", "start", "first", "status", "about", "header"])
def test_a_flipped_bit_in_the_index_is_found(part: str, tmp_path: Path) -> None:
    config = cc3m(tmp_path, 3)
    path = open_source((config,), progress=False).path
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if part == "header":  # a digit of the digest: the file still opens as a safetensors file
        place = content.index(header["__metadata__"]["digest"].encode())
        content[place] = ord("0") if content[place] != ord("0") else ord("1")
    else:
        begin, end = (8 + length + offset for offset in header[part]["data_offsets"])
        content[(begin + end) // 2] ^= 1
    path.write_bytes(content)
    assert f"{path}: not a usable index of a listing (it is damaged: its sha256" in refusal(
        **config.model_dump(exclude={"weight"})
    )


def test_the_index_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("fsync"), sync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    open_source((cc3m(tmp_path, 2),), progress=False)
    assert done == ["fsync", "replace"]


def test_the_command_indexes_it_and_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = cc3m(tmp_path, 5)
    rows = json.loads(Path(config.path).read_text())
    rows[1]["caption"], rows[3]["caption"] = "", " "
    del rows[4]["image"]
    Path(config.path).write_text(json.dumps(rows))
    command = ["data", "index", config.path, "--images", config.images, "--index", str(tmp_path / "rows.index")]
    for time in range(2):
        assert main(command) == 0
        printed = capsys.readouterr()
        assert ("5 rows" in printed.err) == (time == 0), "the bar ends at all of them"
        text = " ".join(printed.out.replace("│", " ").split())
        for line in (
            "rows 5, of which 2 usable",
            "no image 1 cc3m_train.json:row 5",
            "empty caption 2 cc3m_train.json:cc3m_train/000000001.jpg, cc3m_train.json:cc3m_train/000000003.jpg",
        ):
            assert line in text, text
    assert main([*command, "--checksum"]) == 2
    assert "--checksum is for shards" in capsys.readouterr().err
    assert main(["data", "index", str(images_and_texts(tmp_path, 2).path)]) == 0
    assert (tmp_path / "pairs.index").is_file()
    assert "rows 2, of which 2 usable" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_a_changed_listing_is_refused(tmp_path: Path) -> None:
    config = cc3m(tmp_path, 3)
    listing = Path(config.path)
    first = open_source((config,), progress=False)
    before = listing.read_bytes()
    os.utime(listing, (1, 1))
    assert open_source((config,), progress=False).digest == first.digest, "a copy has another time, and is the same"
    for changed in (before.replace(b"caption 2", b"caption 7"), before[:-1] + b" ]"):
        listing.write_bytes(changed)
        assert f"{listing}: has changed since it was indexed; restore it, or delete {listing}.index" in refusal(
            **config.model_dump(exclude={"weight"})
        )
    listing.write_bytes(before)
    assert open_source((config,), progress=False).digest == first.digest
    content = first.path.read_bytes()
    for damaged in (content[:-1], b"", content[:100], b"x" * len(content)):
        first.path.write_bytes(damaged)
        assert "not a usable index of a listing" in refusal(**config.model_dump(exclude={"weight"}))


def test_a_changed_folder_is_refused(tmp_path: Path) -> None:
    config = images_and_texts(tmp_path, 4)
    digest, extra = open_one(config.path).digest, tmp_path / "pairs" / "01" / "new.jpg"
    extra.write_bytes(png(9))
    assert "pairs/01: has changed since it was indexed" in refusal(config.path)
    extra.unlink()
    assert open_one(config.path).digest == digest
    (tmp_path / "pairs" / "01" / "new").mkdir()
    assert "pairs/01: has changed since it was indexed" in refusal(config.path)
    (tmp_path / "pairs" / "01").rename(tmp_path / "elsewhere")
    assert "pairs: has changed since it was indexed" in refusal(config.path)


class Interrupted(Exception):
    pass


def test_indexing_leaves_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = cc3m(tmp_path, 5)
    rows = rows_module.TableLayout.rows

    def cut(self: rows_module.TableLayout) -> Iterator:
        for count, row in enumerate(rows(self)):
            if count == 3:
                raise Interrupted
            yield row

    monkeypatch.setattr(rows_module.TableLayout, "rows", cut)
    with pytest.raises(Interrupted):
        open_source((config,), progress=False)
    assert [p.name for p in (tmp_path / "clip_train").iterdir()] == ["cc3m_train.json"]
    monkeypatch.undo()

    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    message = refusal(config.path, images=config.images)
    assert "cc3m_train.json.index: the index cannot be written (No space left on device)" in message
    assert [p.name for p in (tmp_path / "clip_train").iterdir()] == ["cc3m_train.json"]
    monkeypatch.undo()
    assert len(open_source((config,), progress=False)) == 5
