"""Builds the pages of `search` and `classify`: one HTML file each, which loads nothing and needs no JavaScript."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from disttempnet.data.images import UnreadableImage
from disttempnet.data.source import Source
from disttempnet.report.items import Item
from disttempnet.report.page import open_template, publish
from disttempnet.report.runs.examples import picture
from disttempnet.sanitize import one_line
from disttempnet.search.classes import DOUBTFUL, ClassTally
from disttempnet.search.features import ImageFeatures
from disttempnet.search.nearest import Hit

HIT_SIDE = 256  # pixels; shown at most at 160
SHOWN = 12  # images of a class at either end, fewer where there are many classes
PICTURES = 1200  # of a page about classes, about


class Thumbnail(NamedTuple):
    """An image on a page: a data URI (empty if it is gone by now), its name, and the number below it."""

    picture: str
    name: str
    number: float


class ClassSection(NamedTuple):
    """A class on a page: how many images, their mean probability, how many are doubtful; surest and least sure ones."""

    name: str
    images: int
    mean: float
    doubtful: int
    surest: list[Thumbnail]
    least_sure: list[Thumbnail]


def shown_of_a_class(classes: int) -> int:
    """Return how many images of a class a page shows at either end."""
    return max(1, min(SHOWN, PICTURES // (2 * classes)))


def write_search_page(
    out: Path, model: str, features: ImageFeatures, queries: Sequence[str], found: Sequence[Sequence[Hit]]
) -> Path:
    """Write the page about a search: the nearest images of each query.

    Raises:
        UserError: it cannot be written.
    """
    hits = [thumbnails(features.source, [(hit.cosine, hit.sample) for hit in of_query]) for of_query in found]
    page = open_template("search.html").render(
        title=one_line(" · ".join(queries)),
        results=list(zip(map(one_line, queries), hits, strict=True)),
        **_about(model, features),
    )
    return publish(out, page)


def write_classes_page(
    out: Path,
    model: str,
    features: ImageFeatures,
    classes: Sequence[str],
    templates: Sequence[str],
    tally: ClassTally,
    tau: str,
) -> Path:
    """Write the page about images by class, the largest class first.

    Args:
        out: the file.
        model: its name.
        features: of the images.
        classes, templates: as given.
        tally: of all images.
        tau: the τ that was used, in words.

    Raises:
        UserError: it cannot be written.
    """
    order = sorted(range(len(classes)), key=lambda number: (-int(tally.count[number]), number))
    sections = [
        ClassSection(
            one_line(classes[number]),
            int(tally.count[number]),
            tally.mean(number),
            int(tally.doubtful[number]),
            thumbnails(features.source, tally.surest(number)),
            thumbnails(features.source, tally.least_sure(number)),
        )
        for number in order
    ]
    page = open_template("classify.html").render(
        title=f"{len(features):,} images in {len(classes):,} classes",
        sections=sections,
        templates=list(map(one_line, templates)),
        tau=tau,
        doubtful=DOUBTFUL,
        **_about(model, features),
    )
    return publish(out, page)


def thumbnails(source: Source, rated: Iterable[tuple[float, int]]) -> list[Thumbnail]:
    """Return images as shown, of (number, sample) pairs."""
    return [Thumbnail(_picture(source, sample), source.name(sample), number) for number, sample in rated]


def _picture(source: Source, sample: int) -> str:
    load = partial(source.image_bytes, sample)
    try:
        return picture(Item(source.name(sample), Path(source.where), 0, 0, ("",), "", id=sample, load=load), HIT_SIDE)
    except UnreadableImage:  # deleted in the meantime
        return ""


def _about(model: str, features: ImageFeatures) -> dict[str, object]:
    return {
        "model": one_line(model),
        "where": one_line(features.source.where),
        "count": len(features),
        "unreadable": features.describe_unreadable(),
    }
