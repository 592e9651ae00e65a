"""Images of a listing with all fields of their rows, for evaluation: without an index beside the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from disttempnet.config import SourceConfig
from disttempnet.data.listings.index import MissingKeys, build_index, load_columns
from disttempnet.data.listings.open import ImageFiles, Images, Listing, images_of, layout_of, settings_of
from disttempnet.errors import UserError


@dataclass(frozen=True)
class ListedImage:
    """Image of a listing, once for all rows that name it.

    Attributes:
        name: its name in the listing, for messages.
        path: its file; None if its bytes are in a Parquet file.
        captions: stripped, in the order of the rows, without empty ones; at least one.
        split: value of the column `split`; empty without one.
        fields: other fields with the same value in all its rows.
    """

    name: str
    path: Path | None
    captions: tuple[str, ...]
    split: str
    fields: dict[str, Any] = field(hash=False)
    _row: tuple[Images, int, str] = field(repr=False, compare=False)

    def read(self) -> bytes:
        """Return the encoded image. Raises UnreadableImage: no such file; UserError: it cannot be read."""
        images, sample, image = self._row
        return images.read(sample, image)


@dataclass(frozen=True)
class ListedImages:
    """Images of a listing, as `read_listing` returns them.

    Attributes:
        images: usable images, in the order of their first rows.
        left_out: (reason, number of rows, first names) of the others.
        notes: a line for each detected property of the listing.
    """

    images: tuple[ListedImage, ...]
    left_out: tuple[tuple[str, int, list[str]], ...]
    notes: tuple[str, ...]


def read_listing(where: str | Path, images: str = "", image_key: str = "", caption_key: str = "") -> ListedImages:
    """Read any listing (docs/data.md#layouts), with rows of one image joined. Writes nothing beside the data.

    Unlike `open_listing` it holds all rows in memory, is not collective, and can be called by any rank.

    Args:
        where: a table, a JSON file, a Parquet file or a folder of them, or a folder of images with caption files.
        images: root of relative paths; empty = the folder of the listing, or the one above.
        image_key, caption_key: keys of a row; empty = detected.

    Raises:
        UserError: it cannot be read, has no usable row, or its images are not found.
    """
    source = SourceConfig(path=str(where), images=images, image_key=image_key, caption_key=caption_key)
    layout, settings = layout_of(source), settings_of(source)
    with TemporaryDirectory() as folder:
        path = Path(folder, "rows")
        try:
            build_index(layout, path, settings, progress=False)
        except MissingKeys as error:
            raise UserError(f"{error}; name them with image_key and caption_key") from None
        columns = load_columns(path)  # stays mapped after the file is removed
    listing = Listing(path, layout.where, columns, images_of(layout, columns, images))
    found = tuple(_image(listing, sample) for sample in listing.usable.tolist())
    return ListedImages(found, tuple(listing.left_out()), tuple(listing.notes()))


def _image(listing: Listing, sample: int) -> ListedImage:
    image, captions, fields = listing.columns.row(sample)
    path = Path(listing.images.path(image)) if isinstance(listing.images, ImageFiles) else None
    split = fields.get("split")
    split = "" if split is None else str(split)
    return ListedImage(listing.name(sample), path, tuple(captions), split, fields, (listing.images, sample, image))
