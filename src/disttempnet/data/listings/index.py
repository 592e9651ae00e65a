"""Index of a listing: its rows, validated and copied into one memory-mapped file (io/columns.py).

Columns: `rows` (JSON texts, one after another), `start` (byte offset of each), `status`, `first` (first id of each
group), `numbers` (row of each sample, if rows were joined), `about` (JSON: settings, files and notes). It is written in
one pass. Its header has the sha256 of the file, which every start verifies.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedRandom
from itertools import chain, islice, pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from disttempnet.data.listings.fields import (
    ADDRESSES,
    CAPTION_KEYS,
    IMAGE_KEYS,
    SENTENCE_KEYS,
    Fields,
    NoBytes,
    find_key,
    likely_keys,
    mistaken_for,
)
from disttempnet.data.listings.readers import Layout
from disttempnet.data.source import OK, visible_text
from disttempnet.errors import UserError
from disttempnet.io.columns import ColumnWriter, map_columns, temporary_index
from disttempnet.io.progress import ProgressDisplay, clock
from disttempnet.sanitize import one_line

LISTING_INDEX_FORMAT = "disttempnet-listing-2"
LISTING_HEADER_BYTES = 4096  # bytes reserved for the header
ASCII, UNICODE = json.JSONEncoder(), json.JSONEncoder(ensure_ascii=False)
HEAD_ROWS = 1000  # rows in which keys are looked for

# reasons why a row cannot be used; the status of a row is an index into this tuple, 0 is usable
ROW_REASONS = (
    "ok",
    "no image",
    "image is not a path",
    "image leaves the folder of images by '..'",
    "no caption",
    "empty caption",
    "caption is not text",
    "caption is not UTF-8",
    "fields are not those of the header",
    "no bytes of an image in this row",
)
NO_IMAGE, BAD_IMAGE, OUTSIDE = 1, 2, 3
NO_CAPTION, EMPTY_CAPTION, WRONG_CAPTION, BAD_CAPTION = 4, 5, 6, 7
BAD_ROW, NO_BYTES = 8, 9


class Settings(NamedTuple):
    """Settings of the config: keys, empty = found among the usual ones; join rows of one image to one sample."""

    image_key: str
    caption_key: str
    join_rows: bool


class ListingRow(NamedTuple):
    """Validated row: content for the index, index into `ROW_REASONS`, and number of captions that were null."""

    image: str
    captions: list[str]
    fields: dict[str, Any]
    status: int
    nulls: int = 0


class ListingColumns:
    """Mapped index file of a listing.

    Attributes:
        path: the file.
        rows: uint8, JSON texts `[image, captions, other fields]`.
        start: int64 [N + 1], byte offset of each text.
        status: uint8 [N], index into `ROW_REASONS`.
        first: int64 [G + 1], first id of each group, then N.
        numbers: int64 [N], first row of each sample in the listing, from 0; None = the id.
        about: settings, files and notes of the build.
        digest: hex sha256 of the samples.
    """

    def __init__(self, path: Path, tensors: dict[str, NDArray[Any]], digest: str) -> None:
        self.path, self.digest = path, digest
        self.rows, self.start = tensors["rows"], tensors["start"]
        self.status, self.first = tensors["status"], tensors["first"]
        self.numbers = tensors.get("numbers")  # only where rows were joined
        self.about: dict[str, Any] = json.loads(tensors["about"].tobytes())

    def row(self, sample: int) -> tuple[str, list[str], dict[str, Any]]:
        """Return image, captions and other fields of a sample. Raises IndexError."""
        if not 0 <= sample < len(self.status):
            raise IndexError(f"sample id {sample} is not in [0, {len(self.status)})")
        image, captions, fields = json.loads(self.rows[self.start[sample] : self.start[sample + 1]].tobytes())
        return image, captions, fields

    def number(self, sample: int) -> int:
        """Return the first row of a sample in the listing, from 0."""
        return sample if self.numbers is None else int(self.numbers[sample])

    def format_notes(self) -> list[str]:
        """Return a line for each detected property of the listing."""
        notes = self.about["notes"]
        if self.numbers is None:
            return [*notes.get("said", ())]
        joined = f"{notes['rows']:,} rows, {len(self.status):,} samples: rows of one image are one sample"
        return [*notes["said"], f"{joined} (join_rows = false: a sample a row)"]

    def check(self, layout: Layout, settings: Settings) -> None:
        """Raise UserError if data or settings differ from the indexed ones; the message names the file."""
        for key, now in settings._asdict().items():
            then = self.about["settings"].get(key, now)  # an index older than the setting stays valid
            if then != now:
                self._refuse(f"was indexed with {key} = '{then}', not '{now}': set {key} = '{then}'", layout.where)
        parts, names = self.about["parts"], layout.names()
        if names is not None and names - parts.keys():
            self._refuse("is new since the index was built; remove it", layout.path(min(names - parts.keys())))
        for name, (stamp, fingerprint) in parts.items():
            path = layout.path(name)
            try:
                same = layout.stamp(name) == stamp or layout.fingerprint(name) == fingerprint
            except OSError as error:
                self._refuse(f"cannot be read any more ({error.strerror}); restore it", path)
            if not same:
                self._refuse("has changed since it was indexed; restore it", path)

    def _refuse(self, what: str, path: Path) -> NoReturn:
        raise UserError(
            f"{path}: {what}, or delete {self.path} to index again (sample ids may change: older checkpoints will "
            "not fit)"
        )


def load_columns(path: Path, verify: bool = False) -> ListingColumns:
    """Map an index file into memory.

    Args:
        path: the file.
        verify: read the whole file and compare it with its checksum.

    Raises:
        UserError: another version, or the file is cut off or damaged.
    """
    try:
        metadata, columns = map_columns(path, LISTING_INDEX_FORMAT, verify)
        return ListingColumns(path, columns, metadata["digest"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a usable index of a listing ({error}); delete it to index again") from None


def build_index(layout: Layout, path: Path, settings: Settings, progress: bool) -> None:
    """Read all rows of a layout, and write their index.

    Args:
        layout: the data.
        path: file of the index.
        settings: keys of image and captions, and whether to join rows.
        progress: show a bar on standard error.

    Raises:
        UserError: the data cannot be read, has no such keys, or no usable row.
    """
    with temporary_index(path) as temporary, temporary.open("w+b") as file:
        # the texts of the rows, one after another, as they are read and validated
        writer = ColumnWriter(file, LISTING_HEADER_BYTES)
        rows, images, nulls = _RowWriter(file), array("q"), 0
        for row in _validated(_with_bar(layout, progress), layout, settings):
            rows.add(_encoded(row), row.status)
            nulls += row.nulls
            if settings.join_rows:
                images.append(hash(row.image))
        _refuse_unusable(layout, rows.status)

        # rows of one image become one sample
        read = len(rows.status)
        first = _first_rows(np.frombuffer(images, np.int64), rows.status) if settings.join_rows else None
        numbers = None
        if first is not None:
            rows, numbers = _joined(rows, first, path.parent)

        # all other columns: byte offsets, groups, row numbers, status, and the origin as JSON
        said = layout.format_notes() + ([f"{nulls:,} captions are null: left out"] if nulls else [])
        notes = {**layout.notes(), "rows": read, "said": said}
        about = {"settings": settings._asdict(), "parts": layout.parts, "notes": notes}
        start = np.array(rows.start, np.int64)
        groups = np.cumsum([0, *layout.groups(len(rows.status))], dtype=np.int64)
        status = np.frombuffer(bytes(rows.status), np.uint8)
        file.write(bytes(-rows.start[-1] % 8))  # numbers lie on multiples of their size
        writer.end_column("rows", status.dtype, [rows.start[-1] + -rows.start[-1] % 8])
        writer.add("start", start)
        writer.add("first", groups)
        if numbers is not None:
            writer.add("numbers", numbers)
        writer.add("status", status)
        writer.add("about", np.frombuffer(json.dumps(about).encode(), np.uint8))

        # the digest is of what the samples are, the checksum of the file
        for column in (start, groups, status):
            rows.digest.update(column.data)
        rows.digest.update(layout.identity().encode())
        writer.finish({"format": LISTING_INDEX_FORMAT, "digest": rows.digest.hexdigest()}, checksum=True)
        os.replace(temporary, path)


class _RowWriter:
    """Texts of rows in a file, one after another from its current position on."""

    def __init__(self, file: BufferedRandom) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.start, self.status = array("q", [0]), bytearray()

    def add(self, text: bytes, status: int) -> None:
        self.digest.update(text)
        self.file.write(text)
        self.start.append(self.start[-1] + len(text))
        self.status.append(status)


def _first_rows(images: NDArray[np.int64], status: bytearray) -> NDArray[np.int64] | None:
    """Return the first usable row with the same image hash, for each row, int64 [N]; None if all hashes differ."""
    usable = np.flatnonzero(np.frombuffer(bytes(status), np.uint8) == OK)
    in_order = np.sort(images[usable])
    if (in_order[1:] != in_order[:-1]).all():  # the usual case; the rest takes several times the memory
        return None
    _, index, which = np.unique(images[usable], return_index=True, return_inverse=True)
    first = np.arange(len(images))  # unusable rows are not joined
    first[usable] = usable[index][which]
    return first


def _joined(rows: _RowWriter, first: NDArray[np.int64], folder: Path) -> tuple[_RowWriter, NDArray[np.int64]]:
    """Rewrite the file with one text per sample, and return the first row of each sample, int64 [N]."""
    order = np.argsort(first, kind="stable")
    cuts = [0, *(np.flatnonzero(np.diff(first[order])) + 1).tolist(), len(order)]
    with TemporaryFile(dir=folder) as before:
        rows.file.seek(LISTING_HEADER_BYTES)
        shutil.copyfileobj(rows.file, before)
        before.flush()
        rows.file.seek(LISTING_HEADER_BYTES)
        rows.file.truncate()
        joined, numbers = _RowWriter(rows.file), array("q")
        for begin, end in pairwise(cuts):
            same: dict[str, list[bytes]] = {}  # image → texts, as two images may share a hash
            members = order[begin:end].tolist()
            for row in members:
                text = os.pread(before.fileno(), rows.start[row + 1] - rows.start[row], rows.start[row])
                same.setdefault(json.loads(text)[0] if len(members) > 1 else "", []).append(text)
            for texts in same.values():
                joined.add(_joined_text(texts), rows.status[members[0]])
                numbers.append(members[0])
    return joined, np.array(numbers, np.int64)


def _joined_text(texts: list[bytes]) -> bytes:
    """Join the texts of an image: all captions, and the fields with the same value in all."""
    if len(texts) == 1:
        return texts[0]
    image, captions, fields = json.loads(texts[0])
    for text in texts[1:]:
        _, more, others = json.loads(text)
        captions += more
        fields = {key: value for key, value in fields.items() if key in others and others[key] == value}
    return _encoded(ListingRow(image, captions, fields, OK))


def _refuse_unusable(layout: Layout, status: bytearray) -> None:
    if OK in status:
        return
    found = ", ".join(f"{status.count(code):,}: {reason}" for code, reason in enumerate(ROW_REASONS) if code in status)
    hint = f"; {one_line(layout.hint())}" if layout.hint() else ""
    raise UserError(f"{layout.where}: none of its rows can be used{f' ({found})' if found else ': it has none'}{hint}")


def _with_bar(layout: Layout, progress: bool) -> Iterator[Fields | None]:
    """Yield the rows of a layout; their number and the ETA are shown on standard error."""
    name, begun = f"indexing {layout.where.name}", time.monotonic()
    with ProgressDisplay(active=progress) as display:
        bar = display.add(name, layout.total or None, text="0 rows")
        count = done = 0
        for count, (fields, done) in enumerate(layout.rows(), 1):
            if count % HEAD_ROWS == 0:
                text = f"{count:,} rows"
                if layout.total and done:
                    text += f"  ETA {clock((time.monotonic() - begun) / done * (layout.total - done))}"
                display.update(bar, done, text)
                display.plain_line(f"{name}  {text}")
            yield fields
        display.update(bar, done, f"{count:,} rows")
        display.plain_line(f"{name}  {count:,} rows", due=True)


def _validated(rows: Iterator[Fields | None], layout: Layout, settings: Settings) -> Iterator[ListingRow]:
    head = list(islice(rows, HEAD_ROWS))
    image_key, caption_key = _keys(head, layout, settings)
    _refuse_addresses(head, layout, image_key)
    for fields in chain(head, rows):
        yield _validate(fields, image_key, caption_key)


class MissingKeys(UserError):
    """Rows without a key of image or caption, or of both.

    Attributes:
        flags: of `disttempnet data index` that name the keys: those that were given or found, else likely ones.
    """

    def __init__(self, message: str, flags: Sequence[str]) -> None:
        super().__init__(message)
        self.flags = flags


def _keys(head: Sequence[Fields | None], layout: Layout, settings: Settings) -> tuple[str, str]:
    """Return the keys of image and caption: the layout's, or the named ones, or the first usual ones of the first rows.

    Raises:
        MissingKeys: one or both are missing; the message names all that is missing.
        UserError: no row has named fields, or the file is of a kind without captions.
    """
    keys = dict.fromkeys(key for fields in head for key in fields or ())
    image = layout.image_key or find_key(keys, settings.image_key, IMAGE_KEYS)
    caption = layout.caption_key or find_key(keys, settings.caption_key, CAPTION_KEYS)
    if image is not None and caption is not None:
        return image, caption
    _refuse_addresses(head, layout, "")
    named = (settings.image_key if image is None else "") or (settings.caption_key if caption is None else "")
    if not keys:
        hint = f"; {one_line(layout.hint())}" if layout.hint() else ""
        raise UserError(f"{layout.where}: none of its rows can be used: they have no named fields{hint}")
    if not named and (kind := mistaken_for(keys)):
        raise UserError(f"{layout.where}: {kind}")
    lacks, flags, likely = [], [], likely_keys(head, image, caption)
    for flag, found, given, usual, guess in (
        ("image", image, settings.image_key, IMAGE_KEYS, likely[0]),
        ("caption", caption, settings.caption_key, CAPTION_KEYS, likely[1]),
    ):
        if found is None:
            lacks.append(f"'{given}'" if given else f"{flag}s (any of {', '.join(usual)})")
        if found is None or (given and not getattr(layout, f"{flag}_key")):
            flags += [f"--{flag}-key", found or guess or "KEY"]
    message = f"{layout.where}: no row has {' nor '.join(lacks)}; its keys are {_some(keys)}"
    raise MissingKeys(message, flags)


def _some(keys: Iterable[str]) -> str:
    shown = [one_line(key if len(key) < 40 else key[:39] + "…") for key in keys]
    return ", ".join(shown[:20]) + (", …" if len(shown) > 20 else "")


def _refuse_addresses(head: Sequence[Fields | None], layout: Layout, image_key: str) -> None:
    """Raise UserError for a list of URLs, such as the public ones of CC3M (without a header) and CC12M."""
    first = next(iter(head), None) or {}
    texts = [first.get(image_key)] if image_key else [*first, *first.values()]
    if any(isinstance(text, str) and text.startswith(("http://", "https://")) for text in texts):
        raise UserError(f"{layout.where}: {ADDRESSES}")


def _validate(fields: Fields | None, image_key: str, caption_key: str) -> ListingRow:
    if fields is None:
        return ListingRow("", [], {}, BAD_ROW)
    image, captions = fields.get(image_key), fields.get(caption_key)
    image_status = _image_status(image)
    texts: Any = [captions] if isinstance(captions, str) else captions
    nulls = 0
    if isinstance(captions, list):
        texts, nulls = _sentences(captions)
    caption_status = NO_CAPTION if captions is None else _caption_status(texts)
    others = {key: value for key, value in fields.items() if key not in (image_key, caption_key)}
    kept = [text for caption in texts if (text := visible_text(caption))] if caption_status == OK else []
    image = str(image) if image_status in (OK, OUTSIDE, NO_BYTES) else ""
    return ListingRow(image, kept, others, image_status or caption_status, nulls)


def _sentences(captions: list[Any]) -> tuple[list[Any], int]:
    """Return the captions of a list, extracted from objects ({raw: …}), and the number of null ones."""
    if all(isinstance(text, str) for text in captions):
        return captions, 0
    texts = []
    for caption in captions:
        if isinstance(caption, dict):
            caption = next((caption[key] for key in SENTENCE_KEYS if key in caption), caption)
        if caption is not None and caption == caption:  # pandas writes NaN for null
            texts.append(caption)
    return texts, len(captions) - len(texts)


def _encoded(row: ListingRow) -> bytes:
    # the image in ASCII, as it may not be UTF-8
    text = f"[{ASCII.encode(row.image)}, {UNICODE.encode(row.captions)}, {UNICODE.encode(row.fields)}]"
    return text.encode("utf-8", "replace")


def _image_status(image: Any) -> int:
    if image is None or image == "":
        return NO_IMAGE
    if not isinstance(image, str) or "\0" in image:
        return BAD_IMAGE
    if isinstance(image, NoBytes):
        return NO_BYTES
    try:
        os.fsencode(image)
    except UnicodeEncodeError:
        return BAD_IMAGE
    return OUTSIDE if leaves_the_folder(image) else OK


def leaves_the_folder(image: str) -> bool:
    """Tell whether a relative path leaves its root by `..`."""
    return not os.path.isabs(image) and os.path.normpath(image).split(os.sep)[0] == os.pardir


def _caption_status(captions: Any) -> int:
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        return WRONG_CAPTION
    try:
        for text in captions:
            text.encode("utf-8")
    except UnicodeEncodeError:
        return BAD_CAPTION
    return OK if any(map(visible_text, captions)) else EMPTY_CAPTION
