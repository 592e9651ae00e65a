"""Readers of layouts: JSON in pieces, folders of images with captions beside them."""

import csv
import io
import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disttempnet.data import (
    UnreadableImage,
)
from disttempnet.data.images import MAX_BYTES
from disttempnet.data.listings import readers as rows_module
from disttempnet.data.listings.index import ROW_REASONS
from disttempnet.data.source import MAX_TEXT
from disttempnet.errors import UserError
from tests.data.conftest import png
from tests.data.listings.layouts import captions, open_one, refusal, write_images


def test_side_car_captions(tmp_path: Path) -> None:
    root = tmp_path / "pairs"
    write_images(root, "a.jpg", "a/b.PNG", "a-c.webp", "d/e/f.jpeg", "d/none.jpg", "d/bad.jpg", ".hidden/g.jpg")
    for name, text in (("a", b"1"), ("a/b", b"2\n3"), ("a-c", b"4"), ("d/e/f", b" "), ("d/bad", b"\xff")):
        (root / f"{name}.txt").write_bytes(text)
    (root / "a.json").write_text('{"caption": "of the json", "id": 8}')
    (root / "a-c.json").write_text("[broken")
    (root / "d" / "back").symlink_to(root)
    source = open_one(root)
    names = [source.name(n) for n in range(len(source))]
    assert names == [
        f"pairs:{name}" for name in ("a-c.webp", "a.jpg", "a/b.PNG", "d/bad.jpg", "d/e/f.jpeg", "d/none.jpg")
    ]
    reasons = [ROW_REASONS[code] for code in source.status]
    assert reasons == ["ok"] * 3 + ["caption is not UTF-8", "empty caption", "no caption"]
    assert [source.captions(n) for n in range(3)] == [("4",), ("1",), ("2\n3",)]
    assert source.metadata(1) == {"id": 8}
    assert source.path == tmp_path / "pairs.index"
    by_json = open_one(root, caption_key="caption", index=str(tmp_path / "other"))
    assert by_json.usable.tolist() == [1]
    assert by_json.captions(1) == ("of the json",)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(captions, min_size=1, max_size=12),
    kind=st.sampled_from([".json", ".jsonl", ".csv"]),
    chunk=st.integers(1, 40),
)
def test_ids_are_rows_and_captions_come_back(rows: list, kind: str, chunk: int) -> None:
    rows = [row if kind != ".csv" or isinstance(row, str) else "".join(row) for row in rows]
    items = [{"image": f"{n}.png", "caption": caption, "n": str(n)} for n, caption in enumerate(rows)]
    expected = [tuple(t.strip() for t in ([c] if isinstance(c, str) else c) if t.strip()) for c in rows]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "READ_CHARACTERS", chunk)
        write_images(Path(folder), *(f"{n}.png" for n in range(len(rows))))
        path = Path(folder, f"list{kind}")
        if kind == ".csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, ["image", "caption", "n"], quoting=csv.QUOTE_ALL)
                writer.writeheader()
                writer.writerows(items)
        else:
            lines = [json.dumps(item, ensure_ascii=n % 2 == 0) for n, item in enumerate(items)]
            content = f"[{' , '.join(lines)}]" if kind == ".json" else "\n".join(lines)
            path.write_bytes(content.encode())
        if not any(expected):
            with pytest.raises(UserError, match="none of its rows can be used"):
                open_one(path)
            return
        source = open_one(path)
        assert [source.metadata(n)["n"] for n in range(len(source))] == [str(n) for n in range(len(rows))]
        assert source.usable.tolist() == [n for n, found in enumerate(expected) if found]
        assert [source.captions(n) for n in source.usable.tolist()] == [found for found in expected if found]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=100)
@given(items=st.lists(json_values, max_size=6), indent=st.sampled_from([None, 0, 2]), chunk=st.integers(1, 9))
def test_a_list_is_read_in_pieces_as_it_is_read_whole(items: list, indent: int | None, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "READ_CHARACTERS", chunk)
        text = io.TextIOWrapper(io.BytesIO(json.dumps(items, indent=indent).encode()), "utf-8")
        assert list(rows_module._JsonItems(text, Path("a.json"))) == items


def test_a_folder_without_captions_says_which_form_they_have(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    write_images(tmp_path / "photos", "7.png")
    with pytest.raises(UserError) as raised:
        open_one(tmp_path / "photos")
    photos, said = tmp_path / "photos", str(raised.value)
    assert f"(1: no caption); captions are files beside the images ({photos}/7.png has its caption in" in str(
        raised.value
    )
    assert f"{photos}/7.txt), fields of a .json" in said
    assert f'data.train=[{{path="captions.csv", images="{photos}"}}]' in said
    (photos / "7.txt").write_text("seven", encoding="utf-8")
    assert open_one(photos).captions(0) == ("seven",)
    with pytest.raises(UserError, match=r"looked for under 'text' in the \.json beside each image"):
        open_one(photos, caption_key="text", index=str(tmp_path / "other.index"))


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    write_images(tmp_path, "0.png")
    os.mkfifo(tmp_path / "1.png")
    with (tmp_path / "2.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    names = ["0.png", "1.png", "2.png", "/dev/zero", "/dev/stdin"]
    (tmp_path / "list.json").write_text(json.dumps([{"image": name, "caption": "c"} for name in names]))
    source = open_one(tmp_path / "list.json")
    assert source.image_bytes(0) == png(0)
    reasons = ["not a regular file", "over 536,870,912 bytes", "not a regular file", "not a regular file"]
    for n, reason in enumerate(reasons, 1):
        with pytest.raises(UnreadableImage, match=reason):
            source.image_bytes(n)


def test_side_cars_that_cannot_be_read_cost_a_row_each(tmp_path: Path) -> None:
    root = tmp_path / "pairs"
    write_images(root, *(f"{n}.png" for n in range(6)))
    for n in range(6):
        (root / f"{n}.txt").write_text(f"{n}")
    for n in range(1, 5):
        (root / f"{n}.txt").unlink()
    (root / "1.txt").symlink_to("/gone.txt")
    os.mkfifo(root / "2.txt")
    (root / "3.txt").symlink_to("3.txt")
    with (root / "4.txt").open("wb") as file:
        file.truncate(MAX_TEXT + 1)
    (root / "5.json").symlink_to("/gone.json")
    (root / "6.png").symlink_to("/gone.png")
    (root / "6.txt").write_text("6")
    source = open_one(root)
    assert source.usable.tolist() == [0, 5, 6]
    assert source.left_out() == [("no caption", 4, [f"pairs:{n}.png" for n in range(1, 4)])]
    with pytest.raises(UnreadableImage, match="No such file"):
        source.image_bytes(6)


def test_folders_behind_links(tmp_path: Path) -> None:
    """Parts of a data set on several disks, in a folder of nothing but links; some lead back."""
    for place in ("disk1/a/deep", "disk2/b"):
        write_images(tmp_path / place, "0.png", "1.png")
        for n in range(2):
            (tmp_path / place / f"{n}.txt").write_text(place)
    data = tmp_path / "data"
    data.mkdir()
    (data / "first").symlink_to("../disk1/a")
    (data / "second").symlink_to("../disk2/b")
    (data / "back").symlink_to(data)
    (tmp_path / "disk1" / "a" / "up").symlink_to("../..")
    (data / "nowhere").symlink_to("/gone")
    source = open_one(data)
    names = [source.name(n) for n in range(len(source))]
    assert {f"data:{name}" for name in ("first/deep/0.png", "first/deep/1.png", "second/0.png", "second/1.png")} <= {
        *names
    }
    assert len(source) == len(source.usable)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "round").symlink_to(tmp_path / "links")
    assert "no .tar shards in this folder" in refusal(tmp_path / "links")
