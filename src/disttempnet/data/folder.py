"""A folder of images at any depth: a scan of what lies in it, and its images as a source without captions."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from disttempnet import distributed
from disttempnet.data.images import DECODED_SUFFIXES, is_image
from disttempnet.data.listings.open import ImageFiles
from disttempnet.data.listings.readers import leads_to_folder
from disttempnet.data.source import Source, UnreadableCaption, hash_of
from disttempnet.errors import UserError
from disttempnet.io.progress import Meter
from disttempnet.sanitize import one_line

PACKED_SUFFIXES = (".tar", ".parquet")  # of files that make a folder a source of another kind
PICTURES_A_GROUP = 1000
FILES_NAMED = 3  # of each reason why files are left out


@dataclass
class FolderScan:
    """Contents of a folder: images by name below it; hidden ones; dead links; counts of other files by suffix."""

    images: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)

    @property
    def kinds(self) -> str:
        """The other files, in words: `3 .heic, 1 without suffix`."""
        return ", ".join(f"{count:,} {one_line(suffix)}" for suffix, count in sorted(self.others.items()))


def scan_folder(folder: Path, found: Callable[[int], object] = bool) -> FolderScan:
    """Return what lies in a folder, at any depth. Links are followed, except those that lead back.

    Args:
        folder: the folder.
        found: called with the number of images of every folder in it.

    Raises:
        OSError: a folder cannot be read.
    """
    seen = FolderScan()
    _scan(str(folder), seen, (), "", found)
    return seen


def _scan(
    folder: str, seen: FolderScan, above: tuple[tuple[int, int], ...], inside: str, found: Callable[[int], object]
) -> None:
    status = os.stat(folder)
    here = status.st_dev, status.st_ino
    if here in above:
        return
    own = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            name = inside + entry.name
            if is_hidden(entry.name):
                if leads_to_folder(entry) or is_image(entry.name, DECODED_SUFFIXES):
                    seen.hidden.append(name)
            elif leads_to_folder(entry):
                _scan(entry.path, seen, (*above, here), f"{name}/", found)
            elif is_image(entry.name, DECODED_SUFFIXES):  # a dead link, a pipe: images that cannot be read
                seen.images.append(name)
                own += 1
            elif is_dead_link(entry):
                seen.dead.append(name)
            else:
                seen.others[Path(entry.name).suffix.lower() or "without suffix"] += 1
    found(own)


def is_dead_link(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a dead link, or a link to itself."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is left out of scans."""
    return name.startswith(".") or name == "__MACOSX"


def is_picture_folder(where: str) -> bool:
    """Return whether a path is a folder that holds neither shards nor Parquet files."""
    if not os.path.isdir(where):
        return False
    with os.scandir(where) as entries:
        return not any(entry.name.endswith(PACKED_SUFFIXES) for entry in entries)


class PictureFolder(Source):
    """Images of a folder as samples without captions, in the order of their names; a group is a run of them.

    A name takes its bytes and eight more, so that a million images take little memory.

    Args:
        where: the folder.
        names: of the images, below it.
        left_out: a line for each reason why other files are no samples.
    """

    def __init__(self, where: str, names: Iterable[str], left_out: Iterable[str] = ()) -> None:
        self.where, self.left_out = where, tuple(left_out)
        encoded = [os.fsencode(name) for name in names]
        self._names = b"".join(encoded)
        self._start = np.cumsum([0, *map(len, encoded)], dtype=np.int64)  # [N + 1]
        self.status = np.zeros(len(encoded), np.uint8)
        groups = range(0, len(encoded) + PICTURES_A_GROUP, PICTURES_A_GROUP)
        self.first = np.minimum(np.array(groups, np.int64), len(encoded))
        self.images = ImageFiles(Path(where))

    @property
    def digest(self) -> str:
        digest = hashlib.blake2b(self._names, digest_size=16)
        digest.update(self._start.data)
        return digest.hexdigest()

    def file(self, sample: int) -> str:
        """Return the name of an image below the folder, for the system: it may not be UTF-8."""
        return os.fsdecode(self._names[self._start[sample] : self._start[sample + 1]])

    def path(self, sample: int) -> str:
        """Return the path of an image."""
        return self.images.path(self.file(sample))

    def image_bytes(self, sample: int) -> bytes:
        """Return the encoded image. Raises UnreadableImage: it is gone, or no file; UserError: it cannot be read."""
        return self.images.read(sample, self.file(sample))

    def captions(self, sample: int) -> tuple[str, ...]:
        """Raise UnreadableCaption: there are none."""
        raise UnreadableCaption("an image without a caption")

    def name(self, sample: int) -> str:
        return one_line(self.file(sample))

    def problems(self, names: int = FILES_NAMED) -> str:
        return "\n".join(self.left_out)

    def reason(self, sample: int) -> str:
        return "ok"

    def hashes(self) -> NDArray[np.uint64]:
        return np.array([hash_of(self.file(sample)) for sample in range(len(self))], np.uint64)


def open_picture_folder(where: str) -> PictureFolder:
    """Scan a folder for images; every rank calls this.

    Raises:
        UserError: it cannot be read, or has no images, or the ranks see different ones.
    """

    def scan() -> PictureFolder:
        try:
            with Meter(
                f"images in {Path(where).name or where}", 0, active=distributed.is_main(), transient=True
            ) as meter:
                seen = scan_folder(Path(where), meter.advance)
        except OSError as error:
            raise UserError(f"{error.filename or where}: cannot be read: {error.strerror}") from None
        if not seen.images:
            kinds = ", ".join(sorted(DECODED_SUFFIXES))
            raise UserError(f"{where}: no images in it ({kinds}){''.join(f'; {line}' for line in _left_out(seen))}")
        return PictureFolder(where, sorted(seen.images), _left_out(seen))

    folder = distributed.together(scan)
    if len(set(distributed.gather_objects(folder.digest))) > 1:
        raise UserError(f"{where}: the ranks see different images; give every node the same data")
    return folder


def _left_out(seen: FolderScan) -> list[str]:
    """A line for each kind of file that is left out."""
    lines = []
    for what, names in (("hidden", seen.hidden), ("dead links", seen.dead)):
        if names:
            shown = ", ".join(map(one_line, sorted(names)[:FILES_NAMED]))
            lines.append(f"left out, {what}: {len(names):,} ({shown}{', …' if len(names) > FILES_NAMED else ''})")
    if seen.others:
        lines.append(f"left out, not images that can be read: {seen.kinds}")
    return lines
