"""A small package of icons in the exact form of the real one: 310 real ones, and a vendor of odd ones."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

from disttempnet.data.icons.release import Release
from tests.data.icons.oracle import release_of, rows_of, splits_of

REAL = Path(__file__).with_name("package")
UNSEEN_CONCEPTS = 4
SQUARE = '<path fill="currentColor" d="M2 2h12v12H2z"/>'
DISC = '<circle cx="8" cy="8" r="6" fill="currentColor"/>'


def write_package(folder: Path) -> Path:
    """The real icons, and three vendors: odd ones, one of emoji, one without an open licence."""
    shutil.copytree(REAL, folder)
    charm = json.loads((REAL / "json" / "charm.json").read_text())["icons"]
    copied = next(iter(charm.values()))["body"]  # drawn by an earlier vendor
    odd = {
        "hidden": {"body": SQUARE, "hidden": True},
        "spinner": {"body": SQUARE.replace("/>", "><animate/></path>")},
        "x": {"body": SQUARE},
        "white": {"body": SQUARE.replace("currentColor", "#fff")},
        "broken": {"body": "<path fill="},
        "copied": {"body": copied},  # its other sizes take its place: the first is a copy too, the second is not
        "copied-24": {"body": copied},
        "copied-32": {"body": DISC},
        "copied-48": {"body": SQUARE},
        "disc-filled": {"body": DISC},  # is drawn above
        "red": {"body": SQUARE.replace("currentColor", "#d22"), "width": 20, "height": 20},
        "wide": {"body": SQUARE.replace("currentColor", "#2d2"), "width": 32},
    }
    add_vendor(folder, "zz-odd", odd, categories={"Shapes": ["red", "wide"]})
    add_vendor(folder, "twemoji", {"disc": {"body": DISC, "width": 17}}, category="Emoji")
    add_vendor(folder, "closed", {"disc": {"body": DISC, "width": 18}}, spdx="GPL-3.0-only")
    return folder


def add_vendor(
    package: Path, name: str, icons: dict[str, Any], spdx: str = "MIT", category: str = "Tests", **more: Any
) -> None:
    path = package / "collections.json"
    about = json.loads(path.read_text())
    about[name] = {
        "name": name.title(),
        "total": len(icons),
        "author": {"name": "A | B"},
        "license": {"spdx": spdx},
        "category": category,
    }
    path.write_text(json.dumps(about))
    content = {"prefix": name, "icons": icons, "width": 16, "height": 16, **more}
    (package / "json" / f"{name}.json").write_text(json.dumps(content))


def tarball_of(package: Path) -> bytes:
    """What `npm pack` makes of it."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        archive.add(package, "package")
    return file.getvalue()


@cache
def expected_splits(package: Path) -> dict[str, list[dict[str, Any]]]:
    return splits_of(rows_of(package), UNSEEN_CONCEPTS)


def release(package: Path, tarball: bytes = b"") -> Release:
    return release_of(expected_splits(package), UNSEEN_CONCEPTS, tarball)
