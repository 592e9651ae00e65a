"""The icon data set in the plainest form: one process, one loop, every decision where it is made."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image

from disttempnet.data.icons.package import EMOJI, OPEN_LICENCES
from disttempnet.data.icons.release import Count, Release

# those of the package beside this file
STYLES = {
    "filled": "filled", "fill": "filled", "solid": "filled", "outline": "outline", "line": "outline",
    "stroke": "outline", "bold": "bold", "light": "light", "thin": "thin", "duotone": "two-tone", "rounded": "rounded",
    "sharp": "sharp", "regular": "", "s": "",
}  # fmt: skip
HELD_OUT = {"carbon", "iconoir", "mingcute", "eva", "game-icons", "healthicons"}


def words(name: str) -> tuple[str, str]:
    parts, style = [part for part in name.split("-") if part], []
    while len(parts) > 1 and (re.match(r"^\d+(px)?$", parts[-1]) or parts[-1] in STYLES):
        style.append(STYLES.get(parts.pop(), ""))
    return " ".join(parts), " ".join(sorted(set(filter(None, style))))


def picture(body: str, width: int, height: int) -> np.ndarray:
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="48" height="48" '
        f'color="#222">{body}</svg>'
    )
    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, background="white")))).convert("RGB")
    return np.asarray(image)


def rows_of(package: Path) -> list[dict[str, Any]]:
    """Rows in order, each with its picture's digest and its WebP."""
    about, rows, seen = json.loads((package / "collections.json").read_text()), [], set()
    for file in sorted((package / "json").glob("*.json")):
        data = json.loads(file.read_text())
        vendor = data["prefix"]
        info = about[vendor]
        if info["license"]["spdx"] not in OPEN_LICENCES or vendor in EMOJI or "Emoji" in info["category"]:
            continue
        category = {name: title for title, names in data.get("categories", {}).items() for name in names}
        one = set()
        for name, icon in data["icons"].items():
            concept, style = words(name)
            if icon.get("hidden") or (concept, style) in one or len(concept) < 2 or "animat" in icon["body"]:
                continue
            size = [icon.get(side, data.get(side, 16)) for side in ("width", "height")]
            try:
                pixels = picture(icon["body"], *size)
            except BaseException:
                continue
            digest = hashlib.blake2b(pixels.tobytes(), digest_size=12).digest()
            if pixels.min() > 200 or pixels.std() < 4 or digest in seen:
                continue
            seen.add(digest)
            one.add((concept, style))
            grey = bool((pixels.max(2) == pixels.min(2)).all())
            file_ = io.BytesIO()
            image = Image.fromarray(pixels)
            (image.convert("L") if grey else image).save(file_, "WEBP", lossless=grey, quality=80, method=4)
            rows.append(
                {
                    "image": {"bytes": file_.getvalue(), "path": f"{vendor}/{name}.webp"},
                    "name": name,
                    "digest": digest,
                    "concept": concept,
                    "style": style,
                    "vendor": vendor,
                    "category": category.get(name, ""),
                    "license": info["license"]["spdx"],
                }
            )
    return rows


def splits_of(rows: list[dict[str, Any]], unseen_concepts: int) -> dict[str, list[dict[str, Any]]]:
    rng, vendors = random.Random(0), defaultdict(set)
    for row in rows:
        vendors[row["concept"]].add(row["vendor"])
    shared = sorted(c for c, v in vendors.items() if len(v - HELD_OUT) >= 5 and len(v & HELD_OUT) >= 1)
    unseen = set(rng.sample(shared, unseen_concepts))
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "val_concepts": []}
    for row in rows:
        if row["concept"] in unseen:
            splits["val_concepts"].append(row)
        else:
            splits["val" if row["vendor"] in HELD_OUT else "train"].append(row)
    frequency = Counter(row["concept"] for row in splits["train"])
    splits["val"] = [row for row in splits["val"] if frequency[row["concept"]] >= 1]
    for split, items in splits.items():
        rng.shuffle(items)
        for row in items:
            text = row["concept"]
            if split == "train":
                draw = rng.random()
                if row["style"] and draw < 0.35:
                    text = f"{row['style']} {text}"
                elif row["category"] and draw < 0.55:
                    text = f"{text}, {row['category'].lower()}"
                elif draw < 0.7:
                    text = f"icon of {text}"
            row["caption"], row["frequency"] = text, frequency[row["concept"]]
    return splits


def release_of(splits: dict[str, list[dict[str, Any]]], unseen_concepts: int, tarball: bytes = b"") -> Release:
    """What a build of these rows has to give."""
    said, pictures = hashlib.sha256(), hashlib.sha256()
    for split, rows in splits.items():
        for row in rows:
            keys = ("name", "caption", "concept", "style", "vendor", "category", "license", "frequency")
            said.update(json.dumps([split, *(row[key] for key in keys)]).encode())
            pictures.update(row["digest"])
    counts = {
        split: Count(len(rows), len({row["concept"] for row in rows}), len({row["vendor"] for row in rows}))
        for split, rows in splits.items()
    }
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(tarball).digest()).decode()
    return Release(
        "@iconify/json", "2.2.535", integrity, "0.5.0", unseen_concepts, counts, said.hexdigest(), pictures.hexdigest()
    )
