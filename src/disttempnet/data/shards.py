"""Webdataset shards on disk: which files a spec names, and what one .tar holds, as byte ranges.

A sample is a run of consecutive members with the same name up to the first dot (webdataset's rule); where that gives no
image and no caption, up to the last dot.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from disttempnet.data.embedded import embedded_shards
from disttempnet.data.remote import RemoteStore, is_remote
from disttempnet.data.scenes import generated_shards
from disttempnet.data.store import CACHE_GB, LocalStore, ShardStore, state_of
from disttempnet.errors import UserError

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
HEADER = 512  # bytes of a tar header, and what a member's data is padded to
MAX_EXTENSION = 1 << 20  # bytes of a long name or pax header; more is not one
PLAIN = re.compile(r"(?!all$)\w+|(\w*[^\W\d])?\{\d+\.\.\d+\}([^\W\d]\w*)?")  # patterns that need no digest as labels
# headers whose data is about the next one
EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
READ_AHEAD = 2048  # one read brings a header and most captions


@dataclass(frozen=True)
class ShardList:
    """Shards under one folder, in the order in which they were named.

    Attributes:
        folder: the innermost one that holds all of them.
        names: their paths from there.
        label: the spec from there on as a file name, the same for no other spec; `all` for a whole folder.
        remote: who fetches them into that folder; None = they are there.
    """

    folder: Path
    names: tuple[str, ...]
    label: str
    remote: RemoteStore | None = None

    @property
    def store(self) -> ShardStore:
        """Who opens them."""
        return self.remote or LocalStore(self.folder)


def resolve_shards(spec: str, cache: str = "", cache_gb: float = CACHE_GB) -> ShardList:
    """The shards that a spec names; all of them exist, unless they are remote.

    Args:
        spec: a folder (its *.tar, sorted by name), a path with braces in file or folder names
            (`cc12m/{00000..01242}.tar`, `{a,b}/{0..9}.tar`), `embedded:DATASET/SPLIT`, or `generated:DATASET/SPLIT`;
            or a URL of fsspec's, of a folder or with braces: `s3://bucket/cc12m/{00000..01242}.tar`.
        cache: remote shards: folder that they are kept in; empty = the user's cache.
        cache_gb: remote shards: gigabytes that all of that folder may take.

    Raises:
        UserError: nothing is there, or a shard of the pattern is missing.
    """
    if is_remote(spec):
        return _resolve_remote(spec, cache, cache_gb)
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
    depth = next((i for i, part in enumerate(path.parts) if "{" in part), len(path.parts) - 1)
    folder, pattern = Path(*path.parts[:depth]), "/".join(path.parts[depth:])
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, named by data.train = '{spec}'")
    expanded = tuple(expand_braces(pattern))
    there = {parent: _files_in(folder / parent) for parent in {name.rpartition("/")[0] for name in expanded}}
    missing = [name for name in expanded if name.rpartition("/")[2] not in there[name.rpartition("/")[0]]]
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(
            f"{folder / missing[0]}: no such shard{others}; '{pattern}' names {len(expanded)}: "
            "restore the missing ones or narrow the pattern"
        )
    if len(set(expanded)) < len(expanded):
        raise UserError(
            f"{folder}: '{pattern}' names a shard twice; data.train = [{{path = …, weight = 2}}] reads it so"
        )
    return ShardList(folder, expanded, _label(pattern))


def _resolve_remote(spec: str, cache: str, cache_gb: float) -> ShardList:
    if not spec.endswith(".tar"):
        store = RemoteStore(spec, cache, cache_gb)
        names = tuple(store.names())
        if not names:
            raise UserError(f"{spec}: no .tar shards there; name them, as in {spec.rstrip('/')}/{{00000..01242}}.tar")
        return ShardList(store.folder, names, "all", store)
    base = spec.partition("{")[0].rpartition("/")[0]
    pattern = spec[len(base) + 1 :]
    store = RemoteStore(base, cache, cache_gb)
    return ShardList(store.folder, tuple(expand_braces(pattern)), _label(pattern), store)


def _label(pattern: str) -> str:
    """A file name for a pattern, another one for each: readable alone where it is a word or one range of numbers."""
    pattern = pattern.removesuffix(".tar")
    name = re.sub(r"[{}]", "", pattern).replace("/", "-")
    if PLAIN.fullmatch(pattern):
        return name
    return f"{name}-{hashlib.blake2b(pattern.encode(), digest_size=4).hexdigest()}"


def _files_in(folder: Path) -> frozenset[str]:
    """Names in a folder, by one listing: on a network disk far cheaper than asking for each."""
    return frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()


def expand_braces(pattern: str) -> Iterator[str]:
    """Names that a pattern stands for, as a shell expands it: `a{08..10}` → a08, a09, a10; `{a,b}` → a, b.

    Several braces multiply, the last runs fastest. Numbers are padded to the longer end where one begins with 0.

    Raises:
        UserError: braces that hold something else, or a range that runs backwards.
    """
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        if "{" in pattern or "}" in pattern:
            raise UserError(f"'{pattern}': a brace has no partner")
        yield pattern
        return
    choices: Iterable[str] = match[1].split(",")
    if limits := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = limits.groups()
        if int(first) > int(last):
            raise UserError(f"'{pattern}': the range {match.group()} runs backwards")
        padded = any(len(end) > 1 and end.startswith("0") for end in (first, last))
        width = max(len(first), len(last)) if padded else 0
        choices = (f"{number:0{width}d}" for number in range(int(first), int(last) + 1))
    elif "," not in match[1]:
        raise UserError(f"'{pattern}': braces hold a range of numbers, such as {{00000..01242}}, or names, as {{a,b}}")
    for choice in choices:
        for rest in expand_braces(pattern[match.end() :]):
            yield f"{pattern[: match.start()]}{choice}{rest}"


def fingerprint(path: Path) -> str:
    """See `State`."""
    return state_of(path).fingerprint


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


def split_at_last_dot(name: str) -> tuple[str, str]:
    """`folder/mr. b.png` → (`folder/mr. b`, `png`): for names with dots that separate no suffix."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.rpartition(".")
    return folder + slash + stem, suffix.lower()


def role_of(suffix: str) -> int | None:
    """Which part of a sample a member is: 0 image, 1 caption, 2 JSON; None for what training does not use."""
    if suffix in IMAGE_SUFFIXES:
        return 0
    return {"txt": 1, "json": 2}.get(suffix)


def sample_key(name: str) -> str:
    """The key of a sample that begins with a member of this name."""
    key, suffix = split_name(name)
    return key if role_of(suffix) is not None else split_at_last_dot(name)[0]
