"""Tars of evaluation data as byte ranges; a sample is all files of a tar with the same name up to the first dot.

Where that gives no image, the last dot divides: names such as `mr. b 001.jpg` and `shot_v1.3.jpg`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from disttempnet.data.images import IMAGE_SUFFIXES
from disttempnet.data.shards.tar import BrokenTar, sample_key, split_at_last_dot, split_name, walk_tar
from disttempnet.data.source import MAX_TEXT
from disttempnet.errors import UserError
from disttempnet.io.files import open_regular

SCAN_THREADS = 16  # tars scanned at once: on a network disk each header is a wait


class Span(NamedTuple):
    """Byte range of a file in a tar; `content` if it is no image and small enough for a text."""

    offset: int
    size: int
    content: bytes | None


class Tar(NamedTuple):
    """Files of a tar by key and suffix.

    Attributes:
        samples: key → suffix → file, in order.
        note: what is wrong with the tar; empty if nothing is.
        repeated: keys of files whose name came before; these files are left out.
    """

    samples: dict[str, dict[str, Span]]
    note: str
    repeated: tuple[str, ...]


def read_tar(path: Path) -> Tar:
    """Index a tar by one look at each header, which brings small files along: labels, captions, metadata.

    A tar that is cut off gives the files before the cut.

    Raises:
        OSError: it cannot be read.
    """
    samples: dict[str, dict[str, Span]] = {}
    dotted: dict[str, list[tuple[str, Span]]] = {}  # key → files whose suffix by the first dot has another dot
    repeated: list[tuple[str, Span]] = []  # names that came before, the suffix in lower case
    note = ""
    descriptor = open_regular(path)
    try:
        for member in walk_tar(descriptor):
            if not member.is_complete:
                continue  # the walk raises next
            key, suffix = split_name(member.name)
            is_text = suffix not in IMAGE_SUFFIXES and member.size <= MAX_TEXT
            span = Span(member.data, member.size, member.content(descriptor) if is_text else None)
            if "." in suffix:
                dotted.setdefault(key, []).append((member.name, span))
            if samples.setdefault(key, {}).setdefault(suffix, span) is not span:
                repeated.append((member.name, span))
    except BrokenTar as error:
        note = str(error)
    finally:
        os.close(descriptor)
    divided = _by_the_last_dot(samples, dotted)
    # what repeats a name by its first dot may be a sample of its own by the last one: a.B.jpg and a.b.jpg
    read = {span.offset for members in divided.values() for span in members.values()}
    left_out = dict.fromkeys(sample_key(name) for name, span in repeated if span.offset not in read)
    return Tar(divided, note, tuple(left_out))


def _by_the_last_dot(
    samples: dict[str, dict[str, Span]], dotted: Mapping[str, Sequence[tuple[str, Span]]]
) -> dict[str, dict[str, Span]]:
    """Return the samples; one without an image is divided by the last dot of its names where that gives images."""
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
    """Return the first image among the files of a sample."""
    return next((span for suffix, span in members.items() if suffix in IMAGE_SUFFIXES), None)


def has_tars(folder: Path) -> bool:
    """Tell whether a task's folder has tars: test/*.tar."""
    return any(not path.name.startswith(".") for path in (folder / "test").glob("*.tar"))


def task_tars(folder: Path) -> tuple[list[Path], list[str]]:
    """Return all tars of a folder, 0.tar, 1.tar, … 10.tar, and notes if nshards.txt does not agree."""
    shards = [path for path in folder.glob("*.tar") if not path.name.startswith(".")]
    shards.sort(key=lambda path: (len(path.name), path.name))
    if not shards:
        raise UserError(f"{folder}: has no .tar")
    path, notes = folder / "nshards.txt", []
    text = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else None
    if text is None:
        notes.append(f"nshards.txt is missing; all {len(shards)} tars are read")
    elif text != str(len(shards)):
        notes.append(f"nshards.txt says {text or 'nothing'}; all {len(shards)} tars that are there are read")
    return shards, notes


def members_of(shards: Sequence[Path], broken: list[str]) -> Iterator[tuple[str, Path, Mapping[str, Span]]]:
    """Yield (SHARD/KEY, shard, its files) of all samples.

    Tars that are cut off, and keys that come twice in a tar, are appended to `broken`.
    """
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        for shard, tar in zip(shards, pool.map(_read_tar, shards), strict=True):
            if tar.note:
                broken.append(f"{shard.name}: {tar.note}")
            for key in tar.repeated:
                broken.append(f"{shard.name}/{key}: the key comes twice in this tar; only its first files are read")
            for key, members in tar.samples.items():
                yield f"{shard.name}/{key}", shard, members


def _read_tar(path: Path) -> Tar:
    try:
        return read_tar(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
