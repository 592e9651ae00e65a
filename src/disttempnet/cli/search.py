"""The commands `disttempnet search` and `disttempnet classify`. Heavy imports wait until they are needed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disttempnet.cli.model import TARGETS, add_resize_positions, open_target
from disttempnet.cli.source import add_source, sources_of
from disttempnet.errors import UserError
from disttempnet.io.paths import path_argument
from disttempnet.io.ranges import BATCH, WORKERS, integers
from disttempnet.terminal import say

if TYPE_CHECKING:
    from disttempnet.search.command import ImagesRequest

CACHED = """IMAGES is a folder of images at any depth, captions or not, or shards or a listing, as in data.train.
Images are embedded once and kept in the user's cache, by weights, transform, and names, sizes and times of the files.
After a stop, run the same command again: it goes on with what is left. torchrun shares the work between GPUs."""

SEARCH = f"""Finds the images that are nearest to words: by the cosine of their features.

{CACHED}

examples:
  disttempnet search runs/mine photos "a red apple"
  disttempnet search ViT-B-32/openai photos "a red apple" "a green pear" --top 30 --html found.html
"""

CLASSIFY = f"""Writes the two most probable classes of every image, and their probabilities, to a CSV.

{CACHED}

A probability is a softmax of cosine / τ over the given classes alone: an image of none of them has a most probable one
too. τ is that of the model. A run whose objective has one number, constant or learned, uses it; one with a temperature
network uses what it predicts from each image; one with a τ for each training sample (isogclr, …) has none for other
images, and the mean of its last batch stands in. A model that is no run has a logit scale, 1 / τ. The command says
which τ it was.

examples:
  disttempnet classify runs/mine photos --classes apple,pear,plum
  disttempnet classify ViT-B-32/openai photos --classes fruits.txt --out fruits.csv --html fruits.html
  disttempnet classify runs/mine photos --classes apple,pear --templates "a photo of a {{c}}." "a bowl of {{c}}s"
"""
TOP = integers(1, 10_000)
PAGES = ("", ".htm", ".html")


def add_search_commands(commands: Any) -> None:
    """Add `search` and `classify` to the commands of the program."""
    search = commands.add_parser(
        "search",
        help="images that are nearest to words, by a run or another model",
        description=SEARCH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_images(search)
    search.add_argument("queries", nargs="+", metavar="QUERY", help='what to look for: "a red apple"')
    search.add_argument("--top", type=TOP.parse, default=10, metavar="N", help="images of each query (default: 10)")
    search.set_defaults(run=_search, memory="lower --batch")

    classify = commands.add_parser(
        "classify",
        help="images by classes of your own, as a CSV and a page",
        description=CLASSIFY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_images(classify)
    classify.add_argument(
        "--classes",
        type=path_argument,
        required=True,
        metavar="a,b,c|FILE",
        help="names, or a file with a line a class",
    )
    classify.add_argument(
        "--templates",
        nargs="+",
        default=[],
        metavar="TEXT|FILE",
        help='prompts of a class, {c} = its name, or a file of them (default: "a photo of a {c}." and "{c}")',
    )
    classify.add_argument(
        "--out", type=path_argument, default="classified.csv", metavar="FILE", help="table (default: classified.csv)"
    )
    classify.set_defaults(run=_classify, memory="lower --batch")


def _add_images(parser: argparse.ArgumentParser) -> None:
    """Add the model, the images and the page."""
    parser.add_argument("target", type=path_argument, metavar="MODEL", help=f"one of: {TARGETS}")
    add_resize_positions(parser)
    add_source(parser, metavar="IMAGES", about="a folder of images; or shards or another layout, as in data.train")
    parser.add_argument("--html", type=path_argument, metavar="FILE", help="also write a page with the images")
    parser.add_argument(
        "--cache-features",
        type=path_argument,
        metavar="DIR",
        help="folder that features are kept in (default: features/ in the user's cache)",
    )
    parser.add_argument(
        "--batch", type=BATCH.parse, default=256, metavar="N", help="images a forward pass (default: 256)"
    )
    parser.add_argument(
        "--workers", type=WORKERS.parse, default=2, metavar="N", help="decoding processes of each rank (default: 2)"
    )


def _request(options: argparse.Namespace) -> ImagesRequest:
    """Return the images, after a look at the page: before the model is opened."""
    from disttempnet.io.files import refuse_unwritable
    from disttempnet.search.command import ImagesRequest

    if (page := _page(options)) is not None:
        if page.suffix.lower() not in PAGES:
            raise UserError(f"--html {page}: the page is an .html file")
        refuse_unwritable(page)
    cache = Path(options.cache_features) if options.cache_features else None
    return ImagesRequest(sources_of(options), options.batch, options.workers, cache)


def _page(options: argparse.Namespace) -> Path | None:
    return Path(options.html) if options.html else None


def _search(options: argparse.Namespace) -> int:
    for query in options.queries:
        if not query.strip():
            raise UserError('search: an empty query: say what to look for, "a red apple"')
    request = _request(options)
    from disttempnet.search.command import run_search

    model = open_target(options.target, options.resize_positions, random=False)
    run_search(model, request, options.queries, options.top, _page(options))
    return 0


def _classify(options: argparse.Namespace) -> int:
    from disttempnet.io.files import is_device, refuse_unwritable
    from disttempnet.search.classes import read_classes, read_templates

    classes, notes = read_classes(options.classes)
    templates = read_templates(options.templates)
    out = Path(options.out)
    if out.suffix.lower() != ".csv" and not is_device(out):
        raise UserError(f"--out {out}: the table is a .csv file")
    refuse_unwritable(out)
    request = _request(options)
    from disttempnet.search.command import run_classify

    for note in notes:
        say(note, error=True)
    model = open_target(options.target, options.resize_positions, random=False)
    run_classify(model, request, classes, templates, out, _page(options))
    return 0
