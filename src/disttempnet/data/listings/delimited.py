"""Tables as text: detects separator, header and quoting, and yields rows.

Pandas and spreadsheets write tables with quotes, scripts write them line by line without. Separator, header and blanks
are detected from the first lines; the separator of the suffix comes first. A quoted cell may span lines, unless the
quotation marks are more likely stray marks in several rows.
"""

from __future__ import annotations

import ast
import csv
import json
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from disttempnet.data.listings.fields import CAPTION_KEYS, CAPTION_NUMBER, IMAGE_KEYS, Fields, find_key, names_an_image
from disttempnet.errors import UserError

SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
BY_SUFFIX = {".csv": ",", ".tsv": "\t", ".tab": "\t"}  # other suffixes: the first of SEPARATORS that fits
HEAD_LINES = 1000  # lines for detection
HEAD_CHARACTERS = 1 << 20
MOST = 0.5  # share of the first rows that have to name an image if there is no header; others may be lines of captions
MAX_CELL = 1 << 26  # characters
MAX_SPAN = 1000  # lines of a quoted cell
STRAY = "with an unbalanced quotation mark are read as they stand"
REST = "have separators in their caption"


class Format(NamedTuple):
    """Format of a table.

    Attributes:
        separator: character between two cells.
        blanks: blanks around a cell are stripped.
        names: column names; without a header their numbers, from "1".
        headed: the first line has the names.
        image, caption: column numbers; -1 if no name tells.
    """

    separator: str
    blanks: bool
    names: tuple[str, ...]
    headed: bool
    image: int
    caption: int

    def cells(self, line: str) -> list[str]:
        """Split a line into cells, with quotation marks as plain characters."""
        cells = line.rstrip("\r\n").split(self.separator)
        return [cell.strip() for cell in cells] if self.blanks else cells

    def csv_options(self) -> dict[str, Any]:
        return {"delimiter": self.separator, "skipinitialspace": self.blanks, "strict": True}


class DelimitedRows:
    """Rows of a table as named fields.

    Args:
        lines: lines of the file, with their line ends.
        where: the file, for messages; its suffix decides which separator is tried first.
        image_key, caption_key: columns that the config names; empty = detected.

    Attributes:
        image_key, caption_key: the columns if they were detected from the content; else empty.

    Raises:
        UserError: no separator fits, or the columns of a table without a header cannot be detected.
    """

    def __init__(self, lines: Iterator[str], where: Path, image_key: str = "", caption_key: str = "") -> None:
        csv.field_size_limit(MAX_CELL)
        self.where = where
        head = _head(lines)
        separators = [*SEPARATORS]
        if found := head and re.fullmatch(r"sep=(.)", head[0].strip()):  # first line of some spreadsheets
            head, separators = head[1:], [found[1]]
        elif own := BY_SUFFIX.get(where.suffix.lower()):
            separators = sorted(separators, key=lambda separator: separator != own)
        self.format = _find_format(head, separators, where, image_key, caption_key)
        self.options = self.format.csv_options()
        self.next_line: list[str] = []  # one reader for all lines: to create one costs more than to read a line
        self.reader = csv.reader(iter(self.next_line.pop, None), **self.options)
        self.lines = chain(head[self.format.headed :], lines)
        self.returns = bool(head) and head[0].endswith("\r\n")  # csv ends rows with it, but not the lines of a cell
        self.quotes = _quotes(head[self.format.headed :], self.format)
        images = _cells(_rows(head[self.format.headed :], self.format), self.format.image)
        self.suffixed = bool(images) and _share(images, names_an_image) >= MOST
        self.digits = _share(images, _has_digit) == 1.0
        self.numbered = self.suffixed and all(CAPTION_NUMBER.search(image) for image in images)
        self.lists = self._holds_lists(head)
        self.image_key = "" if self.format.headed or image_key else self.format.names[self.format.image]
        self.caption_key = "" if self.format.headed or caption_key else self.format.names[self.format.caption]
        self.misfit = ""  # the first row with another number of cells than columns
        self.repaired: Counter[str] = Counter()  # STRAY or REST → rows
        self.first: dict[str, str] = {}  # the same → the image of the first

    def __iter__(self) -> Iterator[Fields | None]:
        names, separator, blanks = self.format.names, self.format.separator, self.format.blanks
        plain = not (blanks or self.numbered or self.lists)
        for line in self.lines:
            if '"' in line:
                cells = self._alone(line)
                if plain and len(cells) == len(names):
                    yield dict(zip(names, cells, strict=True))
                else:
                    for row in (cells,) if cells else self._settled(line):
                        yield self._fields(row)
            elif line := line.rstrip("\r\n"):  # skip blank lines
                cells = line.split(separator)
                if plain and len(cells) == len(names):
                    yield dict(zip(names, cells, strict=True))
                else:
                    yield self._fields([cell.strip() for cell in cells] if blanks else cells)

    def format_notes(self) -> list[str]:
        """Describe the detected format in a line."""
        parts = [f"separated by {SEPARATORS.get(self.format.separator, repr(self.format.separator))}"]
        parts += ["no header"] * (not self.format.headed)
        parts += ["captions numbered by #0, #1, …"] * self.numbered + ["a cell is a list of captions"] * self.lists
        parts += [f"{count:,} rows {what}, the first is {self.first[what]}" for what, count in self.repaired.items()]
        return ["; ".join(parts)]

    def _alone(self, line: str) -> list[str]:
        """Return the cells of a line if its quotation marks balance, as usual; else an empty list."""
        self.next_line.append(line)
        try:
            return next(self.reader)
        except (csv.Error, IndexError):  # IndexError: the cell goes on in the next line
            return []

    def _settled(self, line: str) -> Iterator[list[str]]:
        """Yield the rows of a line with unbalanced quotation marks, and of the lines that were read ahead after it."""
        pending = deque([line])
        while pending:
            line = pending.popleft()
            if '"' in line:
                yield self._alone(line) or self._spanning(line, pending)
            elif line.rstrip("\r\n"):
                yield self.format.cells(line)

    def _spanning(self, line: str, pending: deque[str]) -> list[str]:
        """Return the cells of a line and of the lines after it that a quoted cell spans.

        If the marks do not balance, or are likely two stray ones, return the line alone, with marks as plain
        characters.
        """
        taken: list[str] = []

        def spanned() -> Iterator[str]:
            yield line
            while (more := pending.popleft() if pending else next(self.lines, None)) is not None:
                taken.append(more)
                if len(taken) > MAX_SPAN:
                    return
                yield more

        try:
            cells = next(csv.reader(spanned(), **self.options))
            if not self._swallows(line, taken, len(cells) == len(self.format.names)):
                return cells
        except csv.Error:
            pass
        pending.extendleft(reversed(taken))
        cells = self.format.cells(line)
        self._note(STRAY, cells)
        return cells

    def _swallows(self, line: str, taken: Sequence[str], fits: bool) -> bool:
        """Tell whether a quoted cell from `line` to the last of `taken` is in fact several rows with two stray marks.

        A caption may list images, one per line. So rows inside the cell do not count if the table is quoted
        consistently, or if the lines that open and close the cell are not rows themselves.
        """
        complete = self._is_a_row(line)
        if not fits:
            return any(self._is_a_row(more.partition('"')[0]) or (complete and self._is_a_row(more)) for more in taken)
        if self.quotes or not (complete and self._is_a_row(taken[-1])):
            return False
        lines = [more for more in taken if more.strip()]
        return sum(map(self._is_a_row, lines)) > len(lines) / 2

    def _is_a_row(self, line: str) -> bool:
        """Tell whether a line can be a row: it ends like one, and its image looks like the others."""
        if self.returns and line.endswith("\n") and not line.endswith("\r\n"):
            return False
        cells, columns, image = self.format.cells(line), len(self.format.names), self.format.image
        if len(cells) < columns or image < 0:
            return len(cells) == columns > 1
        if self.suffixed:  # commas in a caption may come before the image or after it
            return names_an_image(cells[image]) or names_an_image(cells[image - columns])
        return len(cells) == columns and " " not in cells[image] and (_has_digit(cells[image]) or not self.digits)

    def _fields(self, cells: list[str]) -> Fields | None:
        """Return the fields of a row; None if its cells do not fit the columns."""
        names = self.format.names
        if len(cells) > len(names):
            cells = self._shortened(cells)
        if len(cells) != len(names):
            self.misfit = self.misfit or f"{cells[0]!r} begins a row of {len(cells)} cells, not {len(names)}"
            return None
        fields: Fields = dict(zip(names, cells, strict=True))
        if self.numbered:
            image = names[self.format.image]
            fields[image] = CAPTION_NUMBER.sub("", fields[image])
        if self.lists:
            caption = names[self.format.caption]
            fields[caption] = _list(fields[caption])
        return fields

    def _shortened(self, cells: list[str]) -> list[str]:
        """Drop empty cells after the last column, or join the cells of a last, unquoted caption with separators."""
        columns = len(self.format.names)
        if not any(cell.strip() for cell in cells[columns:]):
            return cells[:columns]
        if self.format.caption == columns - 1 and self.suffixed and names_an_image(cells[self.format.image]):
            self._note(REST, cells)
            return [*cells[: columns - 1], self.format.separator.join(cells[columns - 1 :])]
        return cells

    def _note(self, what: str, cells: Sequence[str]) -> None:
        self.repaired[what] += 1
        self.first.setdefault(what, cells[self.format.image] if -1 < self.format.image < len(cells) else cells[0])

    def _holds_lists(self, head: Sequence[str]) -> bool:
        """Tell whether the captions of the first rows are lists, in JSON or as Python prints them."""
        options = self.format.csv_options() | {"strict": False}
        rows = list(csv.reader(head[self.format.headed : 50], **options)) if self.format.caption >= 0 else []
        cells = _cells(rows, self.format.caption)
        return bool(cells) and all(cell.startswith("[") and isinstance(_list(cell), list) for cell in cells)


def _head(lines: Iterator[str]) -> list[str]:
    """Return the first lines, without blank ones at the beginning."""
    head: list[str] = []
    size = 0
    for line in lines:
        if head or line.strip():
            head.append(line)
            size += len(line)
        if len(head) >= HEAD_LINES or size > HEAD_CHARACTERS:
            break
    return head


def _find_format(head: list[str], separators: Sequence[str], where: Path, image_key: str, caption_key: str) -> Format:
    """Return the first format that fits the first lines."""
    if not head:
        return Format(separators[0], False, (), True, -1, -1)
    forms = [Format(separator, blanks, (), True, -1, -1) for separator in separators for blanks in (False, True)]
    best, headed = max((_headed(head, form, image_key, caption_key) for form in forms), key=lambda found: found[0])
    if best[0] == 2:
        return headed
    share, bare = max((_bare(head, form._replace(headed=False)) for form in forms), key=lambda found: found[0])
    if share >= MOST:
        return _with_caption(head, bare, where, image_key, caption_key)
    if len(headed.names) < 2:
        raise UserError(
            f"{where}: line 1: no comma, tab, ';' or '|' separates image and caption: {head[0].strip()[:60]!r}"
        )
    return headed


def _quotes(head: Sequence[str], form: Format) -> bool:
    """Tell whether the first rows follow csv's rules: cells are quoted where needed, and no other has a mark."""
    reader, last, quotes = csv.reader(head, **form.csv_options()), 0, False
    try:
        for cells in reader:
            text, lines, last = "".join(head[last : reader.line_num]), reader.line_num - last, reader.line_num
            marked = [cell for cell in cells if '"' in cell]
            if marked and '""' not in text:
                return False
            worded = any(character.isalnum() for cell in marked for character in cell)
            quotes |= lines == 1 and (worded or any(form.separator in cell for cell in cells))
    except csv.Error:
        return quotes and reader.line_num == len(head)  # the last cell may go on after the head
    return quotes


def _rows(head: Sequence[str], form: Format) -> list[list[str]]:
    """Return the cells of each line on its own."""
    options = form.csv_options() | {"strict": False}
    lines = [line for line in head if line.strip()]
    return [next(csv.reader([line], **options)) if '"' in line else form.cells(line) for line in lines]


def _headed(
    head: Sequence[str], form: Format, image_key: str, caption_key: str
) -> tuple[tuple[int, int, float], Format]:
    """Score the first line as a header; return the score and the format with its names.

    The score: number of image and caption keys it has, number of exact matches, share of rows with as many cells.
    """
    names, *rows = _rows(head, form)
    if len(names) < 2:
        return (0, 0, 0.0), form._replace(names=tuple(names))
    image = find_key(names, image_key, IMAGE_KEYS)
    caption = find_key([name for name in names if name != image], caption_key, CAPTION_KEYS)
    keys = [key for key in (image, caption) if key is not None]
    exact = sum(key in (image_key, caption_key, *IMAGE_KEYS, *CAPTION_KEYS) for key in keys)
    form = form._replace(
        names=tuple(names),
        image=-1 if image is None else names.index(image),
        caption=-1 if caption is None else names.index(caption),
    )
    fits = _share(rows, lambda cells: len(cells) == len(names) and not cells[max(form.image, 0)].startswith(" "))
    return (len(keys), exact, round(fits, 1)), form


def _bare(head: Sequence[str], form: Format) -> tuple[float, Format]:
    """Return the share of lines with an image in the column of the first one, and the format without header."""
    rows = _rows(head, form)
    image = next((column for column, cell in enumerate(rows[0]) if names_an_image(cell)), -1)
    if image < 0 or len(rows[0]) < 2:
        return 0.0, form
    share = _share(rows, lambda cells: len(cells) > image and names_an_image(cells[image]) and cells[image][0] != " ")
    counts = Counter(len(cells) for cells in rows if len(cells) > max(image, 1))
    columns, often = counts.most_common(1)[0]
    if often < 0.9 * counts.total():  # captions have separators
        columns = min(counts)
    prose = (c for c in range(1, columns) if _share(_cells(rows, c), lambda cell: cell.startswith(" ")) >= MOST)
    columns = max(next(prose, columns), image + 1, 2)
    return share, form._replace(names=tuple(str(column + 1) for column in range(columns)), image=image)


def _with_caption(head: Sequence[str], form: Format, where: Path, image_key: str, caption_key: str) -> Format:
    """Set the columns of a format without header: as numbered in the config, else the image and the one of words."""
    if image_key in form.names:
        form = form._replace(image=form.names.index(image_key))
    others = [column for column in range(len(form.names)) if column != form.image]
    rows = [cells for cells in _rows(head, form) if len(cells) >= len(form.names)]
    if caption_key in form.names:
        others = [form.names.index(caption_key)]
    elif len(others) > 1:
        others = [column for column in others if _share(_cells(rows, column), lambda cell: " " in cell.strip()) >= 0.5]
    if len(others) != 1:
        raise UserError(
            f"{where}: line 1 is not a header, and the caption may be in any of {len(form.names)} columns: "
            "add a header line such as image,caption, or give the number of the column as caption_key"
        )
    return form._replace(caption=others[0])


def _cells(rows: Sequence[Sequence[str]], column: int) -> list[str]:
    return [row[column] for row in rows if -1 < column < len(row)]


def _share(items: Sequence[Any], test: Any) -> float:
    """Return the share of items that pass a test; 1 if there are none."""
    return sum(bool(test(item)) for item in items) / len(items) if items else 1.0


def _has_digit(text: str) -> bool:
    return any(character.isdigit() for character in text)


def _list(text: str) -> Any:
    """Parse a cell as a list of strings, in JSON or as Python prints it; return the text itself if it is not one."""
    try:
        try:
            value = json.loads(text)
        except ValueError:
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else text
