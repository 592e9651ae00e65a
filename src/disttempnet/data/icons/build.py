"""Builds the icon data set: package → pictures, vendor by vendor over worker processes → splits → Parquet.

OUT/train/  OUT/val/  OUT/val_concepts/   Parquet
OUT/LICENSES.md                           authors and licences
OUT/icons.json                            what was built, and with what; written last
OUT/.building/                            package and pictures until then: after a kill the same command goes on
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from disttempnet.data.icons.built import MANIFEST
from disttempnet.data.icons.draw import Icon, digest_of, draw, encode, icons_of, need_libraries
from disttempnet.data.icons.package import Vendor, read_json, unpack, vendors_of
from disttempnet.data.icons.release import RELEASE, SPLITS, Count, Release
from disttempnet.data.icons.splits import Row, Splits, count_of, digests_of, split_rows
from disttempnet.data.icons.write import write_credits, write_split
from disttempnet.errors import UserError, notice
from disttempnet.io.files import WRITING, atomic, locked, unwritable_named, write_atomically
from disttempnet.io.jobs import run_jobs
from disttempnet.io.progress import Meter
from disttempnet.terminal import say

BUILDING = ".building"
REPORT_EVERY = 100  # icons


class Drawn(NamedTuple):
    """An icon that a vendor's worker has drawn, or has left undrawn, as another stands for its concept and style."""

    name: str
    concept: str
    style: str
    category: str
    picture: bytes | None
    image: bytes | None


def build_icons(
    out: Path, given: Path | None = None, workers: int = 1, release: Release = RELEASE, progress: bool = True
) -> dict[str, Count]:
    """Build the data set into a folder, or what is missing of it.

    Args:
        given: the npm package as a .tgz or a folder; None = download.
        workers: processes; 1 = this one. They change nothing about the rows.
        progress: show a bar on standard error.

    Returns:
        The size of each split.

    Raises:
        UserError: a library is missing, the package is another one, the folder holds something else or cannot be
            written, or other rows come out than the release has.
    """
    if (out / MANIFEST).is_file():
        return _counts_of(out)
    renderer = need_libraries()
    building = out / BUILDING
    if not building.is_dir() and (taken := [split for split in SPLITS if (out / split).exists()]):
        raise UserError(f"{out}: holds {taken[0]} and no {MANIFEST}: name another folder")
    with unwritable_named(out):
        building.mkdir(parents=True, exist_ok=True)
        try:
            with locked(building / "lock", wait=False):
                package = unpack(given, building, release)
                vendors = vendors_of(package)
                pictures = building / f"drawn-{_drawn_with(renderer, release)}"
                pictures.mkdir(exist_ok=True)
                _draw_missing(vendors, package, pictures, workers, progress)
                splits = split_rows(_merged(vendors, package, pictures), release)
                counts = {split: count_of(pairs) for split, pairs in splits.items()}
                rows, pixels = digests_of(splits)
                _check(counts, rows, pixels, renderer, release)
                _write(out, splits, vendors, release)
                _write_manifest(out, counts, rows, pixels, release)
        except BlockingIOError:
            raise UserError(f"{out}: another command is building the icons here") from None
    shutil.rmtree(building, ignore_errors=True)
    return counts


def _counts_of(out: Path) -> dict[str, Count]:
    """Return the contents of a built folder, from its manifest. Raises UserError: that is damaged."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        return {split: Count(**manifest["counts"][split]) for split in SPLITS}
    except (ValueError, KeyError, TypeError, OSError):
        raise UserError(f"{out / MANIFEST}: is damaged: delete {out} and build it anew") from None


def _drawn_with(renderer: str, release: Release) -> str:
    """A name for pictures: another one where they may be others."""
    code = b"".join(Path(__file__).with_name(name).read_bytes() for name in ("build.py", "draw.py"))
    facts = [release.name, release.integrity, renderer, version("pillow"), hashlib.sha256(code).hexdigest()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def _draw_missing(vendors: Sequence[Vendor], package: Path, folder: Path, workers: int, progress: bool) -> None:
    """Draw the vendors that have no file in the folder yet, the largest first."""
    missing = [vendor for vendor in vendors if not _drawn_file(folder, vendor).is_file()]
    missing.sort(key=lambda vendor: -vendor.icons)
    for leftover in folder.glob(f"{WRITING}*"):
        leftover.unlink()
    total, waiting = (sum(vendor.icons for vendor in some) for some in (vendors, missing))
    try:
        with Meter("drawing icons", total, total - waiting, active=progress) as meter:
            for _, count in run_jobs(partial(_draw_vendor, package, folder), missing, workers):
                meter.advance(count)
    except (KeyboardInterrupt, SystemExit):
        whole = sum(_drawn_file(folder, vendor).is_file() for vendor in vendors)
        say(f"stopped: {whole} of {len(vendors)} vendors are drawn; the same command goes on", error=True)
        raise


def _drawn_file(folder: Path, vendor: Vendor) -> Path:
    return folder / f"{vendor.name}.parquet"


def _draw_vendor(package: Path, folder: Path, vendor: Vendor) -> Iterator[int]:
    """A worker's job: the icons of one vendor, each concept and style once, as a file; yields how many it has seen."""
    import pyarrow
    from pyarrow.parquet import write_table

    rows: list[Drawn] = []
    known: set[tuple[str, str]] = set()
    pictures: set[bytes] = set()
    seen = told = 0
    for seen, icon in enumerate(icons_of(_collection(package, vendor)), 1):
        if (icon.concept, icon.style) in known:
            rows.append(Drawn(*icon[:4], None, None))
        elif (pixels := draw(icon)) is not None and (picture := digest_of(pixels)) not in pictures:
            known.add((icon.concept, icon.style))
            pictures.add(picture)
            rows.append(Drawn(*icon[:4], picture, encode(pixels)))
        if seen - told >= REPORT_EVERY:
            yield seen - told
            told = seen
    kinds = [pyarrow.string()] * 4 + [pyarrow.binary()] * 2
    schema = pyarrow.schema(list(zip(Drawn._fields, kinds, strict=True)))
    path = _drawn_file(folder, vendor)
    with unwritable_named(path), atomic(path) as temporary:  # here, as a worker's OSError would be a traceback
        write_table(pyarrow.Table.from_pylist([row._asdict() for row in rows], schema), temporary)
    yield vendor.icons - told


def _collection(package: Path, vendor: Vendor) -> dict[str, object]:
    return dict(read_json(package / "json" / f"{vendor.name}.json"))


def _merged(vendors: Sequence[Vendor], package: Path, folder: Path) -> list[Row]:
    """All icons in order, each picture once, and of each vendor each concept and style once.

    A picture that an earlier vendor has goes. Then the next icon of its concept and style takes its place, which the
    vendor's worker may have left undrawn.
    """
    from pyarrow.parquet import read_table

    rows: list[Row] = []
    pictures: set[bytes] = set()
    for vendor in vendors:
        known: set[tuple[str, str]] = set()
        icons: dict[str, Icon] = {}
        for values in read_table(_drawn_file(folder, vendor), use_threads=False).to_pylist():
            drawn = Drawn(**values)
            if (drawn.concept, drawn.style) in known:
                continue
            picture, image = drawn.picture, drawn.image
            if picture is None or image is None:
                icons = icons or {icon.name: icon for icon in icons_of(_collection(package, vendor))}
                if (pixels := draw(icons[drawn.name])) is None:
                    continue
                picture, image = digest_of(pixels), encode(pixels)
            if picture not in pictures:
                pictures.add(picture)
                known.add((drawn.concept, drawn.style))
                rows.append(Row(vendor.name, vendor.licence, *drawn[:4], picture, image))
    return rows


def _check(counts: dict[str, Count], rows: str, pixels: str, renderer: str, release: Release) -> None:
    """Raise UserError where other rows came out than the release has; say where only pixels differ."""
    same = renderer == release.renderer
    why = (
        f"the package is not {release.name} as published: get it anew"
        if same
        else f"resvg-py {renderer} draws other pictures than {release.renderer}: "
        f"pip install resvg-py=={release.renderer}"
    )
    for split, expected in release.counts.items():
        if counts[split] != expected:
            raise UserError(f"{split}: {counts[split]}, where {release.name} gives {expected}; {why}")
    if rows != release.rows:
        raise UserError(f"the rows are others than those of {release.name} (sha256 {rows[:12]}…); {why}")
    if pixels != release.pixels:
        notice(
            f"the rows are those of {release.name}, with other pixels (resvg-py {renderer}, published with "
            f"{release.renderer}): results may differ slightly from published ones"
        )


def _write(out: Path, splits: Splits, vendors: Sequence[Vendor], release: Release) -> None:
    """Put the splits in place, each whole; those of a command that was killed here are replaced."""
    for split, pairs in splits.items():
        temporary = out / BUILDING / split
        for leftover in (temporary, out / split):
            shutil.rmtree(leftover, ignore_errors=True)
        write_split(temporary, pairs)
        os.replace(temporary, out / split)
    write_credits(out, vendors, splits, release)


def _write_manifest(out: Path, counts: dict[str, Count], rows: str, pixels: str, release: Release) -> None:
    manifest = {
        "package": release.name,
        "integrity": release.integrity,
        "counts": {split: count._asdict() for split, count in counts.items()},
        "rows": rows,
        "pixels": pixels,
        "made_with": {name: version(name) for name in ("resvg_py", "pillow", "pyarrow")},
    }
    write_atomically(out / MANIFEST, json.dumps(manifest, indent=2) + "\n")
