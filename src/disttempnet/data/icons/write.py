"""Rows as Parquet files, and the licences and authors that have to be named beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from disttempnet.data.icons.package import Vendor
from disttempnet.data.icons.release import Release
from disttempnet.data.icons.splits import Pair, Splits
from disttempnet.io.files import write_atomically

FILE_ROWS = 20_000
GROUP_ROWS = 2_000  # are read at once
CREDITS = "LICENSES.md"

PARTS_ABOUT = """# Licences of the icon data set

One row a vendor: pairs here, title, author, licence (SPDX), as the npm package {package} {version} states them. \
Renderings are derived works under the same licences; credit the authors.

| vendor | pairs | title | author | licence |
|---|--:|---|---|---|
"""


def write_split(folder: Path, pairs: Sequence[Pair]) -> None:
    """Write FOLDER/00000.parquet …: image {bytes, path}, caption, concept, style, vendor, category, license, frequency.

    Raises:
        OSError: it cannot be written.
    """
    import pyarrow
    from pyarrow.parquet import write_table

    folder.mkdir()
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    for number, start in enumerate(range(0, len(pairs), FILE_ROWS)):
        part = pairs[start : start + FILE_ROWS]
        rows = [pair.row for pair in part]
        images = [{"bytes": row.image, "path": f"{row.vendor}/{row.name}.webp"} for row in rows]
        columns = {
            "image": pyarrow.array(images, type=image),
            "caption": [pair.caption for pair in part],
            "concept": [row.concept for row in rows],
            "style": [row.style for row in rows],
            "vendor": [row.vendor for row in rows],
            "category": [row.category for row in rows],
            "license": [row.licence for row in rows],
            "frequency": [pair.frequency for pair in part],
        }
        path = folder / f"{number:05d}.parquet"
        write_table(pyarrow.table(columns), path, compression="zstd", row_group_size=GROUP_ROWS)


def write_credits(folder: Path, vendors: Iterable[Vendor], splits: Splits, release: Release) -> None:
    """Write FOLDER/LICENSES.md: vendors that are in the set, with their pairs. Raises OSError."""
    pairs = Counter(pair.row.vendor for split in splits.values() for pair in split)
    text = PARTS_ABOUT.format(package=release.package, version=release.version)
    for vendor in vendors:
        if count := pairs[vendor.name]:
            title, author = _cell(vendor.title), _cell(vendor.author)
            text += f"| {vendor.name} | {count} | {title} | {author} | {vendor.licence} |\n"
    write_atomically(folder / CREDITS, text)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())
