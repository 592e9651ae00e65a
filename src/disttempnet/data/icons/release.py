"""The release that the icon data set is made from, and the counts and digests that must come out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

SPLITS = ("train", "val", "val_concepts")


class Count(NamedTuple):
    """The size of a split."""

    pairs: int
    concepts: int
    vendors: int

    def __str__(self) -> str:
        return f"{self.pairs:,} pairs of {self.concepts:,} concepts by {self.vendors:,} vendors"


@dataclass(frozen=True)
class Release:
    """A version of the icon package and the data set made from it.

    Attributes:
        package, version: on the npm registry.
        integrity: of the package's tarball, as the registry states it.
        renderer: the version of resvg-py that the pixels are pinned for.
        unseen_concepts: how many concepts are held out of training.
        counts: of each split.
        rows: sha256 over the words of all rows, in order.
        pixels: sha256 over the pictures of all rows, in order.
    """

    package: str
    version: str
    integrity: str
    renderer: str
    unseen_concepts: int
    counts: Mapping[str, Count]
    rows: str
    pixels: str

    @property
    def name(self) -> str:
        return f"{self.package}@{self.version}"


RELEASE = Release(
    package="@iconify/json",
    version="2.2.535",
    integrity="sha512-nAV60ACUSHwnsb6fsp+letHlNkrwO4vzBtcC6B4EDHErQQfezk7E3nJdnwJjve6OCfMNO0uVT5Vrgna9/NCmXw==",
    renderer="0.5.0",
    unseen_concepts=300,
    counts={
        "train": Count(242_342, 71_036, 178),
        "val": Count(4_953, 2_706, 6),
        "val_concepts": Count(10_780, 300, 177),
    },
    rows="3c58155dbb628c73c66d83ce6bd8cc2ebc3b1fc7b7ba3c51fdc5a9f87751d46c",
    pixels="96fa1978ffc2d2cff79ae2b9f97b29aaff45f1963ee75c2d71ec5dc02fc899fa",
)
