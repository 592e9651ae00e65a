"""Tars of evaluation data, as byte ranges; a sample is all files with one name up to the first dot of it.

Where that gives no image, up to the last dot: names such as `mr. b 001.jpg` and `shot_v1.3.jpg`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from disttempnet.data.shards.names import (
    HEADER,
    IMAGE_SUFFIXES,
    MAX_TEXT,
    BrokenTar,
    read_member,
    split_at_last_dot,
    split_name,
)
from disttempnet.errors import UserError
from disttempnet.io.files import open_regular

SCAN_THREADS = 16  # tars are indexed side by side: on a network disk each header is a wait


class Span(NamedTuple):
    """A file in a tar: its place and size in bytes; `content` where it is no image, and not too large for a text."""

    offset: int
    size: int
    content: bytes | None


class Tar(NamedTuple):
    """What a tar holds: key → suffix → file, in order; `note` says what is wrong with it, if anything is."""

    samples: dict[str, dict[str, Span]]
    note: str


def read_tar(path: Path) -> Tar:
    """Index a tar by one look at each of its headers, which brings small files along: labels, captions, metadata.

    One that is cut off gives what comes before.

    Raises:
        OSError: it cannot be read.
    """
    samples: dict[str, dict[str, Span]] = {}
    dotted: dict[str, list[tuple[str, Span]]] = {}  # of a key: names whose suffix by the first dot has another dot
    note = ""
    descriptor = open_regular(path)
    try:
        end, offset = os.fstat(descriptor).st_size, 0
        while (member := read_member(descriptor, offset)) is not None:
            offset = member.after
            if member.data + member.size > end:
                raise BrokenTar(f"cut off at byte {end:,}, inside {member.name}")
            if not member.is_file:
                continue
            key, suffix = split_name(member.name)
            content: bytes | None = member.block[HEADER : HEADER + member.size]
            if suffix in IMAGE_SUFFIXES or member.size > MAX_TEXT:
                content = None
            elif len(content or b"") < member.size:
                content = os.pread(descriptor, member.size, member.data)
            span = Span(member.data, member.size, content)
            samples.setdefault(key, {}).setdefault(suffix, span)
            if "." in suffix:
                dotted.setdefault(key, []).append((member.name, span))
    except BrokenTar as error:
        note = str(error)
    finally:
        os.close(descriptor)
    return Tar(_by_the_last_dot(samples, dotted), note)


def _by_the_last_dot(
    samples: dict[str, dict[str, Span]], dotted: Mapping[str, Sequence[tuple[str, Span]]]
) -> dict[str, dict[str, Span]]:
    """The samples, those without an image divided again by the last dot of their names where that gives images."""
    result: dict[str, dict[str, Span]] = {}
    for key, members in samples.items():
        parts: dict[str, dict[str, Span]] = {}
        for name, span in dotted.get(key, ()):
            stem, suffix = split_at_last_dot(name)
            parts.setdefault(stem, {}).setdefault(suffix, span)
        if image_of(members) or not any(image_of(part) for part in parts.values()):
            result[key] = members
            continue
        if rest := {suffix: span for suffix, span in members.items() if "." not in suffix}:
            result[key] = rest
        result |= parts
    return result


def image_of(members: Mapping[str, Span]) -> Span | None:
    """The first image among the files of a sample."""
    return next((span for suffix, span in members.items() if suffix in IMAGE_SUFFIXES), None)


def has_tars(folder: Path) -> bool:
    """Whether a task's folder has tars: test/*.tar."""
    return any(not path.name.startswith(".") for path in (folder / "test").glob("*.tar"))


def task_tars(folder: Path) -> tuple[list[Path], list[str]]:
    """All tars of a folder, 0.tar, 1.tar, … 10.tar, and what is odd about their number."""
    shards = [path for path in folder.glob("*.tar") if not path.name.startswith(".")]
    shards.sort(key=lambda path: (len(path.name), path.name))
    if not shards:
        raise UserError(f"{folder}: holds no .tar")
    path, notes = folder / "nshards.txt", []
    text = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else None
    if text is None:
        notes.append(f"nshards.txt is missing; all {len(shards)} tars are read")
    elif text != str(len(shards)):
        notes.append(f"nshards.txt says {text or 'nothing'}; all {len(shards)} tars that are there are read")
    return shards, notes


def members_of(shards: Sequence[Path], broken: list[str]) -> Iterator[tuple[str, Path, Mapping[str, Span]]]:
    """(SHARD/KEY, shard, its files) of all samples; a tar that is cut off is named in `broken`."""
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        for shard, tar in zip(shards, pool.map(_read_tar, shards), strict=True):
            if tar.note:
                broken.append(f"{shard.name}: {tar.note}")
            for key, members in tar.samples.items():
                yield f"{shard.name}/{key}", shard, members


def _read_tar(path: Path) -> Tar:
    try:
        return read_tar(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
