"""Folders of images without captions: what is found, what is left out, and the samples that they make."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from disttempnet.data.folder import FolderScan, PictureFolder, is_picture_folder, open_picture_folder, scan_folder
from disttempnet.data.images import UnreadableImage
from disttempnet.data.source import UnreadableCaption
from disttempnet.errors import UserError


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def test_a_scan_looks_everywhere_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    put(tmp_path, "b.jpg", "a/z.PNG", "a/b/c.gif", "a.b.tiff", "notes.txt", "a/x.txt", "LICENSE", ".dark/x.png")
    put(tmp_path, ".hidden.jpg", "__MACOSX/b.jpg")
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    (tmp_path / "a" / "dead").symlink_to(tmp_path / "nowhere")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    counts: list[int] = []
    seen = scan_folder(tmp_path, counts.append)
    assert sorted(seen.images) == ["a.b.tiff", "a/b/c.gif", "a/z.PNG", "b.jpg", "gone.png"]
    assert sorted(seen.hidden) == [".dark", ".hidden.jpg", "__MACOSX"]
    assert seen.dead == ["a/dead"]
    assert seen.kinds == "2 .txt, 1 without suffix"
    assert sum(counts) == 5
    assert FolderScan().kinds == ""


def test_samples_of_a_folder(tmp_path: Path) -> None:
    put(tmp_path, "b.jpg", "a/z.PNG", "a-1.png", "ä 日本.webp", "notes.txt")
    odd = os.fsencode(tmp_path) + b"/\xff\n.bmp"
    Path(os.fsdecode(odd)).write_bytes(b"odd")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    folder = open_picture_folder(str(tmp_path))
    names = ["a-1.png", "a/z.PNG", "b.jpg", "gone.png", "ä 日本.webp", "\\udcff\\n.bmp"]
    assert [folder.name(sample) for sample in range(len(folder))] == names
    assert folder.usable.tolist() == list(range(6))
    assert folder.first.tolist() == [0, 6]
    assert [folder.image_bytes(sample) for sample in (0, 1, 4, 5)] == [
        b"a-1.png",
        b"a/z.PNG",
        "ä 日本.webp".encode(),
        b"odd",
    ]
    with pytest.raises(UnreadableImage, match=r"No such file or directory: .*gone\.png"):
        folder.image_bytes(3)
    with pytest.raises(UnreadableCaption):
        folder.captions(0)
    assert folder.problems() == "left out, not images that can be read: 1 .txt"
    assert len({*folder.hashes().tolist()}) == 6
    again = pickle.loads(pickle.dumps(folder))
    assert (again.digest, again.name(4)) == (folder.digest, "ä 日本.webp")


def test_the_digest_is_of_the_names(tmp_path: Path) -> None:
    put(tmp_path / "one", "ab.png", "c.png")
    put(tmp_path / "two", "ab.png", "c.png")
    first, same = (open_picture_folder(str(tmp_path / name)).digest for name in ("one", "two"))
    put(tmp_path / "two", "d.png")
    assert first == same != open_picture_folder(str(tmp_path / "two")).digest


def test_groups_hold_a_thousand() -> None:
    folder = PictureFolder("x", [f"{number:04d}.png" for number in range(2001)])
    assert folder.first.tolist() == [0, 1000, 2000, 2001]
    assert folder.usable_counts.tolist() == [1000, 1000, 1]


def test_folders_that_hold_none(tmp_path: Path) -> None:
    put(tmp_path, "a.heic", "b.heic", "notes")
    kinds = "bmp, gif, jfif, jpe, jpeg, jpg, pbm, pgm, png, pnm, ppm, tif, tiff, webp"
    with pytest.raises(UserError) as error:
        open_picture_folder(str(tmp_path))
    left_out = "left out, not images that can be read: 2 .heic, 1 without suffix"
    assert str(error.value) == f"{tmp_path}: no images in it ({kinds}); {left_out}"
    with pytest.raises(UserError, match="nowhere: cannot be read: No such file or directory"):
        open_picture_folder(str(tmp_path / "nowhere"))


def test_shards_and_parquet_are_no_folder_of_pictures(tmp_path: Path) -> None:
    put(tmp_path, "one/a.png", "one/list.csv", "two/a.png", "two/0.tar", "three/a.parquet")
    found = {name: is_picture_folder(str(tmp_path / name)) for name in ("one", "two", "three", "four", "one/a.png")}
    assert found == {"one": True, "two": False, "three": False, "four": False, "one/a.png": False}
