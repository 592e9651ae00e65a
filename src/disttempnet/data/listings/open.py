"""Listings as a `Source`: rows of JSON, CSV or Parquet, or images with captions beside them.

Sample id = number of the row, or of the image if rows were joined. On first use the rows are validated and copied into
an index, one memory-mapped file beside the listing: a start takes seconds, and workers share its memory.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from disttempnet import distributed
from disttempnet.config import SourceConfig
from disttempnet.data.icons.built import local_path
from disttempnet.data.images import MAX_BYTES, UnreadableImage
from disttempnet.data.listings.index import (
    ROW_REASONS,
    ListingColumns,
    MissingKeys,
    Settings,
    build_index,
    leaves_the_folder,
    load_columns,
)
from disttempnet.data.listings.parquet import ParquetImages, ParquetLayout
from disttempnet.data.listings.readers import TABLE_SUFFIXES, FolderLayout, Layout, TableLayout, holds_images
from disttempnet.data.shards.remote import is_remote
from disttempnet.data.source import OK, IndexedSource, hash_of, usable_captions
from disttempnet.errors import UserError, UserNotice
from disttempnet.io.files import UnfitFile, read_regular
from disttempnet.io.machine import cause
from disttempnet.sanitize import one_line

NO_SUCH_FILE = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}  # the path in the row does not exist
PACKED = {".gz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".tgz"}
FOLDERS = 200  # subfolders in which images are looked for, at most
PROBED = 100  # images, spread over the listing, that are looked for at every start
MANY_MISSING = 10  # of these, from which on a warning is printed


class Images(Protocol):
    """Encoded images by sample id and image name of its row."""

    def read(self, sample: int, image: str) -> bytes: ...

    def close(self) -> None: ...


class ImageFiles:
    """Images as files under a folder; a path may be absolute.

    Args:
        root: the folder.
        elsewhere: prefixes of paths from another machine, which stand for root.
        backslashes: paths were written on Windows.
    """

    def __init__(self, root: Path, elsewhere: tuple[str, ...] = (), backslashes: bool = False) -> None:
        self.root, self.elsewhere, self.backslashes = root, elsewhere, backslashes

    def path(self, image: str) -> str:
        if self.backslashes and not leaves_the_folder(plain := image.replace("\\", "/")):
            image = plain
        image = next((image[len(start) :] for start in self.elsewhere if image.startswith(start)), image)
        return os.path.join(self.root, image)

    def path_notes(self) -> list[str]:
        """Return a line for each way in which paths of rows are changed."""
        lines = [f"images below {start} are read from {self.root}" for start in self.elsewhere]
        return lines + [f"paths with backslashes are read from {self.root}"] * self.backslashes

    def read(self, sample: int, image: str) -> bytes:
        """Read an image. Raises UnreadableImage: no such file; UserError: it may exist and cannot be read."""
        try:
            return read_regular(self.path(image), MAX_BYTES)
        except OSError as error:
            where = one_line(self.path(image))
            if error.errno in NO_SUCH_FILE or isinstance(error, UnfitFile):
                raise UnreadableImage(f"{error.strerror}: {where}") from None
            # permissions, a lost disk, too many open files: no fault of one sample, so do not skip it
            raise UserError(f"{where}: cannot be read: {cause(error)}") from None

    def close(self) -> None:
        """Nothing is kept open."""


class Listing(IndexedSource):
    """Rows of a listing as samples; a group is a run of rows, or a Parquet row group.

    Attributes:
        path: the index file.
        columns: its content.
        images: reads the images.
        status: uint8 [N], index into `ROW_REASONS`.
        digest: hex sha256 over rows and status; for Parquet also over the files.
    """

    reasons = ROW_REASONS

    def __init__(self, path: Path, where: Path, columns: ListingColumns, images: Images) -> None:
        self.path, self.where, self.columns, self.images = path, str(where), columns, images
        self.status, self.first = columns.status, columns.first

    def __reduce__(self) -> tuple[Callable[..., Listing], tuple[Path, str, Images]]:
        return _load, (self.path, self.where, self.images)  # another process maps the file instead of receiving a copy

    @property
    def digest(self) -> str:
        return self.columns.digest

    def image_bytes(self, sample: int) -> bytes:
        """Return the encoded image. Raises UnreadableImage: there is none; UserError: it cannot be read."""
        return self.images.read(sample, self.columns.row(sample)[0])

    def captions(self, sample: int) -> tuple[str, ...]:
        return usable_captions([*self.columns.row(sample)[1]])

    def metadata(self, sample: int) -> dict[str, Any]:
        """Return the other fields of the row."""
        return self.columns.row(sample)[2]

    def name(self, sample: int) -> str:
        """Return `LISTING:IMAGE`, the number of a row without image, or `FILE.parquet:ROW`, from 0."""
        image = one_line(self.columns.row(sample)[0]) or f"row {self.columns.number(sample) + 1}"
        return image if isinstance(self.images, ParquetImages) else f"{Path(self.where).name}:{image}"

    def hashes(self) -> NDArray[np.uint64]:
        """Hash the image names of the rows."""
        return np.array([hash_of(self.columns.row(sample)[0]) for sample in range(len(self))], np.uint64)

    def notes(self) -> list[str]:
        notes = self.columns.format_notes() + (self.images.path_notes() if isinstance(self.images, ImageFiles) else [])
        return [one_line(line) for line in notes]

    def close(self) -> None:
        self.images.close()


def _load(path: Path, where: str, images: Images) -> Listing:
    return Listing(path, Path(where), load_columns(path), images)


def is_listing(source: SourceConfig) -> bool:
    """Tell whether a source is a listing and not tars, by its suffix or by the content of its folder.

    Raises:
        UserError: it is not a listing but has settings of listings, or is another kind of file.
    """
    path = local_path(source.path)
    if path.suffix.lower() in TABLE_SUFFIXES | {".parquet"} and not is_remote(source.path):
        return True
    if os.path.isdir(path) and ".tar" not in (suffixes := _suffixes_in(path)):
        return ".parquet" in suffixes or holds_images(path)
    if path.is_file() and path.suffix.lower() != ".tar":
        packed = "unpack it first, or " if path.suffix.lower() in PACKED else ""
        raise UserError(
            f"data.train: {path}: not a known kind of file; {packed}name a table or JSON "
            f"({', '.join(sorted(TABLE_SUFFIXES))}), a .parquet, .tar shards or a folder"
        )
    for key in ("images", "image_key"):
        if getattr(source, key):
            raise UserError(f"data.train: {source.path}: {key} is for JSON, CSV and Parquet; remove it")
    return False


def _suffixes_in(folder: Path) -> set[str]:
    with os.scandir(folder) as entries:
        return {os.path.splitext(entry.name)[1] for entry in entries if not entry.name.startswith(".")}


def _has_folders_of(folder: Path) -> bool:
    """Tell whether Parquet files are beside image folders of the same name, as in img2dataset's output of files."""
    beside = (path.with_suffix("") for path in folder.glob("*.parquet"))
    return any(path.is_dir() and holds_images(path) for path in beside)


def layout_of(source: SourceConfig) -> Layout:
    """Return the layout of a source. Raises UserError: it does not exist, or a setting does not fit."""
    path = local_path(source.path)
    if path.suffix.lower() in TABLE_SUFFIXES:
        return TableLayout(path, source.image_key, source.caption_key)
    if path.suffix.lower() != ".parquet" and not path.is_dir():
        raise UserError(f"data.train: {path}: no such folder of images")
    if path.suffix.lower() == ".parquet" or (".parquet" in _suffixes_in(path) and not _has_folders_of(path)):
        return ParquetLayout(path, source.image_key, source.caption_key)
    if source.images:
        raise UserError(f"data.train: {path}: has its images inside; remove images = '{source.images}'")
    if path.name in ("", ".."):  # ., .. and / have no name to derive the name of the index from
        path = Path(os.path.abspath(path))
    if source.image_key:
        raise UserError(f"data.train: {path}: a folder of images has no image_key; remove it")
    return FolderLayout(path, source.caption_key)


def settings_of(source: SourceConfig) -> Settings:
    return Settings(source.image_key, source.caption_key, source.join_rows)


def open_listing(source: SourceConfig, progress: bool = True) -> Listing:
    """Open a listing: rank 0 builds its index on first use, every rank checks it.

    Args:
        source: a .json, .jsonl, .csv, .tsv or .parquet file, a folder or pattern of Parquet files, or a folder of
            images with captions beside them; see docs/data.md.
        progress: show a bar on standard error while the index is built.

    Raises:
        UserError: it is missing, has changed since it was indexed, cannot be read, has no usable row, or its images
            are not found. Every rank raises.
    """
    settings = settings_of(source)
    layout = distributed.together(lambda: layout_of(source))

    def build() -> None:
        path = index_file(layout, source.index)
        if distributed.is_main() and not path.is_file():
            try:
                build_index(layout, path, settings, progress)
            except MissingKeys as error:
                raise UserError(f"{error}; {_naming_keys(source, error.flags)}") from None

    def load() -> Listing:
        path = index_file(layout, source.index)
        columns = load_columns(path, verify=True)
        columns.check(layout, settings)
        return Listing(path, layout.where, columns, images_of(layout, columns, source.images))

    distributed.together(build)  # the other ranks wait here, up to the timeout of the process group
    listing = distributed.together(load)
    if len(set(distributed.gather_objects(listing.digest))) > 1:
        raise UserError(f"{listing.path}: the ranks see different indexes; give every node the same data")
    return listing


def _naming_keys(source: SourceConfig, flags: Sequence[str]) -> str:
    """Return the command that names the keys of a listing, and how training names them."""
    images = ["--images", source.images] if source.images else []
    command = shlex.join(["disttempnet", "data", "index", source.path, *images, *flags])
    return f"name them, as in: {command} (in data.train: image_key and caption_key)"


def index_file(layout: Layout, index_path: str) -> Path:
    """Return the file of the index. Raises UserError."""
    path = Path(index_path).expanduser() if index_path else layout.index_file()
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file for the index")
    return path


def images_of(layout: Layout, columns: ListingColumns, root: str) -> Images:
    """Return the reader of the images of these rows. Raises UserError: none of the probed images is found."""
    if isinstance(layout, ParquetLayout):
        notes = columns.about["notes"]
        if notes.get("paths"):
            return _image_files(layout, layout.paths[0], columns, root)
        if root:
            raise UserError(f"data.train: {layout.where}: has its images inside; remove images = '{root}'")
        return ParquetImages(layout.paths, notes["column"], notes["row_groups"], columns.first)
    if isinstance(layout, FolderLayout):
        return ImageFiles(layout.where)
    return _image_files(layout, layout.where, columns, root)


def _image_files(layout: Layout, where: Path, columns: ListingColumns, root: str) -> ImageFiles:
    """Find the root of the image files that rows name, and warn if many are missing."""
    usable = np.flatnonzero(columns.status == OK)
    spread = np.unique(usable[np.linspace(0, len(usable) - 1, PROBED).astype(np.int64)])
    probed = [columns.row(int(sample))[0] for sample in spread]
    files = _find_files(where, probed, root)
    if missing := len(probed) - _count_found(files, probed):
        _tell_of_missing(layout, files.root, missing, len(probed))
    return files


def _find_files(where: Path, probed: list[str], root: str) -> ImageFiles:
    """Find the root folder of the images of a listing, from some of them.

    It is the folder of the config; else the listing's own, the one above, or the only subfolder with all of them.

    Raises:
        UserError: no image is in any of these.
    """
    above = where.absolute().parent
    roots = [Path(root).expanduser()] if root else [above, above.parent]
    for folder in roots:
        for backslashes in (False, True):
            if _count_found(files := ImageFiles(folder, backslashes=backslashes), probed):
                return files
    for folder in roots:
        if starts := _starts_elsewhere(folder, probed):
            return ImageFiles(folder, starts, backslashes=any("\\" in image for image in probed))
    within = [folder for folder in _folders_in(above) if _count_found(ImageFiles(folder), probed) == len(probed)]
    if not root and len(within) == 1:
        return ImageFiles(within[0])
    near = [*within, roots[0].absolute().parent, *_folders_in(*roots)]
    inside = max(near, key=lambda folder: _count_found(ImageFiles(folder), probed))
    hint = f"; they are in {inside}" if _count_found(ImageFiles(inside), probed) else ""
    places = " nor in ".join(map(str, roots))
    raise UserError(
        f"{where}: none of {len(probed)} of its images, such as {one_line(probed[0])}, is in {places}{hint}; "
        "name the folder of images in data.train = [{path = …, images = FOLDER}]"
    )


def _starts_elsewhere(root: Path, probed: list[str]) -> tuple[str, ...]:
    """Return the prefixes of absolute paths from another machine, longest first.

    The rest of a path, as long as possible, exists below root.
    """
    starts = set()
    for image in probed:
        names = image.replace("\\", "/").split("/")
        if names[0] == "" or re.fullmatch("[A-Za-z]:", names[0]):
            rests = (number for number in range(1, len(names)) if os.path.isfile(os.path.join(root, *names[number:])))
            if (number := next(rests, 0)) and os.pardir not in names:
                starts.add("/".join(names[:number]) + "/")
    return tuple(sorted(starts, key=lambda start: (-len(start), start)))


def _folders_in(*folders: Path) -> list[Path]:
    found = {path for folder in folders if folder.is_dir() for path in islice(folder.glob("*/"), FOLDERS)}
    return sorted(found - {*folders})


def _count_found(files: ImageFiles, images: list[str]) -> int:
    """Count the images that exist."""
    return sum(os.path.isfile(files.path(image)) for image in images)


def _tell_of_missing(layout: Layout, root: Path, missing: int, probed: int) -> None:
    if distributed.is_main() and missing >= MANY_MISSING:
        warnings.warn(
            f"{layout.where}: {missing} of {probed} probed images are not in {root}; training replaces missing ones",
            UserNotice,
            stacklevel=2,
        )
