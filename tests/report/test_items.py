"""Items whose τ is computed: images of a folder, captions of a file. tests/temperature has pairs of a source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from disttempnet.data.images import UnreadableImage
from disttempnet.errors import UserError
from disttempnet.report.items import CaptionFile, ImageFolder


def test_images_of_a_folder_are_sorted_by_path_and_read_by_position(tmp_path: Path) -> None:
    for name, colour in (("b.PNG", "red"), ("a/c.jpg", "blue"), ("z.webp", "green")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), colour).save(tmp_path / name)
    (tmp_path / "no.png").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("left out")
    (tmp_path / "folder.png").mkdir()
    items = ImageFolder(str(tmp_path))
    assert (len(items), items.sides) == (4, ("image",))
    found = items.read(np.array([0, 1, 3, 2]))
    assert [item.key for item in found] == ["a/c.jpg", "b.PNG", "z.webp", "no.png"]
    assert found[1].image().getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(UnreadableImage):
        found[3].image()
    assert [item.id for item in found] == [None] * 4


def test_captions_are_lines_with_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes("one\r\n\r\n  two \u2028 three\n".encode())
    items = CaptionFile(str(tmp_path / "c.txt"))
    assert (len(items), items.sides) == (2, ("text",))
    assert [(item.key, item.captions) for item in items.read([1, 0])] == [("3", ("two \u2028 three",)), ("1", ("one",))]


def test_nothing_to_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none: no such folder of images"):
        ImageFolder(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"no images in it \(jpeg, jpg, png, webp\)"):
        ImageFolder(str(tmp_path))
    (tmp_path / "c.txt").write_text("\n \n")
    with pytest.raises(UserError, match=r"c\.txt: no captions in it"):
        CaptionFile(str(tmp_path / "c.txt"))
    with pytest.raises(UserError, match=r"x\.txt: captions cannot be read: No such file"):
        CaptionFile(str(tmp_path / "x.txt"))
