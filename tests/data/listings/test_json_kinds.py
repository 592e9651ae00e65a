"""JSON as COCO, Karpathy, ALBEF, BLIP and pandas write it: the right captions for the images, or the kind named."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from disttempnet.cli.main import main
from disttempnet.config import SourceConfig
from disttempnet.data import open_source
from disttempnet.data.listings import readers as rows_module
from disttempnet.data.listings.open import Listing
from disttempnet.data.shards.scan import json_captions
from disttempnet.data.source import UnreadableCaption
from disttempnet.errors import UserError
from tests.data.conftest import png

COUNT = 6
NAMES = [f"val2014/{n}.png" for n in range(COUNT)]
TEXTS = [[f"first of {n}", f"second of {n}"] for n in range(COUNT)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "val2014").mkdir()
    for n, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(png(n))
    return tmp_path


def opened(path: Path, **settings: Any) -> Listing:
    source = open_source((SourceConfig(path=str(path), **settings),), progress=False)
    assert isinstance(source, Listing)
    return source


def found(source: Listing) -> dict[str, tuple[str, ...]]:
    for n in source.usable.tolist():
        image = source.columns.row(n)[0]
        assert source.image_bytes(n) == png(int(image.rpartition("/")[2].rpartition("\\")[2][:-4]))
    return {source.columns.row(n)[0]: source.captions(n) for n in source.usable.tolist()}


def karpathy(n: int) -> dict[str, Any]:
    sentences = [{"raw": text, "tokens": text.split(), "sentid": n} for text in TEXTS[n]]
    return {"filepath": "val2014", "filename": f"{n}.png", "split": "restval", "sentences": sentences, "cocoid": n}


COCO = {
    "info": {"year": 2014},
    "licenses": [{"id": 1}],
    "images": [{"id": 10 + n, "file_name": f"{n}.png", "license": 1} for n in range(COUNT)],
    "annotations": [
        {"image_id": 10 + n, "id": 2 * n + k, "caption": TEXTS[n][k]} for k in range(2) for n in reversed(range(COUNT))
    ],
}
PAIRS = [{"image": name, "caption": texts} for name, texts in zip(NAMES, TEXTS, strict=True)]
INDEX = [str(n) for n in range(COUNT)]


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"dataset": "coco", "images": [karpathy(n) for n in range(COUNT)]}, "read as Karpathy's splits"),
        ([karpathy(n) for n in range(COUNT)], "read as Karpathy's splits"),
        ([{"image": name, "caption": text} for n, name in enumerate(NAMES) for text in TEXTS[n]], "12 rows, 6 samples"),
        ([{"image": name, "sentences": [{"raw": t} for t in TEXTS[n]]} for n, name in enumerate(NAMES)], ""),
        ([{"image": name, "captions": [{"caption": t} for t in TEXTS[n]]} for n, name in enumerate(NAMES)], ""),
        ({"image": dict(zip(INDEX, NAMES, strict=True)), "caption": dict(zip(INDEX, TEXTS, strict=True))}, "columns"),
        ({"image": NAMES, "caption": TEXTS}, "read as an object of columns"),
        (
            {"columns": ["image", "caption"], "index": INDEX, "data": [*map(list, zip(NAMES, TEXTS, strict=True))]},
            "'spl",
        ),
        ({"schema": {"fields": []}, "data": PAIRS}, "read as the list 'data' of an object"),
        (dict(zip(INDEX, PAIRS, strict=True)), "read as objects by key"),
        (dict(zip(NAMES, TEXTS, strict=True)), "read as captions by image"),
        ({name: {"caption": text, "tags": ""} for name, text in zip(NAMES, TEXTS, strict=True)}, "objects by image"),
        ({"train": PAIRS[:2], "val": PAIRS[2:]}, "read as lists by split: train, val"),
    ],
)
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_known_kinds(document: Any, said: str, chunk: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "READ_CHARACTERS", chunk)
    (folder / "a.json").write_text(json.dumps(document, indent=chunk % 2 or None))
    source = opened(folder / "a.json")
    assert found(source) == {name: tuple(texts) for name, texts in zip(NAMES, TEXTS, strict=True)}
    assert said in " ".join(source.notes())


def test_coco(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images are in a folder beside the file, or one of its name beside its folder; captions in the file's order."""
    path = folder / "captions_val2014.json"
    path.write_text(json.dumps(COCO))
    source = opened(path)
    assert found(source) == {f"{n}.png": tuple(texts) for n, texts in enumerate(TEXTS)}
    assert source.metadata(3) == {"image_id": 13}
    assert source.notes() == ["read as COCO's captions"]
    (folder / "annotations").mkdir()
    other = path.rename(folder / "annotations" / path.name)
    with pytest.raises(UserError, match=f"they are in {folder / 'val2014'}; name the folder of images"):
        opened(other)
    out = ["--workers", "1", "--out", str(folder / "out")]
    assert main(["data", "shard", str(other), "--images", str(folder / "val2014"), "--captions", "lines", *out]) == 0
    assert "1 shards, 6 samples" in capsys.readouterr().out


def test_keys_that_a_kind_does_not_have_are_refused(folder: Path) -> None:
    (folder / "a.json").write_text(json.dumps(COCO))
    with pytest.raises(UserError, match="is read as COCO's captions, which has no image_key; remove 'images'"):
        opened(folder / "a.json", image_key="images")


@pytest.mark.parametrize("name", ["a.csv.gz", "a.xlsx", "a.npz", "a.zip"])
def test_files_of_other_kinds_are_named(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"x")
    with pytest.raises(UserError, match=f"{name}: not a known kind of file; .*name a table or JSON") as caught:
        opened(folder / name)
    assert ("unpack it first" in str(caught.value)) == (name[-3:] in (".gz", "zip"))


def test_what_does_not_belong_together_is_named(folder: Path) -> None:
    images = [*COCO["images"], {"id": 99, "file_name": "99.png"}, "none"]  # type: ignore[misc]
    annotations = [*COCO["annotations"], {"image_id": 5, "caption": "of nothing"}]  # type: ignore[misc]
    (folder / "a.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    assert opened(folder / "a.json").left_out() == [
        ("no image", 1, ["a.json:row 9"]),
        ("no caption", 1, ["a.json:99.png"]),
        ("fields are not those of the header", 1, ["a.json:row 8"]),
    ]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "bbox": []}]},
            "COCO's, without",
        ),
        (
            {"info": 1, "version": "2", "license": "x"},
            "one object with 'info', 'version', 'license', which is not a known kind",
        ),
        ([{"id": 1, "image": "0.png", "conversations": [{"from": "gpt", "value": "x"}]}], "LLaVA's: conversations"),
        ([{"image": "0.png", "question": "what?", "answer": "x"}], "questions and answers, no captions"),
        ([{"image": "0.png", "label": 3}], "labels, no captions: evaluate --tasks folder:PATH"),
        ([{"url": "x", "key": "000", "status": "success", "alt": "c"}], "img2dataset's table of what it has downl"),
        ({"a.jpg": 3, "b.jpg": 4}, "none of its rows can be used .2: caption is not text"),
    ],
)
def test_other_kinds_are_named(document: Any, message: str, folder: Path) -> None:
    (folder / "a.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=message) as caught:
        opened(folder / "a.json")
    assert "\n" not in str(caught.value)
    assert "name one of them" not in str(caught.value)


def test_nulls_among_captions_are_left_out_and_counted(folder: Path) -> None:
    captions: list[Any] = [["a cat", None], [None], "c", [float("nan"), "d", None], None, ["e"]]
    rows = [{"image": name, "caption": caption} for name, caption in zip(NAMES, captions, strict=True)]
    (folder / "a.json").write_text(json.dumps(rows))
    source = opened(folder / "a.json")
    assert list(found(source).values()) == [("a cat",), ("c",), ("d",), ("e",)]
    assert source.notes() == ["4 captions are null: left out"]
    assert [reason for reason, *_ in source.left_out()] == ["no caption", "empty caption"]


def test_nulls_among_the_captions_of_a_shard_are_left_out() -> None:
    assert json_captions(b'{"c": ["a", null, "b"]}', "c") == ("a", "b")
    for content, message in ((b'{"c": [null]}', "empty caption"), (b'{"c": ["a", 3]}', "caption is not a text")):
        with pytest.raises(UnreadableCaption, match=message):
            json_captions(content, "c")


@pytest.mark.parametrize("invisible", ["\ufeff", " \ufeff\n", "\u200b", "\ufeff\u200b \ufeff", "\u2060\u200d"])
def test_a_caption_that_cannot_be_seen_is_none(invisible: str, folder: Path) -> None:
    rows = [{"image": name, "caption": [invisible] if n else [invisible, "seen"]} for n, name in enumerate(NAMES)]
    (folder / "a.json").write_text(json.dumps(rows))
    source = opened(folder / "a.json")
    assert found(source) == {NAMES[0]: ("seen",)}
    assert source.left_out()[0][:2] == ("empty caption", COUNT - 1)
    for n in range(COUNT):
        (folder / f"val2014/{n}.txt").write_text(f"\ufeffwritten by an editor {n}\n" if n else invisible)
    source = opened(folder / "val2014")
    assert [source.captions(n) for n in source.usable.tolist()] == [(f"written by an editor {n}",) for n in range(1, 6)]


@pytest.mark.parametrize("start", ["/export/share/coco/", "/export/share/coco/x/y/", "C:\\data\\", "D:/coco/"])
def test_absolute_paths_of_another_machine(start: str, folder: Path) -> None:
    separator = "\\" if "\\" in start else "/"
    rows = [{"image": start + name.replace("/", separator), "caption": "c"} for name in NAMES]
    (folder / "a.json").write_text(json.dumps(rows))
    for source in (opened(folder / "a.json"), opened(folder / "a.json", images=str(folder))):
        assert len(found(pickle.loads(pickle.dumps(source)))) == COUNT
        assert f"images below {start.replace(chr(92), '/')} are read from {folder}" in source.notes()
    source = opened(folder / "a.json", images=str(folder / "val2014"))
    assert len(found(source)) == COUNT
    assert f"{start.replace(chr(92), '/')}val2014/ are read from" in source.notes()[0]


def test_paths_of_several_other_folders(folder: Path) -> None:
    (folder / "vg").mkdir()
    (folder / "vg" / "9.png").write_bytes(png(9))
    names = [*(f"/export/coco/{name}" for name in NAMES), "/other/vg/9.png", "/other/vg/gone.png"]
    (folder / "a.json").write_text(json.dumps([{"image": name, "caption": "c"} for name in names]))
    source = opened(folder / "a.json")
    assert [source.image_bytes(n) for n in range(COUNT + 1)] == [png(n) for n in (*range(COUNT), 9)]
    assert len(source.notes()) == 2


def test_paths_with_backslashes(folder: Path) -> None:
    names = [name.replace("/", "\\") for name in NAMES]
    (folder / "a.json").write_text(json.dumps([{"image": name, "caption": "c"} for name in names]))
    source = opened(folder / "a.json")
    assert len(found(source)) == COUNT
    assert source.notes() == [f"paths with backslashes are read from {folder}"]
    assert source.images.path("..\\..\\x") == str(folder / "..\\..\\x"), "which does not leave the folder"  # type: ignore[attr-defined]


def test_a_large_object_is_read_and_a_broken_line_is_not_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "MAX_ROW", 500)
    monkeypatch.setattr(rows_module, "READ_CHARACTERS", 100)
    (folder / "a.json").write_text(json.dumps({"images": [karpathy(n) for n in range(COUNT)]}))
    assert len(found(opened(folder / "a.json"))) == COUNT
    lines = '{"image": "x" "caption": "c"}\n' + '{"image": "val2014/0.png", "caption": "c"}\n' * 100_000
    (folder / "a.jsonl").write_text(lines)
    with pytest.raises(UserError, match=r"a\.jsonl: not valid JSON: line 1, column 15"):
        opened(folder / "a.jsonl")
