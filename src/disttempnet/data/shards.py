"""Webdataset shards on disk: which files a spec names, and what one .tar holds, as byte ranges.

A sample is a run of consecutive members with the same name up to the first dot (webdataset's rule).
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from disttempnet.data.embedded import embedded_shards
from disttempnet.data.scenes import generated_shards
from disttempnet.errors import UserError

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
HEADER = 512  # bytes of a tar header, and what a member's data is padded to
MAX_EXTENSION = 1 << 20  # bytes of a long name or pax header; more is not one
READ_AHEAD = 2048  # one read brings a header and most captions
FINGERPRINT_BYTES = 64 * 1024

# why a sample cannot be used; its code is its place in this list, 0 is usable
REASONS = (
    "ok",
    "no image",
    "no caption",
    "empty caption",
    "caption is not UTF-8",
    "cut off by the end of the shard",
    "spans more than 4 GiB",
)
OK, NO_IMAGE, NO_CAPTION, EMPTY_CAPTION, BAD_CAPTION, CUT_OFF, TOO_LARGE = range(len(REASONS))


@dataclass(frozen=True)
class ShardList:
    """Shards of one folder, in the order that gives samples their ids.

    Attributes:
        folder: where they are.
        names: file names.
        label: file name of the spec, without braces and suffix; `all` for a whole folder.
    """

    folder: Path
    names: tuple[str, ...]
    label: str


def resolve_shards(spec: str) -> ShardList:
    """The shards that a spec names; all of them exist.

    Args:
        spec: a folder (its *.tar, sorted by name), a path with ranges in its file name
            (`cc12m/{00000..01242}.tar`, zero-padded as written), `embedded:DATASET/SPLIT`, or
            `generated:DATASET/SPLIT`.

    Raises:
        UserError: nothing is there, or a shard of the pattern is missing.
    """
    if spec.startswith("embedded:"):
        spec = str(embedded_shards(spec.removeprefix("embedded:")))
    elif spec.startswith("generated:"):
        spec = str(generated_shards(spec.removeprefix("generated:")))
    path = Path(spec).expanduser()
    if path.is_dir():
        names = sorted(entry.name for entry in path.glob("*.tar") if not entry.name.startswith("."))
        if not names:
            raise UserError(f"{path}: no .tar shards in this folder; set data.train to one that holds them")
        return ShardList(path, tuple(names), "all")
    if path.suffix != ".tar":
        raise UserError(
            f"{path}: no such folder; set data.train to a folder of .tar shards, a pattern such as "
            "FOLDER/{00000..01242}.tar, embedded:emoji/train, or generated:scenes/train"
        )
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder, named by data.train = '{spec}'")
    expanded = tuple(expand_braces(path.name))
    missing = [name for name in expanded if not (path.parent / name).is_file()]
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(
            f"{path.parent / missing[0]}: no such shard{others}; '{path.name}' names {len(expanded)}: "
            "restore the missing ones or narrow the pattern"
        )
    return ShardList(path.parent, expanded, re.sub(r"[{}]", "", path.stem))


def expand_braces(pattern: str) -> Iterator[str]:
    """`a{08..10}.tar` → a08.tar, a09.tar, a10.tar; several ranges nest, the last runs fastest."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        if "{" in pattern:
            raise UserError(f"'{pattern}': braces hold a range of numbers, such as {{00000..01242}}")
        yield pattern
        return
    first, last = match.groups()
    if int(first) > int(last):
        raise UserError(f"'{pattern}': the range {match.group()} runs backwards")
    for number in range(int(first), int(last) + 1):
        for rest in expand_braces(pattern[match.end() :]):
            yield f"{pattern[: match.start()]}{number:0{len(first)}d}{rest}"


def fingerprint(path: Path) -> str:
    """blake2b of a file's size and its first and last 64 KiB: cheap, and finds rewritten shards."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=16)
        digest.update(file.read(FINGERPRINT_BYTES))
        file.seek(max(0, size - FINGERPRINT_BYTES))
        digest.update(file.read(FINGERPRINT_BYTES))
    return digest.hexdigest()


class Member(NamedTuple):
    """One file in a tar: `start` is its first header, `data` its first byte, `after` the next header."""

    name: str
    start: int
    data: int
    size: int
    after: int
    block: bytes  # what was read from the last header on
    is_file: bool


class BrokenTar(Exception):
    """What follows an offset cannot be read as a tar member; the message says where and why."""


def read_member(descriptor: int, offset: int) -> Member | None:
    """The member whose header is at an offset; None at the end-of-archive mark.

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
        if info.type not in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE):
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
    """Records of the form `LENGTH KEY=VALUE` and a newline, LENGTH counting all of it."""
    while match := re.match(rb"(\d+) ([^=]+)=", data):
        length = int(match[1])
        if length <= match.end():
            return
        yield match[2].decode("utf-8", "replace"), data[match.end() : length - 1].decode("utf-8", "replace")
        data = data[length:]


def split_name(name: str) -> tuple[str, str]:
    """`folder/0001.seg.png` → (`folder/0001`, `seg.png`); the suffix in lower case, empty if there is none."""
    folder, slash, base = name.rpartition("/")
    key, _, suffix = base.partition(".")
    return folder + slash + key, suffix.lower()


@dataclass
class ShardScan:
    """The samples of one shard, in tar order.

    Attributes:
        start: byte of a sample's first header, n integers.
        spans: per sample (offset from start, size) in bytes of image, caption and JSON; size 0 = absent.
        status: place in REASONS, n integers.
        note: what is wrong with the shard as a whole; empty if nothing is.
    """

    start: list[int] = field(default_factory=list)
    spans: list[list[int]] = field(default_factory=list)
    status: list[int] = field(default_factory=list)
    note: str = ""


def scan_shard(path: Path) -> ShardScan:
    """Read all headers and captions of a shard; one that is cut off gives what comes before, and a note.

    Raises:
        UserError: the file is not a tar.
    """
    scan, key = ShardScan(), None
    seen: set[str] = set()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        end, offset = os.fstat(descriptor).st_size, 0
        while (member := read_member(descriptor, offset)) is not None:
            member_key, suffix = split_name(member.name)
            kind = _kind(suffix) if member.is_file else None
            offset = member.after
            if kind is not None:
                if member_key != key or suffix in seen:
                    key, seen = member_key, set()
                    scan.start.append(member.start)
                    scan.spans.append([0] * 6)
                    scan.status.append(NO_CAPTION)
                seen.add(suffix)
                _add(scan, kind, member, descriptor)
            if member.data + member.size > end:
                raise BrokenTar(f"cut off at byte {end:,}, inside {member.name}")
    except BrokenTar as error:
        if not scan.start:
            raise UserError(
                f"{path}: not a readable .tar shard: {error}; replace it or take it out of data.train"
            ) from None
        scan.note = str(error)
    finally:
        os.close(descriptor)
    _judge(scan)
    return scan


def _kind(suffix: str) -> int | None:
    """Which span a member fills: 0 image, 1 caption, 2 JSON; None for what training does not use."""
    if suffix in IMAGE_SUFFIXES:
        return 0
    return {"txt": 1, "json": 2}.get(suffix)


def _add(scan: ShardScan, kind: int, member: Member, descriptor: int) -> None:
    """Note a member's place in the last sample; of several images the first counts."""
    spans, start = scan.spans[-1], scan.start[-1]
    if kind == 0 and spans[1]:
        return
    spans[2 * kind : 2 * kind + 2] = member.data - start, member.size
    if kind == 1:
        caption = member.block[HEADER : HEADER + member.size]
        if len(caption) < member.size:
            caption = os.pread(descriptor, member.size, member.data)
        scan.status[-1] = _caption_status(caption, member.size)


def _caption_status(caption: bytes, size: int) -> int:
    if len(caption) < size:
        return CUT_OFF
    try:
        return OK if caption.decode("utf-8").strip() else EMPTY_CAPTION
    except UnicodeDecodeError:
        return BAD_CAPTION


def _judge(scan: ShardScan) -> None:
    """Settle the reasons that need the whole sample, and blame the cut for what the last one lacks."""
    for sample, spans in enumerate(scan.spans):
        if not spans[1]:
            scan.status[sample] = NO_IMAGE
        if max(spans) > np.iinfo(np.uint32).max:
            scan.status[sample], scan.spans[sample] = TOO_LARGE, [0] * 6
    if scan.note and (scan.status[-1] != OK or scan.note.startswith("cut off")):
        scan.status[-1] = CUT_OFF
