"""A contact sheet shows what was drawn, wraps captions to a width, and says what it cannot show."""

import base64
import html
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from disttempnet.cli.main import main
from disttempnet.data import open_index
from disttempnet.data.tools.preview import draw_samples
from disttempnet.data.tools.sheet import THUMBNAIL, FontStack
from tests.data.conftest import sample, write_shard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five samples: a plain one, one with markup, one in a script that DejaVu lacks, a wide one, a broken one."""
    shards = tmp_path / "shards"
    shards.mkdir()
    wide = io.BytesIO()
    Image.new("RGB", (900, 90), "red").save(wide, "JPEG")
    members = {f"{n:09d}": sample(n) for n in range(5)}
    members["000000001"]["txt"] = b"a <b>bold</b> & brave caption"
    members["000000002"]["txt"] = "\U00012000 cuneiform".encode()
    members["000000003"] = {"jpg": wide.getvalue(), "txt": b"a wide one"}
    members["000000004"]["png"] = b"<html>not found</html>"
    write_shard(shards / "0.tar", members)
    return shards


def test_draws_the_same_usable_samples_by_seed() -> None:
    index = open_index("embedded:emoji/val", progress=False)
    first = list(draw_samples(index, 6, seed=1))
    again, other = list(draw_samples(index, 6, seed=1)), list(draw_samples(index, 6, seed=2))
    assert [tile.titles for tile in first] == [tile.titles for tile in again]
    assert [tile.titles for tile in first] != [tile.titles for tile in other]
    ids = [int(tile.titles[0].split(" ")[0]) for tile in first]
    assert ids == sorted(set(ids))
    for tile, number in zip(first, ids, strict=True):
        assert tile.captions == index.captions(number)
        assert tile.titles[1] == index.name(number)


def test_a_sheet_is_a_picture_with_all_pictures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "new" / "sheet.png"
    assert main(["data", "preview", str(folder), "--out", str(out), "--count", "99"]) == 0
    said = capsys.readouterr().out
    assert "no font here has 1 of the characters (\U00012000)" in said
    sheet = np.asarray(Image.open(out).convert("RGB")).astype(int)
    red = (sheet[..., 0] > 240) & (sheet[..., 1:].max(-1) < 15)
    assert red.any(axis=0).sum() == THUMBNAIL  # the wide picture fills the width of its tile
    assert abs(red.any(axis=1).sum() - THUMBNAIL / 10) <= 1


def test_a_page_holds_everything_and_escapes_captions(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheet.html"
    assert main(["data", "preview", str(folder), "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    sizes = [Image.open(io.BytesIO(base64.b64decode(picture))).size for picture in pictures]
    assert sizes == [(27, 21)] * 3 + [(THUMBNAIL, 21)]  # 9×7 enlarged three times; 900×90; none for the broken one
    assert "<b>" not in page
    assert "a <b>bold</b> & brave caption" in html.unescape(page)
    assert "\U00012000 cuneiform" in page
    assert "cannot identify image" in page
    assert "0.tar:000000004" in page


def test_captions_wrap_to_the_width() -> None:
    lettering = FontStack()
    text = "Some words of a caption, and averyveryverylongwordwithoutanyspaceinit " * 9
    lines = lettering.wrap(text, 150, 100)
    assert max(lettering.width(line) for line in lines) <= 150
    assert "".join("".join(lines).split()) == "".join(text.split())
    cut = lettering.wrap(text, 150, 3)
    assert len(cut) == 3
    assert cut[:2] == lines[:2]
    assert cut[2].endswith("…")
    assert lettering.width(cut[2]) <= 150
    assert lettering.wrap("two\nlines\u2028and\ttabs", 1000, 5) == ["two lines and tabs"]
    assert lettering.wrap("", 100, 2) == [""]
    marked = "e\u0301" * 200
    assert all(line.startswith("e") for line in lettering.wrap(marked, 100, 99)), "a mark stays with its letter"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "sheet.gif"], "sheet.gif: a preview is a .png or an .html file"),
        (["--count", "0"], "--count: must be a whole number from 1 to 1,000,000,000 (got 0)"),
        (["--out", "/proc/nowhere/sheet.png"], "cannot be written"),
    ],
)
def test_refusals(folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["data", "preview", str(folder), *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
