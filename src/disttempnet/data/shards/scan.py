"""Scan of one shard: its samples as byte ranges, with status and statistics."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from disttempnet.data.headers import image_header
from disttempnet.data.shards.tar import (
    HEADER,
    READ_AHEAD,
    BrokenTar,
    Member,
    role_of,
    split_at_last_dot,
    split_name,
    walk_tar,
)
from disttempnet.data.source import MAX_TEXT, OK, UnreadableCaption, usable_captions
from disttempnet.errors import UserError
from disttempnet.io.files import open_regular
from disttempnet.io.machine import cause

# reasons why a sample cannot be used; the status of a sample is an index into this tuple, 0 is usable
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
    f"its .txt or .json is over {MAX_TEXT >> 20} MiB",
)
UNGROUPED_SHOWN = 3  # names of members without a sample that a message shows
NO_IMAGE, NO_CAPTION, CUT_OFF, TOO_LARGE, LONG_TEXT = 1, 2, 5, 6, 9

# [count, sum, lowest, highest] of a statistic by name: `jpg` (images of a format), `image bytes`, …
Tally = dict[str, list[int]]


def add_to(tally: Tally, name: str, value: int) -> None:
    """Add a value to a statistic."""
    merge_tally(tally, {name: [1, value, value, value]})


def merge_tally(tally: Tally, other: Tally) -> None:
    """Add a second tally to the first, in place."""
    for name, (count, total, low, high) in other.items():
        if name in tally:
            was = tally[name]
            tally[name] = [was[0] + count, was[1] + total, min(was[2], low), max(was[3], high)]
        else:
            tally[name] = [count, total, low, high]


def json_captions(data: bytes, key: str) -> tuple[str, ...]:
    """Return the captions under a key of a sample's .json: a string, or a list of strings.

    Raises:
        UnreadableCaption: the message is one of `REASONS`.
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
    values = [text for text in value if text is not None] if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in values):
        raise UnreadableCaption("caption is not a text")
    return usable_captions(values)


@dataclass
class ShardScan:
    """Samples of one shard, in tar order.

    Attributes:
        start: byte offset of each sample's first header, n integers.
        spans: (offset from start, size) in bytes of image, caption and JSON of each sample; size 0 = absent.
        status: index into REASONS, n integers.
        tally: statistics of images and captions.
        note: damage of the shard; empty if there is none.
        ungrouped: names of images, captions and .json with several dots that belong to no sample.
    """

    start: list[int] = field(default_factory=list)
    spans: list[list[int]] = field(default_factory=list)
    status: list[int] = field(default_factory=list)
    tally: Tally = field(default_factory=dict)
    note: str = ""
    ungrouped: list[str] = field(default_factory=list)

    @property
    def about_ungrouped(self) -> str:
        """Message about `ungrouped`; empty if there are none."""
        named = ", ".join(self.ungrouped[:UNGROUPED_SHOWN]) + (", …" if len(self.ungrouped) > UNGROUPED_SHOWN else "")
        what = f"{len(self.ungrouped):,} files with several dots in their names belong to no sample"
        return f"{what}: {named}" if self.ungrouped else ""


class _Dotted(NamedTuple):
    """Member that is an image, caption or .json by the suffix after its last dot, not its first."""

    key: str  # up to the first dot
    stem: str  # up to the last
    suffix: str
    member: Member


def scan_shard(path: Path, caption_key: str = "") -> ShardScan:
    """Read all headers and captions of a shard; one that is cut off gives the samples before, and a note.

    Args:
        path: a .tar.
        caption_key: key of the samples' .json that holds their captions; empty = .txt.

    Raises:
        UserError: the file is not a tar or cannot be read.
    """
    try:
        descriptor = open_regular(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {cause(error)}") from None
    scan = ShardScan()
    try:
        _scan(scan, descriptor, caption_key)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)
    if scan.note and not scan.start:
        raise UserError(f"{path}: not a readable .tar shard: {scan.note}; replace it or remove it from data.train")
    _set_status(scan)
    return scan


def _scan(scan: ShardScan, descriptor: int, caption_key: str) -> None:
    key: str | None = None  # of the sample that the walk is in
    seen: set[str] = set()  # its suffixes
    keys: set[str] = set()  # of all samples
    dotted: list[_Dotted] = []
    try:
        for member in walk_tar(descriptor):
            member_key, suffix = split_name(member.name)
            role = role_of(suffix)
            if role is not None:
                if member_key != key or suffix in seen:
                    key, seen = member_key, set()
                    keys.add(member_key)
                    _begin(scan, member)
                seen.add(suffix)
                _add(scan, role, member, descriptor, caption_key)
            elif one := _dotted(member_key, member):
                dotted.append(one)
    except BrokenTar as error:
        scan.note = str(error)
    _add_dotted(scan, dotted, keys, descriptor, caption_key)


def _begin(scan: ShardScan, member: Member) -> None:
    scan.start.append(member.start)
    scan.spans.append([0] * 6)
    scan.status.append(NO_CAPTION)


def _dotted(key: str, member: Member) -> _Dotted | None:
    stem, suffix = split_at_last_dot(member.name)
    hidden = not key or key.endswith("/")  # ._0001.jpg of macOS
    # its content is dropped here and read again if needed: most shards have no such member, or one beside each image
    return None if hidden or role_of(suffix) is None else _Dotted(key, stem, suffix, member._replace(block=b""))


def _add_dotted(
    scan: ShardScan, dotted: Sequence[_Dotted], keys: Collection[str], descriptor: int, caption_key: str
) -> None:
    """Add samples of consecutive members with the same name up to the last dot.

    They have to be complete, and no other sample may have their name up to the first dot: `0001.seg.png` beside
    `0001.jpg` belongs to that one.
    """
    # runs of members with one stem and different suffixes
    runs: list[list[_Dotted]] = []
    for one in dotted:
        if not runs or one.stem != runs[-1][0].stem or one.suffix in {other.suffix for other in runs[-1]}:
            runs.append([])
        runs[-1].append(one)

    # a run is a sample, or its members are counted as ungrouped
    for run in runs:
        roles = {role_of(one.suffix) for one in run}
        complete = {0, 2 if caption_key else 1} <= roles
        cut_off = scan.note and run is runs[-1] and run[0].member.start > max(scan.start, default=-1)
        if (complete or cut_off) and run[0].key not in keys:
            _begin(scan, run[0].member)
            for one in run:
                role = role_of(one.suffix)
                assert role is not None
                _add(scan, role, one.member, descriptor, caption_key)
        elif complete or (run[0].key not in keys and roles & {0, 1}):
            scan.ungrouped += [one.member.name for one in run]

    # back to tar order
    order = sorted(range(len(scan.start)), key=scan.start.__getitem__)
    scan.start, scan.spans, scan.status = (
        [scan.start[n] for n in order],
        [scan.spans[n] for n in order],
        [scan.status[n] for n in order],
    )


def _add(scan: ShardScan, role: int, member: Member, descriptor: int, caption_key: str) -> None:
    """Add a member to the last sample; of several images the first counts."""
    spans, start = scan.spans[-1], scan.start[-1]
    if role == 0 and spans[1]:
        return
    spans[2 * role : 2 * role + 2] = member.data - start, member.size
    if role == 0 and member.size:
        head = member.block[HEADER : HEADER + member.size]
        format, size = image_header(head or os.pread(descriptor, READ_AHEAD, member.data))
        add_to(scan.tally, format, 1)
        add_to(scan.tally, "image bytes", member.size)
        for name, pixels in zip(("image width", "image height"), size or (), strict=False):
            add_to(scan.tally, name, pixels)
    elif role == (2 if caption_key else 1):
        if member.size > MAX_TEXT:
            scan.status[-1] = LONG_TEXT
            return
        scan.status[-1] = _caption_status(member.content(descriptor), member.size, caption_key, scan.tally)


def _caption_status(content: bytes, size: int, caption_key: str, tally: Tally) -> int:
    """Return the status of a sample with an image and this .txt or .json, and add its captions to the tally."""
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


def _set_status(scan: ShardScan) -> None:
    """Set the statuses that depend on the whole sample; the last one of a cut-off shard is cut off."""
    for sample, spans in enumerate(scan.spans):
        if not spans[1]:
            scan.status[sample] = NO_IMAGE
        if max(spans) > np.iinfo(np.uint32).max:
            scan.status[sample], scan.spans[sample] = TOO_LARGE, [0] * 6
    if scan.note and (scan.status[-1] != OK or scan.note.startswith("cut off")):
        scan.status[-1] = CUT_OFF
