"""Webdataset shards on disk: which files a spec names, and what one .tar holds, as byte ranges.

A sample is a run of consecutive members with the same name up to the first dot (webdataset's rule); where that gives no
image and no caption, up to the last dot.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from disttempnet.data.builtin.emoji import embedded_shards
from disttempnet.data.builtin.scenes import generated_shards
from disttempnet.data.shards.credentials import detached
from disttempnet.data.shards.patterns import expand_braces, is_pattern, matching
from disttempnet.data.shards.remote import RemoteStore, is_remote
from disttempnet.data.shards.store import CACHE_GB, LocalStore, ShardStore
from disttempnet.errors import UserError

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})  # that an image beside captions has
# all that `decode` reads
DECODED_SUFFIXES = IMAGE_SUFFIXES | {"jpe", "jfif", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm"}
HEADER = 512  # bytes of a tar header, and what a member's data is padded to
MAX_TEXT = 1 << 24  # bytes of a caption or a .json; more is not one
MAX_EXTENSION = 1 << 20  # bytes of a long name or pax header; more is not one
READABLE_PATTERN = re.compile(
    r"(?!all$)\w+|(\w*[^\W\d])?\{\d+\.\.\d+\}([^\W\d]\w*)?"
)  # patterns that need no digest as labels
# headers whose data is about the next one
EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
COMPRESSED = {".gz", ".tgz", ".bz2", ".xz", ".zst"}
LONGEST_LABEL = 220  # bytes of a name that a disk takes, less what goes around it
READ_AHEAD = 2048  # one read brings a header and most captions


def is_image(name: str, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> bool:
    """Whether a file's name ends in one of these suffixes, in lower or upper case."""
    return name.rpartition(".")[2].lower() in suffixes


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
        spec: a folder (its *.tar, sorted by name), a path with braces or wildcards in file or folder names
            (`cc12m/{00000..01242}.tar`, `{a,b}/{0..9}.tar`, `{cc3m,cc12m}/*.tar`, `{cc3m,cc12m}`),
            `embedded:DATASET/SPLIT`, or `generated:DATASET/SPLIT`; or a URL of fsspec's, of a folder or with braces:
            `s3://bucket/cc12m/{00000..01242}.tar`.
        cache: remote shards: folder that they are kept in; empty = the user's cache.
        cache_gb: remote shards: gigabytes that all of that folder may take.

    Raises:
        UserError: nothing is there, or a shard of the pattern is missing.
    """
    if spec.startswith("pipe:"):
        found = re.search(r"\S+\.tar\b", spec.removeprefix("pipe:"))
        raise UserError(f"'{spec}': no command is run to read data; name the shards: {found[0] if found else 'FOLDER'}")
    if is_remote(spec):
        return _resolve_remote(spec, cache, cache_gb)
    if spec.startswith("embedded:"):
        spec = str(embedded_shards(spec.removeprefix("embedded:")))
    elif spec.startswith("generated:"):
        spec = str(generated_shards(spec.removeprefix("generated:")))
    path = Path(spec).expanduser()
    if os.path.isdir(path):
        return ShardList(path, _tars_in(path), "all")
    if not is_pattern(spec) and path.suffix != ".tar":
        raise UserError(f"{path}: {_no_shards_here(path)}")
    depth = next((i for i in range(len(path.parts)) if _is_pattern_there(path.parts, i)), len(path.parts) - 1)
    folder, pattern = Path(*path.parts[:depth]), "/".join(path.parts[depth:])
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder, named by data.train = '{spec}'")
    names = tuple(_shards_named(folder, pattern))
    if len(set(names)) < len(names):
        raise UserError(
            f"{folder}: '{pattern}' names a shard twice; data.train = [{{path = …, weight = 2}}] reads it so"
        )
    return ShardList(folder, names, _label(pattern))


def _is_pattern_there(parts: Sequence[str], place: int) -> bool:
    """Whether a part of a path has braces, or wildcards that are no part of the name of something that is there."""
    return "{" in parts[place] or (is_pattern(parts[place]) and not os.path.exists(Path(*parts[: place + 1])))


def _no_shards_here(path: Path) -> str:
    if path.suffix in COMPRESSED and os.path.exists(path):
        return "a compressed tar cannot be read at any place; unpack it to a .tar"
    what = "is a file, and no .tar or listing" if os.path.exists(path) else "no such folder"
    return (
        f"{what}; set data.train to a folder of .tar shards, a pattern such as FOLDER/{{00000..01242}}.tar, "
        "embedded:emoji/train, or generated:scenes/train"
    )


def _tars_in(folder: Path) -> tuple[str, ...]:
    """Names of all shards in a folder, sorted. Raises UserError if there are none."""
    names = sorted(entry.name for entry in folder.glob("*.tar") if not entry.name.startswith("."))
    if not names:
        inner = sorted({entry.parent.name for entry in folder.glob("*/*.tar") if not entry.name.startswith(".")})
        pattern = folder / (inner[0] if len(inner) == 1 else "{" + ",".join(inner) + "}")
        hint = (
            f"there are some in folders of it: write '{pattern}'" if inner else "set data.train to one that holds them"
        )
        raise UserError(f"{folder}: no .tar shards in this folder; {hint}")
    return tuple(names)


def _shards_named(folder: Path, pattern: str) -> Iterator[str]:
    """Paths from a folder of all shards that a pattern names: files, and those in folders that it names."""
    expanded = list(expand_braces(pattern))
    there = {parent: _files_in(folder / parent) for parent in {name.rpartition("/")[0] for name in expanded}}
    missing = []
    for name in expanded:
        parent, _, base = name.rpartition("/")
        if base.endswith(".tar") and base in there[parent]:
            yield name
            continue
        found = [path for path in matching(folder, name) if path.suffix == ".tar" or os.path.isdir(path)]
        if not any(os.path.exists(path) for path in found):
            missing.append(name)
        for path in found:
            inside = [f"{path.name}/{tar}" for tar in _tars_in(path)] if os.path.isdir(path) else [path.name]
            yield from (str(path.parent.relative_to(folder) / one) for one in inside)
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        what = "no such shard" if missing[0].endswith(".tar") else "no such folder of shards"
        raise UserError(
            f"{folder / missing[0]}: {what}{others}; '{pattern}' names {len(expanded)}: "
            "restore the missing ones or narrow the pattern"
        )


def _resolve_remote(spec: str, cache: str, cache_gb: float) -> ShardList:
    spec, credentials = detached(spec)
    if any(character in spec for character in "*["):
        raise UserError(
            f"'{spec}': no wildcards in a URL; name its folder for all shards in it, or write {{00000..01242}}"
        )
    if not spec.endswith(".tar"):
        if "{" in spec:
            raise UserError(f"'{spec}': braces in a URL name shards: end it in .tar")
        store = RemoteStore(spec, cache, cache_gb, credentials)
        names = tuple(store.names())
        if not names:
            raise UserError(f"{spec}: no .tar shards there; name them, as in {spec.rstrip('/')}/{{00000..01242}}.tar")
        return ShardList(store.folder, names, "all", store)
    base = spec.partition("{")[0].rpartition("/")[0]
    pattern = spec[len(base) + 1 :]
    names = tuple(expand_braces(pattern))
    if len(set(names)) < len(names):
        raise UserError(f"'{spec}' names a shard twice; data.train = [{{path = …, weight = 2}}] reads it so")
    store = RemoteStore(base, cache, cache_gb, credentials)
    return ShardList(store.folder, names, _label(pattern), store)


def _label(pattern: str) -> str:
    """A file name for a pattern, another one for each: readable alone where it is a word or one range of numbers."""
    pattern = pattern.removesuffix(".tar") if pattern.endswith(".tar") else f"{pattern}/"  # of folders
    name = re.sub(r"[*?\[\]]", "_", re.sub(r"[{}]", "", pattern).replace("/", "-"))
    if READABLE_PATTERN.fullmatch(pattern):
        return name
    return f"{name[:LONGEST_LABEL]}-{hashlib.blake2b(pattern.encode(), digest_size=4).hexdigest()}"


def _files_in(folder: Path) -> frozenset[str]:
    """Names in a folder, by one listing: on a network disk far cheaper than asking for each."""
    return frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset()


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
