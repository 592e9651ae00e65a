"""Tables as text: which character separates their cells, whether there is a header, what a quotation mark means.

Tables are written by pandas and spreadsheets, which quote, and line by line by scripts, which do not. The first lines
tell which separator, header and blanks fit. A file that its suffix describes is read just as the suffix says. A
quotation mark is settled where it stands: a quoted cell may span lines, unless more speaks for rows with stray marks.
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
BY_SUFFIX = {".csv": ",", ".tsv": "\t", ".tab": "\t"}  # others: the first that fits of the above
HEAD_LINES = 1000  # lines that the format is found from
HEAD_CHARACTERS = 1 << 20
MOST = 0.5  # of the first rows have to name an image where there is no header: others may be lines of long captions
MAX_CELL = 1 << 26  # characters; more is none
MAX_SPAN = 1000  # lines of a quoted cell
STRAY = "with an unbalanced quotation mark are read as they stand"
REST = "have separators in their caption"


class Format(NamedTuple):
    """How a table is to be read.

    Attributes:
        separator: the character between two cells.
        blanks: whether blanks around a cell are no part of it.
        names: of the columns; their numbers, from "1", where there is no header.
        headed: whether the first line holds the names.
        image, caption: columns; -1 where no name says so.
    """

    separator: str
    blanks: bool
    names: tuple[str, ...]
    headed: bool
    image: int
    caption: int

    def cells(self, line: str) -> list[str]:
        """The cells of a line, where quotation marks mean nothing."""
        cells = line.rstrip("\r\n").split(self.separator)
        return [cell.strip() for cell in cells] if self.blanks else cells

    def csv_options(self) -> dict[str, Any]:
        return {"delimiter": self.separator, "skipinitialspace": self.blanks, "strict": True}


class DelimitedRows:
    """The rows of a table, each as named fields.

    Args:
        lines: of the file, with their ends.
        where: the file, for messages; its suffix tells which separator is tried first.
        image_key, caption_key: columns that the config names; empty = found.

    Attributes:
        image_key, caption_key: the columns, where the content rather than a header tells which they are; else empty.

    Raises:
        UserError: no separator fits, or the columns of a table without a header cannot be told.
    """

    def __init__(self, lines: Iterator[str], where: Path, image_key: str = "", caption_key: str = "") -> None:
        csv.field_size_limit(MAX_CELL)
        self.where = where
        head = _head(lines)
        separators = [*SEPARATORS]
        if found := head and re.fullmatch(r"sep=(.)", head[0].strip()):  # a spreadsheet's own first line
            head, separators = head[1:], [found[1]]
        elif own := BY_SUFFIX.get(where.suffix.lower()):
            separators = sorted(separators, key=lambda separator: separator != own)
        self.format = _find_format(head, separators, where, image_key, caption_key)
        self.options = self.format.csv_options()
        self.next_line: list[str] = []  # one reader for all lines: making one costs more than reading a line
        self.reader = csv.reader(iter(self.next_line.pop, None), **self.options)
        self.lines = chain(head[self.format.headed :], lines)
        self.returns = bool(head) and head[0].endswith("\r\n")  # csv writes rows so, but not the lines of a cell
        self.quotes = _quotes(head[self.format.headed :], self.format)
        images = _cells(_rows(head[self.format.headed :], self.format), self.format.image)
        self.suffixed = bool(images) and _share(images, names_an_image) >= MOST
        self.digits = _share(images, _has_digit) == 1.0
        self.numbered = self.suffixed and all(CAPTION_NUMBER.search(image) for image in images)
        self.lists = self._holds_lists(head)
        self.image_key = "" if self.format.headed or image_key else self.format.names[self.format.image]
        self.caption_key = "" if self.format.headed or caption_key else self.format.names[self.format.caption]
        self.misfit = ""  # the first row that has other cells than there are columns
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
            elif line := line.rstrip("\r\n"):  # a blank line is none
                cells = line.split(separator)
                if plain and len(cells) == len(names):
                    yield dict(zip(names, cells, strict=True))
                else:
                    yield self._fields([cell.strip() for cell in cells] if blanks else cells)

    def said(self) -> list[str]:
        """How the table was read, in a line."""
        parts = [f"separated by {SEPARATORS.get(self.format.separator, repr(self.format.separator))}"]
        parts += ["no header"] * (not self.format.headed)
        parts += ["captions numbered by #0, #1, …"] * self.numbered + ["a cell is a list of captions"] * self.lists
        parts += [f"{count:,} rows {what}, the first is {self.first[what]}" for what, count in self.repaired.items()]
        return ["; ".join(parts)]

    def _alone(self, line: str) -> list[str]:
        """The cells of a line whose quotation marks balance, as they do as a rule; else none."""
        self.next_line.append(line)
        try:
            return next(self.reader)
        except (csv.Error, IndexError):  # the latter: it asks for another line
            return []

    def _settled(self, line: str) -> Iterator[list[str]]:
        """The rows of a line whose quotation marks do not balance, and of those that were read on after it in vain."""
        pending = deque([line])
        while pending:
            line = pending.popleft()
            if '"' in line:
                yield self._alone(line) or self._spanning(line, pending)
            elif line.rstrip("\r\n"):
                yield self.format.cells(line)

    def _spanning(self, line: str, pending: deque[str]) -> list[str]:
        """The cells of a line, and of those after it that a quoted cell spans. The line alone, with its quotation marks
        as they stand, where they do not balance, or where more speaks for two stray ones."""
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
        """Whether a cell that opens in `line` and is closed in the last of `taken` is rather one of rows that two stray
        marks stand in.

        A caption may list images, one a line. So rows inside are no evidence where the table quotes what has to be
        quoted, nor where the lines that open and close the cell are no rows themselves.
        """
        complete = self._is_a_row(line)
        if not fits:
            return any(self._is_a_row(more.partition('"')[0]) or (complete and self._is_a_row(more)) for more in taken)
        if self.quotes or not (complete and self._is_a_row(taken[-1])):
            return False
        lines = [more for more in taken if more.strip()]
        return sum(map(self._is_a_row, lines)) > len(lines) / 2

    def _is_a_row(self, line: str) -> bool:
        """Whether a line can be a row of its own: it ends as rows do, and its image looks as others do."""
        if self.returns and line.endswith("\n") and not line.endswith("\r\n"):
            return False
        cells, columns, image = self.format.cells(line), len(self.format.names), self.format.image
        if len(cells) < columns or image < 0:
            return len(cells) == columns > 1
        if self.suffixed:  # commas in a caption may stand before the image or after it
            return names_an_image(cells[image]) or names_an_image(cells[image - columns])
        return len(cells) == columns and " " not in cells[image] and (_has_digit(cells[image]) or not self.digits)

    def _fields(self, cells: list[str]) -> Fields | None:
        """The fields of a row; None where its cells do not fit the columns."""
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
        """Without empty cells after the last column, or with a caption there that has separators in it put together."""
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
        """Whether the captions of the first rows are lists, in JSON or as Python prints them."""
        options = self.format.csv_options() | {"strict": False}
        rows = list(csv.reader(head[self.format.headed : 50], **options)) if self.format.caption >= 0 else []
        cells = _cells(rows, self.format.caption)
        return bool(cells) and all(cell.startswith("[") and isinstance(_list(cell), list) for cell in cells)


def _head(lines: Iterator[str]) -> list[str]:
    """The first lines, from the first that is not blank on."""
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
    """The format that fits the first lines; of several the first."""
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
        raise UserError(f"{where}: line 1: no comma, tab, ';' or '|' parts image and caption: {head[0].strip()[:60]!r}")
    return headed


def _quotes(head: Sequence[str], form: Format) -> bool:
    """Whether the first rows are written by csv's rules: cells that have to be quoted are, no other holds a mark."""
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
    """The cells of each line by itself."""
    options = form.csv_options() | {"strict": False}
    lines = [line for line in head if line.strip()]
    return [next(csv.reader([line], **options)) if '"' in line else form.cells(line) for line in lines]


def _headed(
    head: Sequence[str], form: Format, image_key: str, caption_key: str
) -> tuple[tuple[int, int, float], Format]:
    """How well the first line is a header, and the format with its names.

    The measure: how many of image and caption it names, how many of them letter for letter, and the part of the rows
    that have as many cells.
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
    """The part of the lines that have an image in the column where the first has one, and the format of such lines."""
    rows = _rows(head, form)
    image = next((column for column, cell in enumerate(rows[0]) if names_an_image(cell)), -1)
    if image < 0 or len(rows[0]) < 2:
        return 0.0, form
    share = _share(rows, lambda cells: len(cells) > image and names_an_image(cells[image]) and cells[image][0] != " ")
    counts = Counter(len(cells) for cells in rows if len(cells) > max(image, 1))
    columns, often = counts.most_common(1)[0]
    if often < 0.9 * counts.total():  # captions have separators in them
        columns = min(counts)
    prose = (c for c in range(1, columns) if _share(_cells(rows, c), lambda cell: cell.startswith(" ")) >= MOST)
    columns = max(next(prose, columns), image + 1, 2)
    return share, form._replace(names=tuple(str(column + 1) for column in range(columns)), image=image)


def _with_caption(head: Sequence[str], form: Format, where: Path, image_key: str, caption_key: str) -> Format:
    """A format without header, its columns settled: those that the config numbers, else the image and that of words."""
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
            f"{where}: line 1 is no header, and which of {len(form.names)} columns holds the caption cannot be told: "
            "put a line above it that names them, such as image,caption, or give its number as caption_key"
        )
    return form._replace(caption=others[0])


def _cells(rows: Sequence[Sequence[str]], column: int) -> list[str]:
    return [row[column] for row in rows if -1 < column < len(row)]


def _share(items: Sequence[Any], test: Any) -> float:
    """The part of some items that a test is true of; 1 of none."""
    return sum(bool(test(item)) for item in items) / len(items) if items else 1.0


def _has_digit(text: str) -> bool:
    return any(character.isdigit() for character in text)


def _list(text: str) -> Any:
    """A cell as the list of strings that it holds, in JSON or as Python prints it; the text itself where it is none."""
    try:
        try:
            value = json.loads(text)
        except ValueError:
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else text
