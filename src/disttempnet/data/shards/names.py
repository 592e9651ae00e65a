"""Specs of webdataset shards: the files that a folder, a pattern or a URL names."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from disttempnet.data.builtin.emoji import embedded_shards
from disttempnet.data.builtin.scenes import generated_shards
from disttempnet.data.shards.credentials import detached
from disttempnet.data.shards.patterns import expand_braces, is_pattern, matching
from disttempnet.data.shards.remote import RemoteStore, is_remote
from disttempnet.data.shards.store import CACHE_GB, LocalStore, ShardStore
from disttempnet.errors import UserError

READABLE_PATTERN = re.compile(
    r"(?!all$)\w+|(\w*[^\W\d])?\{\d+\.\.\d+\}([^\W\d]\w*)?"
)  # patterns that need no digest as labels
COMPRESSED = {".gz", ".tgz", ".bz2", ".xz", ".zst"}
LONGEST_LABEL = 220  # bytes; with prefix and suffix it stays below the limit of file names


@dataclass(frozen=True)
class ShardList:
    """Shards under one folder, in the order of the spec.

    Attributes:
        folder: the innermost folder that holds all of them.
        names: their paths relative to the folder.
        label: file name for the part of the spec below the folder, unique to the spec; `all` for a whole folder.
        remote: downloads the shards into the folder; None = they are local.
    """

    folder: Path
    names: tuple[str, ...]
    label: str
    remote: RemoteStore | None = None

    @property
    def store(self) -> ShardStore:
        """The store that opens these shards."""
        return self.remote or LocalStore(self.folder)


def resolve_shards(spec: str, cache: str = "", cache_gb: float = CACHE_GB) -> ShardList:
    """Return the shards that a spec names. Local ones exist.

    Args:
        spec: a folder (its *.tar, sorted by name), a path with braces or wildcards in file or folder names
            (`cc12m/{00000..01242}.tar`, `{a,b}/{0..9}.tar`, `{cc3m,cc12m}/*.tar`, `{cc3m,cc12m}`),
            `embedded:DATASET/SPLIT`, or `generated:DATASET/SPLIT`; or a URL of fsspec's, of a folder or with braces:
            `s3://bucket/cc12m/{00000..01242}.tar`.
        cache: remote shards: folder of the local cache; empty = the user's cache.
        cache_gb: remote shards: limit of that folder in gigabytes.

    Raises:
        UserError: there are no shards, or a shard of the pattern is missing.
    """
    if spec.startswith("pipe:"):
        found = re.search(r"\S+\.tar\b", spec.removeprefix("pipe:"))
        raise UserError(f"'{spec}': commands are not run; name the shards: {found[0] if found else 'FOLDER'}")
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
    """Tell whether a part of a path has braces, or wildcards that are not part of an existing name."""
    return "{" in parts[place] or (is_pattern(parts[place]) and not os.path.exists(Path(*parts[: place + 1])))


def _no_shards_here(path: Path) -> str:
    if path.suffix in COMPRESSED and os.path.exists(path):
        return "a compressed tar has no random access; unpack it to a .tar"
    what = "not a .tar or a listing" if os.path.exists(path) else "no such folder"
    return (
        f"{what}; set data.train to a folder of .tar shards, a pattern such as FOLDER/{{00000..01242}}.tar, "
        "embedded:emoji/train, or generated:scenes/train"
    )


def _tars_in(folder: Path) -> tuple[str, ...]:
    """Return the names of all shards in a folder, sorted. Raises UserError if there are none."""
    names = sorted(entry.name for entry in folder.glob("*.tar") if not entry.name.startswith("."))
    if not names:
        inner = sorted({entry.parent.name for entry in folder.glob("*/*.tar") if not entry.name.startswith(".")})
        pattern = folder / (inner[0] if len(inner) == 1 else "{" + ",".join(inner) + "}")
        hint = f"its subfolders have some: write '{pattern}'" if inner else "set data.train to the folder of the shards"
        raise UserError(f"{folder}: no .tar shards in this folder; {hint}")
    return tuple(names)


def _shards_named(folder: Path, pattern: str) -> Iterator[str]:
    """Yield the shards that a pattern names, and those in folders that it names, as paths from the folder."""
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
    if not spec.partition("{")[0].partition("://")[2].strip("/"):
        raise UserError(f"'{spec}': a URL of no place: name the bucket or host, s3://BUCKET/FOLDER")
    if any(character in spec for character in "*["):
        raise UserError(
            f"'{spec}': wildcards do not work in a URL; name the folder for all its shards, or write {{00000..01242}}"
        )
    if not spec.endswith(".tar"):
        if "{" in spec:
            raise UserError(f"'{spec}': a URL with braces has to end in .tar")
        store = RemoteStore(spec, cache, cache_gb, credentials)
        names = tuple(store.names())
        if not names:
            raise UserError(f"{spec}: no .tar shards there; name them: {spec.rstrip('/')}/{{00000..01242}}.tar")
        return ShardList(store.folder, names, "all", store)
    base = spec.partition("{")[0].rpartition("/")[0]
    pattern = spec[len(base) + 1 :]
    names = tuple(expand_braces(pattern))
    if len(set(names)) < len(names):
        raise UserError(f"'{spec}' names a shard twice; data.train = [{{path = …, weight = 2}}] reads it so")
    store = RemoteStore(base, cache, cache_gb, credentials)
    return ShardList(store.folder, names, _label(pattern), store)


def _label(pattern: str) -> str:
    """Return a unique file name for a pattern; without a digest if the pattern is a word or one range of numbers."""
    pattern = pattern.removesuffix(".tar") if pattern.endswith(".tar") else f"{pattern}/"  # of folders
    name = re.sub(r"[*?\[\]]", "_", re.sub(r"[{}]", "", pattern).replace("/", "-"))
    if READABLE_PATTERN.fullmatch(pattern):
        return name
    return f"{name[:LONGEST_LABEL]}-{hashlib.blake2b(pattern.encode(), digest_size=4).hexdigest()}"


def _files_in(folder: Path) -> frozenset[str]:
    """Return the names in a folder by one listing, which is far cheaper on a network disk than a look at each."""
    return frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset()
