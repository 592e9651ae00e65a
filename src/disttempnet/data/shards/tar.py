"""Members of a tar as byte ranges, and the keys that group them to samples.

A walk reads one header per member, no content. A sample is a group of members with the same key: the name up to the
first dot (webdataset's rule), or up to the last dot where the first gives no sample. scan.py groups consecutive members
for training, evaluation/tars.py all members of a tar.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from disttempnet.data.images import IMAGE_SUFFIXES

HEADER = 512  # bytes of a tar header; data is padded to a multiple of it
MAX_EXTENSION = 1 << 20  # bytes of a long name or pax header
READ_AHEAD = 2048  # one read brings a header and most captions
# headers whose data describes the next member
EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)


class Member(NamedTuple):
    """File, link or folder in a tar; byte offsets from the beginning of the tar.

    Attributes:
        name: its path in the tar.
        start: offset of its first header.
        data: offset of its content.
        size: bytes of its content.
        after: offset of the next header.
        block: what was read from its last header on: the header, and the beginning of the content.
        is_file: it is a regular file.
        is_complete: the tar does not end inside its content.
    """

    name: str
    start: int
    data: int
    size: int
    after: int
    block: bytes
    is_file: bool
    is_complete: bool = True

    def content(self, descriptor: int) -> bytes:
        """Return its content, shorter than `size` if the tar is cut off; without a read where `block` has all of it."""
        content = self.block[HEADER : HEADER + self.size]
        return content if len(content) == self.size else os.pread(descriptor, self.size, self.data)


class BrokenTar(Exception):
    """No tar member can be read at an offset; the message says where and why."""


def walk_tar(descriptor: int) -> Iterator[Member]:
    """Yield the files of a tar in order. A file that is cut off by the end of the tar comes last, not complete.

    Raises:
        BrokenTar: after the last file, where the tar is cut off or damaged.
        OSError: it cannot be read.
    """
    end, offset = os.fstat(descriptor).st_size, 0
    while (member := read_member(descriptor, offset)) is not None:
        is_complete = member.data + member.size <= end
        if member.is_file:
            yield member if is_complete else member._replace(is_complete=False)
        if not is_complete:
            raise BrokenTar(f"cut off at byte {end:,}, inside {member.name}")
        offset = member.after


def read_member(descriptor: int, offset: int) -> Member | None:
    """Return the member whose header is at an offset; None at the end-of-archive mark.

    Raises:
        BrokenTar: the file ends inside a header, or there is no header.
    """
    start, long_name, long_size = offset, None, None
    while True:
        block = os.pread(descriptor, READ_AHEAD, offset)
        if len(block) < HEADER:
            end = os.fstat(descriptor).st_size
            raise BrokenTar(f"ends at byte {end:,} without an end-of-archive mark")
        try:
            info = tarfile.TarInfo.frombuf(block[:HEADER], "utf-8", "replace")
        except tarfile.TarError as error:
            if block[:HEADER].count(0) == HEADER:
                return None
            raise BrokenTar(f"no tar header at byte {offset:,} ({error})") from None
        if info.size < 0:
            raise BrokenTar(f"negative size in the header at byte {offset:,}")
        data = offset + HEADER
        if info.type not in EXTENSIONS:
            break
        if info.size > MAX_EXTENSION:
            raise BrokenTar(f"extended header of {info.size:,} bytes at byte {offset:,}")
        extension = os.pread(descriptor, info.size, data)
        if info.type == tarfile.GNUTYPE_LONGNAME:
            long_name = extension.rstrip(b"\0").decode("utf-8", "replace")
        elif info.type == tarfile.XHDTYPE:
            records = dict(_pax_records(extension))
            long_name = records.get("path", long_name)
            long_size = int(records["size"]) if records.get("size", "").isdecimal() else None
        offset = data + _padded(info.size)
    size = info.size if long_size is None else long_size
    if not info.isreg():
        size = 0  # links and folders carry no data, whatever their header says
    return Member(long_name or info.name, start, data, size, data + _padded(size), block, info.isreg())


def _padded(size: int) -> int:
    return -(-size // HEADER) * HEADER


def _pax_records(data: bytes) -> Iterator[tuple[str, str]]:
    """Yield records of the form `LENGTH KEY=VALUE` and a newline, LENGTH counting all of it."""
    while match := re.match(rb"(\d+) ([^=]+)=", data):
        length = int(match[1])
        if length <= match.end():
            return
        yield match[2].decode("utf-8", "replace"), data[match.end() : length - 1].decode("utf-8", "replace")
        data = data[length:]


def split_name(name: str) -> tuple[str, str]:
    """Split at the first dot: `folder/0001.seg.png` → (`folder/0001`, `seg.png`), the suffix in lower case."""
    folder, slash, base = name.rpartition("/")
    key, _, suffix = base.partition(".")
    return folder + slash + key, suffix.lower()


def split_at_last_dot(name: str) -> tuple[str, str]:
    """Split at the last dot: `folder/mr. b.png` → (`folder/mr. b`, `png`), for names with other dots."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.rpartition(".")
    return folder + slash + stem, suffix.lower()


def role_of(suffix: str) -> int | None:
    """Return the part of a sample that a suffix stands for: 0 image, 1 caption, 2 JSON; None for others."""
    if suffix in IMAGE_SUFFIXES:
        return 0
    return {"txt": 1, "json": 2}.get(suffix)


def sample_key(name: str) -> str:
    """Return the key of the sample whose first member has this name."""
    key, suffix = split_name(name)
    return key if role_of(suffix) is not None else split_at_last_dot(name)[0]
