"""`disttempnet search` and `disttempnet classify`: an opened model on images, for the terminal, a table and a page."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from disttempnet import distributed
from disttempnet.config import SourceConfig
from disttempnet.errors import UserError
from disttempnet.evaluation import embed_captions
from disttempnet.evaluation.class_features import kept_class_features
from disttempnet.evaluation.command import OpenedModel
from disttempnet.evaluation.encoder import FeatureEncoder, checkpoint_hash, evaluation_mode
from disttempnet.evaluation.tasks import Head
from disttempnet.io.files import atomic, is_device, unwritable_named
from disttempnet.models.text import Tokenizer
from disttempnet.sanitize import csv_cell, one_line
from disttempnet.search.classes import Classified, ClassTally, classify
from disttempnet.search.features import Embedding, ImageFeatures, embed_images, open_images
from disttempnet.search.nearest import Hit, nearest
from disttempnet.search.page import shown_of_a_class, write_classes_page, write_search_page
from disttempnet.search.tau import ImageTau
from disttempnet.terminal import say

COLUMNS = ("name", "class", "probability", "second_class", "second_probability")


@dataclass(frozen=True)
class ImagesRequest:
    """Images that are wanted, and how they are embedded; see `Embedding`."""

    sources: Sequence[SourceConfig]
    batch: int = 256
    workers: int = 2
    cache: Path | None = None


def run_search(
    model: OpenedModel, request: ImagesRequest, queries: Sequence[str], top: int, html: Path | None = None
) -> None:
    """Print the nearest images of each query, and write a page.

    Args:
        model: opened.
        request: the images.
        queries: none of them blank.
        top: images of each query.
        html: the page; None = none.

    Raises:
        UserError: no images, features that are not finite, no room, or a page that cannot be written.
    """
    with distributed.session(timeout_minutes=60.0) as device:
        model.towers.module.to(device)
        if distributed.is_main():
            for query in filter(partial(_is_cut, model.towers.tokenizer), queries):
                say(f"longer than the text tower reads, its end is cut off: {one_line(query)}", error=True)
        texts = embed_captions(model.towers, queries, device=device, batch=request.batch).cpu()
        if not texts.isfinite().all():
            raise UserError("the text tower gives features that are not finite")
        features = _features(model, request, device)
        if not distributed.is_main():
            return
        found = nearest(features.by_shard(), texts, top)
        _say_hits(features, queries, found)
        if html is not None:
            page = write_search_page(html, model.title, features, queries, found)
            say(f"page: {page.resolve()}", error=True)


def run_classify(
    model: OpenedModel,
    request: ImagesRequest,
    classes: Sequence[str],
    templates: Sequence[str],
    out: Path,
    html: Path | None = None,
) -> None:
    """Write the two most probable classes of every image to a CSV, print the counts, and write a page.

    Args:
        model: opened.
        request: the images.
        classes: C names, C ≥ 2.
        templates: prompts of a class, with {c} for its name; their features are averaged.
        out: the CSV.
        html: the page; None = none.

    Raises:
        UserError: no images, features that are not finite, no room, or a file that cannot be written.
    """
    with distributed.session(timeout_minutes=60.0) as device:
        model.towers.module.to(device)
        objective = model.config.loss.name if model.config is not None else ""
        tau = ImageTau(model.towers, model.loss, objective)
        known = kept_class_features(checkpoint_hash(model.towers))
        encoder = FeatureEncoder(model.towers, device, request.batch)
        with evaluation_mode(model.towers.module):
            head = known.features(Head(tuple(classes), tuple(templates)), encoder).cpu()
        features = _features(model, request, device)
        if not distributed.is_main():
            return
        tally = ClassTally(len(classes), shown_of_a_class(len(classes)))
        with _open_csv(out) as write:
            for part in classify(features.by_shard(), head, tau):
                tally.add(part)
                write(_rows(features, classes, part))
        _say_classes(classes, tally, tau.describe(), error=is_device(out))
        say(f"classes: {out.absolute()} ({len(features):,} rows)", error=True)
        if html is not None:
            page = write_classes_page(html, model.title, features, classes, templates, tally, tau.describe())
            say(f"page: {page.resolve()}", error=True)


def _features(model: OpenedModel, request: ImagesRequest, device: torch.device) -> ImageFeatures:
    """Return the features of the images, after saying what is known of them."""
    source = open_images(request.sources)
    if distributed.is_main():
        for line in (*model.notes, *source.problems().splitlines()):
            say(line, error=True)
    how = Embedding(device, request.batch, request.workers, request.cache)
    features = embed_images(model.towers, source, how)
    if distributed.is_main():
        for line in filter(None, (features.describe_unreadable(), features.describe())):
            say(line, error=True)
    return features


def _is_cut(tokenizer: Tokenizer, query: str) -> bool:
    """Return whether a text tower reads no word at the end of a query."""
    words = query.split()
    return len(words) > 1 and torch.equal(tokenizer([query]), tokenizer([" ".join(words[:-1])]))


def _say_hits(features: ImageFeatures, queries: Sequence[str], found: Sequence[Sequence[Hit]]) -> None:
    """Print a ranking a query: rank, cosine, name, in lines that are never cut."""
    for query, hits in zip(queries, found, strict=True):
        say(one_line(query))
        for rank, hit in enumerate(hits, 1):
            say(f"{rank:>6}  {hit.cosine:7.4f}  {features.source.name(hit.sample)}")


def _say_classes(classes: Sequence[str], tally: ClassTally, tau: str, error: bool) -> None:
    """Print a row a class, the largest first; to standard error where the CSV goes to standard output."""
    width = max(map(len, classes))
    say(f"{'class':<{width}}  {'images':>9}  {'mean probability':>16}", error=error)
    for number in sorted(range(len(classes)), key=lambda number: (-int(tally.count[number]), number)):
        mean = f"{tally.mean(number):16.3f}" if tally.count[number] else f"{'–':>16}"
        say(f"{one_line(classes[number]):<{width}}  {tally.count[number]:>9,}  {mean}", error=error)
    say(tau, error=error)


@contextmanager
def _open_csv(out: Path) -> Iterator[Callable[[Iterable[Sequence[object]]], None]]:
    """Open the table; it is renamed into place when the block ends without an error."""
    with ExitStack() as opened:
        with unwritable_named(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            temporary = opened.enter_context(atomic(out))
            file = opened.enter_context(temporary.open("w", encoding="utf-8", newline=""))
        writer = csv.writer(file, lineterminator="\n")

        def write(rows: Iterable[Sequence[object]]) -> None:
            with unwritable_named(out):
                writer.writerows(rows)

        write([COLUMNS])
        yield write
        with unwritable_named(out):
            opened.close()


def _rows(features: ImageFeatures, classes: Sequence[str], part: Classified) -> Iterator[tuple[object, ...]]:
    """Rows of the table, as `COLUMNS` names them."""
    cells = [csv_cell(one_line(name)) for name in classes]
    values = zip(part.ids.tolist(), part.classes.tolist(), part.probabilities.tolist(), strict=True)
    for sample, (first, second), (probability, other) in values:
        name = csv_cell(features.source.name(sample))
        yield name, cells[first], f"{probability:.6g}", cells[second], f"{other:.6g}"
