"""What one shard holds: its samples as byte ranges, which of them are usable, and how large they are."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from disttempnet.data.headers import image_header
from disttempnet.data.shards import HEADER, IMAGE_SUFFIXES, BrokenTar, Member, read_member, split_name
from disttempnet.data.source import OK, UnreadableCaption, usable_captions
from disttempnet.errors import UserError

# why a sample cannot be used; its code is its place in this list, 0 is usable
REASONS = (
    "ok",
    "no image",
    "no caption",
    "empty caption",
    "caption is not UTF-8",
    "cut off by the end of the shard",
    "spans more than 4 GiB",
    "its .json cannot be read",
    "caption is not a text",
)
NO_IMAGE, NO_CAPTION, CUT_OFF, TOO_LARGE = 1, 2, 5, 6

# Counts, and [count, sum, lowest, highest] of measures, by name: `jpg` and `image bytes`, for example.
Tally = dict[str, list[int]]


def add_to(tally: Tally, name: str, value: int) -> None:
    """Take one more value into a measure."""
    merge_tally(tally, {name: [1, value, value, value]})


def merge_tally(tally: Tally, other: Tally) -> None:
    """Take another tally into the first."""
    for name, (count, total, low, high) in other.items():
        if name in tally:
            was = tally[name]
            tally[name] = [was[0] + count, was[1] + total, min(was[2], low), max(was[3], high)]
        else:
            tally[name] = [count, total, low, high]


def json_captions(data: bytes, key: str) -> tuple[str, ...]:
    """The captions under a key of a sample's .json: a string, or a list of strings.

    Raises:
        UnreadableCaption: with the text of one of `REASONS`.
    """
    try:
        facts = json.loads(data)
    except UnicodeDecodeError:
        raise UnreadableCaption("caption is not UTF-8") from None
    except (ValueError, RecursionError):
        raise UnreadableCaption("its .json cannot be read") from None
    value = facts.get(key) if isinstance(facts, dict) else None
    if value is None or value == []:
        raise UnreadableCaption("no caption")
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in values):
        raise UnreadableCaption("caption is not a text")
    return usable_captions(values)


@dataclass
class ShardScan:
    """The samples of one shard, in tar order.

    Attributes:
        start: byte of a sample's first header, n integers.
        spans: per sample (offset from start, size) in bytes of image, caption and JSON; size 0 = absent.
        status: place in REASONS, n integers.
        tally: formats and measures of images and captions.
        note: what is wrong with the shard as a whole; empty if nothing is.
    """

    start: list[int] = field(default_factory=list)
    spans: list[list[int]] = field(default_factory=list)
    status: list[int] = field(default_factory=list)
    tally: Tally = field(default_factory=dict)
    note: str = ""


def scan_shard(path: Path, caption_key: str = "") -> ShardScan:
    """Read all headers and captions of a shard; one that is cut off gives what comes before, and a note.

    Args:
        path: a .tar.
        caption_key: key of the samples' .json that holds their captions; empty = .txt.

    Raises:
        UserError: the file is not a tar, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    scan = ShardScan()
    try:
        _scan(scan, descriptor, caption_key)
    except BrokenTar as error:
        if not scan.start:
            raise UserError(
                f"{path}: not a readable .tar shard: {error}; replace it or take it out of data.train"
            ) from None
        scan.note = str(error)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)
    _judge(scan)
    return scan


def _scan(scan: ShardScan, descriptor: int, caption_key: str) -> None:
    end, offset, key = os.fstat(descriptor).st_size, 0, None
    seen: set[str] = set()
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
            _add(scan, kind, member, descriptor, caption_key)
        if member.data + member.size > end:
            raise BrokenTar(f"cut off at byte {end:,}, inside {member.name}")


def _kind(suffix: str) -> int | None:
    """Which span a member fills: 0 image, 1 caption, 2 JSON; None for what training does not use."""
    if suffix in IMAGE_SUFFIXES:
        return 0
    return {"txt": 1, "json": 2}.get(suffix)


def _add(scan: ShardScan, kind: int, member: Member, descriptor: int, caption_key: str) -> None:
    """Note a member's place in the last sample; of several images the first counts."""
    spans, start = scan.spans[-1], scan.start[-1]
    if kind == 0 and spans[1]:
        return
    spans[2 * kind : 2 * kind + 2] = member.data - start, member.size
    content = member.block[HEADER : HEADER + member.size]
    if kind == 0 and member.size:
        format, size = image_header(content)
        add_to(scan.tally, format, 1)
        add_to(scan.tally, "image bytes", member.size)
        for name, pixels in zip(("image width", "image height"), size or (), strict=False):
            add_to(scan.tally, name, pixels)
    elif kind == (2 if caption_key else 1):
        if len(content) < member.size:
            content = os.pread(descriptor, member.size, member.data)
        scan.status[-1] = _caption_status(content, member.size, caption_key, scan.tally)


def _caption_status(content: bytes, size: int, caption_key: str, tally: Tally) -> int:
    """Code of a sample that has an image and this .txt or .json; counts its captions."""
    if len(content) < size:
        return CUT_OFF
    try:
        captions = json_captions(content, caption_key) if caption_key else usable_captions([content])
    except UnreadableCaption as error:
        return REASONS.index(str(error))
    add_to(tally, "captions a sample", len(captions))
    for caption in captions:
        add_to(tally, "caption characters", len(caption))
    return OK


def _judge(scan: ShardScan) -> None:
    """Settle the reasons that need the whole sample, and blame the cut for what the last one lacks."""
    for sample, spans in enumerate(scan.spans):
        if not spans[1]:
            scan.status[sample] = NO_IMAGE
        if max(spans) > np.iinfo(np.uint32).max:
            scan.status[sample], scan.spans[sample] = TOO_LARGE, [0] * 6
    if scan.note and (scan.status[-1] != OK or scan.note.startswith("cut off")):
        scan.status[-1] = CUT_OFF
