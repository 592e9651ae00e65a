"""Layouts of listings: JSON lists, CSV and TSV, folders of images with captions beside them.

A `Layout` reads data on disk into rows of named fields, and detects later changes. index.py validates the rows and
stores them. Bytes that are not UTF-8 are kept as surrogates (PEP 383), so that a bad caption costs one row.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from disttempnet.data.images import DECODED_SUFFIXES, IMAGE_SUFFIXES, is_image
from disttempnet.data.listings.delimited import DelimitedRows
from disttempnet.data.listings.encodings import ENCODING_NAMES, ESCAPED, encoding_of
from disttempnet.data.listings.fields import Fields
from disttempnet.data.listings.json_kinds import Keys, is_row, known_kind, of_rows
from disttempnet.data.source import MAX_TEXT
from disttempnet.errors import UserError
from disttempnet.io.files import UnfitFile, read_regular

JSON_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson"})
TABLE_SUFFIXES = JSON_SUFFIXES | {".csv", ".tsv", ".tab", ".txt", ".token"}
TELL_EVERY = 1000  # rows between updates of the position
LISTING_GROUP_ROWS = 1000  # images are separate files, so groups can be small, and a window mixes many of them
READ_CHARACTERS = 1 << 20  # characters read at once
MAX_ROW = 1 << 26  # characters of a row


class PathState(NamedTuple):
    """State of a file or folder that was indexed: a cheap stamp (size, mtime) and a fingerprint of the content."""

    stamp: str
    fingerprint: str


class Layout(ABC):
    """Rows on disk.

    Attributes:
        where: listing, folder or pattern, for messages and for the name of the index.
        parts: name → state of each file when it was read; complete after `rows`.
        image_key, caption_key: fields of image and captions, if the layout defines them; else empty.
        total: final value of the progress that `rows` yields; 0 = unknown.
    """

    where: Path
    parts: dict[str, PathState]
    image_key = caption_key = ""
    total = 0

    @abstractmethod
    def rows(self) -> Iterator[tuple[Fields | None, int]]:
        """Yield (fields of a row, progress); fields are None if the row is malformed.

        Raises:
            UserError: the data cannot be read as this layout; the message names file and position.
        """

    def path(self, name: str) -> Path:
        """Return the path of a part."""
        return self.where.with_name(name)

    def stamp(self, name: str) -> str:
        """Return the cheap stamp of a part: equal stamps mean no change. Raises OSError if it is gone."""
        status = self.path(name).stat()
        return f"{status.st_size} {status.st_mtime_ns}"

    @abstractmethod
    def fingerprint(self, name: str) -> str:
        """Return the fingerprint of a part. Raises OSError if it is gone."""

    def index_file(self) -> Path:
        """Return the default file of the index."""
        return self.where.with_name(f"{self.where.name}.index")

    def groups(self, rows: int) -> list[int]:
        """Return the number of rows of each group of samples."""
        return [min(LISTING_GROUP_ROWS, rows - first) for first in range(0, rows, LISTING_GROUP_ROWS)]

    def names(self) -> set[str] | None:
        """Return the names of all current parts, if that is cheap; else None."""
        return None

    def identity(self) -> str:
        """Return text that the digest covers beside the rows."""
        return ""

    def notes(self) -> dict[str, Any]:
        """Return facts for reading images, which the index stores."""
        return {}

    def format_notes(self) -> list[str]:
        """Return a line for each detected property of the format; complete after `rows`."""
        return []

    def hint(self) -> str:
        """Return a hint for the message that no row can be used; may be empty."""
        return ""


class TableLayout(Layout):
    """File of rows: JSON (a list, JSON lines, or a known kind of object), or a table as text.

    Args:
        where: the file.
        image_key, caption_key: keys that the config names; empty = detected.
    """

    def __init__(self, where: Path, image_key: str = "", caption_key: str = "") -> None:
        self.where, self.parts = where, {}
        self.named = image_key, caption_key
        self.delimited: DelimitedRows | None = None
        self.encoding = self.kind = ""
        if not where.is_file():
            raise UserError(f"{where}: no such listing")
        self.total = where.stat().st_size

    def fingerprint(self, name: str) -> str:
        with self.path(name).open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()

    def rows(self) -> Iterator[tuple[Fields | None, int]]:
        name = self.where.name
        try:
            self.parts[name] = PathState(self.stamp(name), self.fingerprint(name))
            self.encoding = encoding_of(self.where)
            with self.where.open("rb") as raw:
                errors = "surrogateescape" if self.encoding in ESCAPED else "replace"
                text = io.TextIOWrapper(raw, self.encoding, errors, newline="")
                done = 0
                for count, fields in enumerate(self._fields(text)):
                    if count % TELL_EVERY == 0:
                        done = raw.tell()
                    yield fields, done
        except OSError as error:
            raise UserError(f"{self.where}: cannot be read: {error.strerror}") from None

    def _fields(self, text: io.TextIOWrapper) -> Iterator[Fields | None]:
        suffix = self.where.suffix.lower()
        if suffix in JSON_SUFFIXES:
            return self._json_rows(text)
        self.delimited = DelimitedRows(text, self.where, *self.named)
        self.image_key, self.caption_key = self.delimited.image_key, self.delimited.caption_key
        return iter(self.delimited)

    def _json_rows(self, text: io.TextIOWrapper) -> Iterator[Fields | None]:
        reader, keys = _JsonItems(text, self.where), Keys(*self.named)
        items = iter(reader)
        first = next(items, None)
        second = next(items, None) if not reader.in_list and isinstance(first, dict) else None
        if isinstance(first, dict) and not reader.in_list and second is None and not is_row(first, keys):
            known = known_kind(first, keys, self.where)
        else:
            known = of_rows(chain((item for item in (first, second) if item is not None), items))
        for name, given, settled in zip(("image_key", "caption_key"), keys, known[2:], strict=True):
            if given and settled:
                raise UserError(f"{self.where}: is read as {known.kind}, which has no {name}; remove '{given}'")
        self.kind, self.image_key, self.caption_key = known.kind, known.image_key, known.caption_key
        return known.rows

    def format_notes(self) -> list[str]:
        lines = self.delimited.format_notes() if self.delimited else []
        lines += [f"read as {self.kind}"] * bool(self.kind)
        return lines + ([f"text is {ENCODING_NAMES[self.encoding]}"] if self.encoding in ENCODING_NAMES else [])

    def hint(self) -> str:
        return self.delimited.misfit if self.delimited else ""


class _JsonItems:
    """Items of a JSON list, or JSON values one after another, without the whole file in memory."""

    def __init__(self, text: io.TextIOWrapper, where: Path) -> None:
        self.file, self.where = text, where
        self.text, self.at, self.ended = "", 0, False
        self.in_list = False
        self.alone = True  # no item has come before: the whole file may be one item
        self.line, self.column = 0, 0  # of the first character of self.text
        self.decoder = json.JSONDecoder()

    def __iter__(self) -> Iterator[Any]:
        self.in_list = in_list = self._next() == "["
        if in_list:
            self.at += 1
        while (character := self._next()) and not (in_list and character == "]"):
            yield self._item()
            self.alone = False
            if in_list and self._next() == ",":
                self.at += 1
            elif in_list and self._next() != "]":
                self._refuse("',' or ']' expected", self.at)
        if in_list and not character:
            self._refuse("the file ends inside the list", self.at)
        self.at += 1
        if in_list and self._next():
            self._refuse("the list has ended before", self.at)

    def _next(self) -> str:
        """Return the next character that is not white space; empty at the end."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\r\n":
                    return self.text[self.at]
                self.at += 1
            if self.ended:
                return ""
            self._read_on()

    def _item(self) -> Any:
        while True:
            try:
                item, end = self.decoder.raw_decode(self.text, self.at)
                if end + 3 <= len(self.text) or self.ended:  # a number at the end of the text may continue: 1|e+6
                    self.at = end
                    return item
            except RecursionError:
                self._refuse("nested too deeply", self.at)
            except ValueError as error:
                place = getattr(error, "pos", self.at)
                begun = place if self.alone and not self.in_list else self.at
                if self.ended or len(self.text) - begun > MAX_ROW:
                    self._refuse(getattr(error, "msg", str(error)), place)
            self._read_on()

    def _read_on(self) -> None:
        """Drop the used text, and read at least as much as is left, so that a long item is parsed few times."""
        used = self.text[: self.at]
        if newlines := used.count("\n"):
            self.line, self.column = self.line + newlines, 0
        self.column += len(used) - (used.rfind("\n") + 1)
        rest = self.text[self.at :]
        more = self.file.read(max(READ_CHARACTERS, len(rest)))
        self.text, self.at, self.ended = rest + more, 0, not more

    def _refuse(self, what: str, at: int) -> NoReturn:
        before = self.text[:at]
        newlines, place = before.count("\n"), at - (before.rfind("\n") + 1)
        column = place + 1 + (0 if newlines else self.column)
        raise UserError(f"{self.where}: not valid JSON: line {self.line + newlines + 1}, column {column}: {what}")


class FolderLayout(Layout):
    """Images under a folder, at any depth, with captions beside them: `x.jpg`, `x.txt`, other fields in `x.json`.

    Rows are sorted by path. Parts are folders, whose mtimes change with their entries.

    Args:
        where: the folder.
        caption_key: key of the captions in the .json; empty = the .txt is one caption.
    """

    image_key = "image"

    def __init__(self, where: Path, caption_key: str = "") -> None:
        self.where, self.parts = where, {}
        self.others: Counter[str] = Counter()  # ignored images by suffix; complete after `rows`
        self.from_json, self.caption_key = bool(caption_key), caption_key or "caption"

    def path(self, name: str) -> Path:
        return self.where / name

    def fingerprint(self, name: str) -> str:
        return _hash_names(_entries(self.path(name)))

    def rows(self) -> Iterator[tuple[Fields | None, int]]:
        try:
            for count, fields in enumerate(self._rows_in("", ())):
                yield fields, count
        except OSError as error:
            raise UserError(f"{error.filename or self.where}: cannot be read: {error.strerror}") from None

    def format_notes(self) -> list[str]:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(self.others.items()))
        usual = ", ".join(sorted(IMAGE_SUFFIXES))
        return [f"left out: {kinds}; images beside captions have to be {usual}"] if kinds else []

    def hint(self) -> str:
        """Return a hint about a table in the folder that may name its images."""
        tables = TABLE_SUFFIXES - {".txt"}
        names = sorted(entry.name for entry in self.where.iterdir() if not entry.name.startswith("."))
        images = {name.rpartition(".")[0] for name in names if is_image(name)}
        found = [
            name
            for name in names
            if (Path(name).suffix.lower() in tables and Path(name).stem not in images) or name == "captions.txt"
        ]
        if found:
            return f"it has {found[0]}: name that file if the captions are in it"
        if self.from_json:
            return f"captions are looked for under '{self.caption_key}' in the .json beside each image"
        image = next(filter(is_image, names), "x.jpg")
        beside = f"{self.where / image} has its caption in {(self.where / image).with_suffix('.txt')}"
        table = f'data.train=[{{path="captions.csv", images="{self.where}"}}]'
        return (
            f"captions are files beside the images ({beside}), fields of a .json beside them (caption_key), or rows of "
            f"a table with the columns image and caption ({table})"
        )

    def _rows_in(self, name: str, above: tuple[tuple[int, int], ...]) -> Iterator[Fields]:
        status, stamp = self.path(name).stat(), self.stamp(name)
        here = status.st_dev, status.st_ino
        if here in above:  # a link back to a folder above
            return
        entries = _entries(self.path(name), self.others)
        self.parts[name] = PathState(stamp, _hash_names(entries))
        for entry in sorted(entries):
            if entry.endswith("/"):
                yield from self._rows_in(name + entry, (*above, here))
            elif is_image(entry):
                yield self._row(name, entry, entries)

    def _row(self, folder: str, image: str, entries: set[str]) -> Fields:
        stem = image.rpartition(".")[0]
        fields: Fields = {}
        if f"{stem}.json" in entries:
            try:
                facts = json.loads(self._read_beside(folder, f"{stem}.json") or b"null")
            except (ValueError, RecursionError):
                facts = None  # training needs it only for captions in it
            fields = facts if isinstance(facts, dict) else {}
        if not self.from_json:
            fields.pop(self.caption_key, None)
            text = self._read_beside(folder, f"{stem}.txt") if f"{stem}.txt" in entries else None
            if text is not None:
                fields[self.caption_key] = text.decode("utf-8", "surrogateescape")
        return fields | {self.image_key: folder + image}

    def _read_beside(self, folder: str, name: str) -> bytes | None:
        """Read a file beside an image; None if it is a broken link, or not a regular file of at most MAX_TEXT."""
        try:
            return read_regular(self.where / folder / name, MAX_TEXT)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.EISDIR) or isinstance(error, UnfitFile):
                return None
            error.filename = error.filename or str(self.where / folder / name)
            raise


def _entries(folder: Path, others: Counter[str] | None = None) -> set[str]:
    """Return the names of images, files beside them and folders (with a slash, so that they sort like paths).

    Args:
        folder: the folder.
        others: counter of images with other suffixes. They are not entries, so that existing indexes stay valid.
    """
    with os.scandir(folder) as found:
        visible = [entry for entry in found if not entry.name.startswith(".")]
        names = {f"{entry.name}/" if leads_to_folder(entry) else entry.name for entry in visible}
    if others is not None:
        others.update(Path(name).suffix.lower() for name in names if is_image(name, DECODED_SUFFIXES - IMAGE_SUFFIXES))
    return {name for name in names if name.endswith(("/", ".txt", ".json")) or is_image(name)}


def leads_to_folder(entry: os.DirEntry[str]) -> bool:
    """Tell whether an entry is a folder or a link to one. Raises OSError if that is unknown."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link to itself is not a folder
            raise
        return False


def _hash_names(names: set[str]) -> str:
    text = "\n".join(sorted(names)).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def holds_images(folder: Path) -> bool:
    """Tell whether a folder has an image at any depth, links included; stops at the first."""
    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if any(map(is_image, names)):
            return True
        inside = {name: os.stat(os.path.join(place, name)) for name in folders}
        # each folder once, as a link may lead back
        folders[:] = [name for name, status in inside.items() if (status.st_dev, status.st_ino) not in seen]
        seen |= {(status.st_dev, status.st_ino) for status in inside.values()}
    return False
