"""Drawing of pictures with captions on one sheet, in any script that a font of this machine covers."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

THUMBNAIL = 208  # pixels of a picture's longer side
GAP, LINE, FONT_SIZE = 12, 17, 13
MAX_LINES = 6  # of a caption; longer ones end in …
MAX_COLUMNS = 8
INK, MUTED, RED, PAPER, CARD = "#1a1a1a", "#707070", "#b3261e", "#ffffff", "#f0f0f0"
MISSING = "\N{REPLACEMENT CHARACTER}"


class PreviewTile(NamedTuple):
    """Picture with title and captions; without `image`, `problem` gives the reason."""

    titles: tuple[str, ...]
    image: Image.Image | None
    captions: tuple[str, ...]
    problem: str = ""


class FontStack:
    """DejaVu Sans, with other fonts of this machine for characters that it lacks.

    Attributes:
        missing: characters that no font has; they are drawn as replacement characters.
    """

    def __init__(self) -> None:
        self.missing: set[str] = set()
        self._chosen: dict[str, str] = {}
        self._main = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))

    @cached_property
    def _others(self) -> list[str]:
        fonts = [font for font in font_manager.fontManager.ttflist if font.style == "normal"]
        fonts.sort(key=lambda font: (font.weight != 400, font.name))
        # a last-resort font claims all characters but draws none
        return [font.fname for font in fonts if "Last Resort" not in font.name]

    def _font_for(self, letter: str) -> str:
        """Return the path of a font with a character; empty if there is none."""
        if letter not in self._chosen:
            found = (path for path in (self._main, *self._others) if _has(path, letter))
            self._chosen[letter] = next(found, "")
        return self._chosen[letter]

    def _runs(self, text: str) -> Iterator[tuple[ImageFont.FreeTypeFont, str]]:
        for path, letters in groupby(text, self._font_for):
            run = "".join(letters)
            if not path:
                self.missing.update(run)
                run = MISSING * len(run)
            yield _load(path or self._main), run

    def width(self, text: str) -> float:
        """Return the width of a line in pixels."""
        return sum(font.getlength(run) for font, run in self._runs(text))

    def draw(self, canvas: ImageDraw.ImageDraw, place: tuple[float, float], text: str, ink: str) -> None:
        """Draw a line of text with its top left corner at `place`."""
        x, y = place
        for font, run in self._runs(text):
            canvas.text((x, y + FONT_SIZE), run, ink, font, anchor="ls")  # on one baseline
            x += font.getlength(run)

    def wrap(self, text: str, width: float, lines: int) -> list[str]:
        """Wrap text to at most `lines` lines of `width` pixels; only words longer than a line are broken."""
        found: list[str] = []
        line = ""
        for word in _words(text):
            if line and self.width((line + word).rstrip()) > width:
                found.append(line.rstrip())
                line, word = "", word.lstrip()
            for part in _clusters(word):
                if line and self.width((line + part).rstrip()) > width:
                    found.append(line.rstrip())
                    line = ""
                line += part
            if len(found) > lines:
                break
        found.append(line.rstrip())
        if len(found) > lines:
            last = found[lines - 1]
            while self.width(last + "…") > width:
                last = last[:-1].rstrip()
            found[lines - 1 :] = [last + "…"]
        return found

    def ending(self, text: str, width: float) -> str:
        """Return a line, shortened at its beginning if it is too long."""
        shown = text
        while self.width(shown) > width:
            shown = "…" + shown.removeprefix("…")[1:]
        return shown


def _words(text: str) -> Iterator[str]:
    """Words, each with the space after it; control characters and line breaks count as space."""
    plain = "".join(" " if unicodedata.category(letter) in ("Cc", "Zl", "Zp") else letter for letter in text)
    return (word + " " for word in plain.split())


def _clusters(word: str) -> Iterator[str]:
    """Characters, each with the marks that belong to it."""
    cluster = ""
    for letter in word:
        if cluster and not unicodedata.combining(letter) and unicodedata.category(letter) not in ("Mn", "Mc", "Cf"):
            yield cluster
            cluster = ""
        cluster += letter
    yield cluster


@cache
def _load(path: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, FONT_SIZE)


@cache
def _face(path: str) -> FT2Font | None:
    try:
        _load(path)  # some fonts of pictures only exist in one size
        return FT2Font(path)
    except (OSError, RuntimeError):
        return None


def _has(path: str, letter: str) -> bool:
    face = _face(path)
    return face is not None and face.get_char_index(ord(letter)) > 0


def draw_sheet(tiles: Sequence[PreviewTile], heading: str, lettering: FontStack) -> Image.Image:
    """Draw all tiles in rows, with captions under the pictures and a heading above."""
    columns = min(MAX_COLUMNS, max(1, math.ceil(math.sqrt(1.4 * len(tiles)))))
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    words = [[_words_of(tile, lettering) for tile in row] for row in rows]
    heights = [THUMBNAIL + LINE * max(len(lines) for lines in row) + GAP // 2 for row in words]
    width = columns * (THUMBNAIL + GAP) + GAP
    sheet = Image.new("RGB", (width, sum(heights) + GAP * (len(rows) + 1) + 2 * LINE), PAPER)
    canvas = ImageDraw.Draw(sheet)
    lettering.draw(canvas, (GAP, GAP), lettering.wrap(heading, width - 2 * GAP, 1)[0], INK)
    top = GAP + 2 * LINE
    for row, texts, height in zip(rows, words, heights, strict=True):
        for column, (tile, lines) in enumerate(zip(row, texts, strict=True)):
            _draw_tile(sheet, canvas, (GAP + column * (THUMBNAIL + GAP), top), tile, lines, lettering)
        top += height + GAP
    return sheet


def _words_of(tile: PreviewTile, lettering: FontStack) -> list[tuple[str, str]]:
    """Return (line, colour) of the text under a picture."""
    lines = [(lettering.ending(title, THUMBNAIL), MUTED) for title in tile.titles]
    if tile.captions:
        lines += [(line, INK) for line in lettering.wrap(tile.captions[0], THUMBNAIL, MAX_LINES)]
    if len(tile.captions) > 1:
        lines.append((f"and {len(tile.captions) - 1} more", MUTED))
    if tile.problem:
        lines += [(line, RED) for line in lettering.wrap(tile.problem, THUMBNAIL, 3)]
    return lines


def _draw_tile(
    sheet: Image.Image,
    canvas: ImageDraw.ImageDraw,
    place: tuple[int, int],
    tile: PreviewTile,
    lines: Sequence[tuple[str, str]],
    lettering: FontStack,
) -> None:
    left, top = place
    canvas.rectangle((left, top, left + THUMBNAIL - 1, top + THUMBNAIL - 1), CARD)
    if tile.image is not None:
        width, height = tile.image.size
        sheet.paste(tile.image, (left + (THUMBNAIL - width) // 2, top + (THUMBNAIL - height) // 2))
    for number, (line, ink) in enumerate(lines):
        lettering.draw(canvas, (left, top + THUMBNAIL + 3 + number * LINE), line, ink)
