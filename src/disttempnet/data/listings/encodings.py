"""Encoding of a text file: by its byte-order mark, else UTF-8, else Windows-1252 if its bytes look like it."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from disttempnet.errors import UserError

ENCODING_NAMES = {  # encodings that a note names
    "utf-16": "UTF-16",
    "utf-16-le": "UTF-16 without a byte-order mark",
    "utf-16-be": "UTF-16 without a byte-order mark",
    "utf-32": "UTF-32",
    "cp1252": "Windows-1252 (Latin-1), as it is not UTF-8",
}
ESCAPED = ("utf-8-sig", "cp1252")  # invalid bytes are kept as surrogates
MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16"} | {
    codecs.BOM_UTF16_BE: "utf-16"
}
HEAD_BYTES = 4096
DECODE_BYTES = 1 << 22  # bytes read at once
_HIGH = re.compile(rb"[\x80-\xff]+")
# one or two letters, or a quotation mark, beside ASCII letters: not words of Russian, nor pairs of Chinese
_WESTERN = re.compile(
    rb"(?<=[A-Za-z])[\x91-\x97\xa0-\xff]{1,2}(?![\x80-\xff])|(?<![\x80-\xff])[\x91-\x97\xa0-\xff]{1,2}(?=[A-Za-z])"
)
_UTF8 = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")


def encoding_of(path: Path) -> str:
    """Return Python's name of the encoding.

    A file that is not UTF-8 is Windows-1252 if its high bytes are single letters in words and none form a UTF-8
    character. Otherwise they are damage, which the caller reports.

    Raises:
        UserError: the file is not text.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        for mark, encoding in MARKS.items():
            if head.startswith(mark):
                return encoding
        if b"\0" in head and (encoding := _without_mark(head, path)) != "utf-8-sig":
            return encoding
        if head.startswith(b"version https://git-lfs"):
            raise UserError(f"{path}: is a Git LFS pointer, not the file itself; get it with git lfs pull")
        file.seek(0)
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            while chunk := file.read(DECODE_BYTES):
                decoder.decode(chunk)
            return "utf-8-sig"
        except UnicodeDecodeError:
            pass
        file.seek(0)
        return "cp1252" if _is_latin(file.read(DECODE_BYTES * 16)) else "utf-8-sig"


def _without_mark(head: bytes, path: Path) -> str:
    """Detect UTF-16 without a mark: nearly every other byte is zero."""
    even, odd = head[::2].count(0), head[1::2].count(0)
    if max(even, odd) > 0.4 * len(head) and min(even, odd) < 0.05 * len(head):
        return "utf-16-le" if odd > even else "utf-16-be"
    if even + odd > 0.1 * len(head):
        raise UserError(f"{path}: is not text: {(even + odd) / len(head):.0%} of its first bytes are zero")
    return "utf-8-sig"


def _is_latin(text: bytes) -> bool:
    runs = sum(1 for _ in _HIGH.finditer(text))
    return runs > 0 and not _UTF8.search(text) and sum(1 for _ in _WESTERN.finditer(text)) >= 0.8 * runs
