"""Splits and captions of icons. Everything follows from the rows' order and one seed."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from disttempnet.data.icons.release import SPLITS, Count, Release

SEED = 0
UNSEEN_VENDORS = {"carbon", "eva", "game-icons", "healthicons", "iconoir", "mingcute"}  # artists of the split val
UNSEEN_DRAWN_BY = 5  # vendors of train that have drawn a concept held out, at least; and one of the others


class Row(NamedTuple):
    """A drawn icon.

    Attributes:
        picture: its digest.
        image: WebP.
    """

    vendor: str
    licence: str
    name: str
    concept: str
    style: str
    category: str
    picture: bytes
    image: bytes


class Pair(NamedTuple):
    """An icon with its caption, and how many training pairs its concept has."""

    row: Row
    caption: str
    frequency: int


Splits = Mapping[str, Sequence[Pair]]


def split_rows(rows: Sequence[Row], release: Release) -> dict[str, list[Pair]]:
    """Deal the rows to the splits, in a random order, and draw their captions.

    val has the concepts of train drawn by vendors that are never trained on; val_concepts has concepts never trained
    on, by all vendors. Captions of train vary; elsewhere a caption is the concept.
    """
    # concepts held out: drawn by several vendors of train and by one of the others
    rng = random.Random(SEED)
    vendors: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows:
        vendors[row.concept].add(row.vendor)
    shared = sorted(
        concept
        for concept, drawn_by in vendors.items()
        if len(drawn_by - UNSEEN_VENDORS) >= UNSEEN_DRAWN_BY and drawn_by & UNSEEN_VENDORS
    )
    unseen = set(rng.sample(shared, min(release.unseen_concepts, len(shared))))

    # rows of each split
    dealt: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row in rows:
        by_whom = "val" if row.vendor in UNSEEN_VENDORS else "train"
        dealt["val_concepts" if row.concept in unseen else by_whom].append(row)
    frequency = Counter(row.concept for row in dealt["train"])
    dealt["val"] = [row for row in dealt["val"] if row.concept in frequency]

    # one stream of random numbers: splits in order, each shuffled before its captions are drawn
    pairs = {}
    for split, own in dealt.items():
        rng.shuffle(own)
        pairs[split] = [
            Pair(row, _caption(row, rng) if split == "train" else row.concept, frequency[row.concept]) for row in own
        ]
    return pairs


def _caption(row: Row, rng: random.Random) -> str:
    """The concept alone, or with style, category, or "icon of"; which one is drawn depends on what the row has."""
    draw = rng.random()
    if row.style and draw < 0.35:
        return f"{row.style} {row.concept}"
    if row.category and draw < 0.55:
        return f"{row.concept}, {row.category.lower()}"
    return f"icon of {row.concept}" if draw < 0.7 else row.concept


def count_of(pairs: Sequence[Pair]) -> Count:
    """The size of a split."""
    return Count(len(pairs), len({pair.row.concept for pair in pairs}), len({pair.row.vendor for pair in pairs}))


def digests_of(splits: Splits) -> tuple[str, str]:
    """sha256 over the words of all rows, and over their pictures, in order."""
    words, pictures = hashlib.sha256(), hashlib.sha256()
    for split, pairs in splits.items():
        for row, caption, frequency in pairs:
            said = [split, row.name, caption, row.concept, row.style, row.vendor, row.category, row.licence, frequency]
            words.update(json.dumps(said).encode())
            pictures.update(row.picture)
    return words.hexdigest(), pictures.hexdigest()
