"""Arguments of commands that read data: what names a source, and how it is opened."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from disttempnet.errors import UserError
from disttempnet.io.paths import path_argument
from disttempnet.io.ranges import GIGABYTES

if TYPE_CHECKING:
    from disttempnet.config import SourceConfig

SPEC_HELP = "shards or another layout, as in data.train"


def add_source(
    parser: argparse.ArgumentParser, several: bool = False, metavar: str = "SPEC", about: str = SPEC_HELP
) -> None:
    """Add the arguments that name and open a source; `metavar` and `about` are of the one that names it."""
    many: dict[str, Any] = {"nargs": "+"} if several else {}
    parser.add_argument("spec", type=path_argument, metavar=metavar, help=about, **many)
    parser.add_argument("--caption-key", default="", metavar="KEY", help="key of the captions in .json or rows")
    parser.add_argument("--images", type=path_argument, metavar="DIR", help="listings: root of relative image paths")
    parser.add_argument("--image-key", default="", metavar="KEY", help="listings: key or column of the image")
    parser.add_argument(
        "--join-rows",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="listings: join rows of the same image into one sample with all its captions (default)",
    )
    parser.add_argument(
        "--index", type=path_argument, metavar="FILE", help="file of the index (default: beside the data)"
    )
    parser.add_argument("--cache", type=path_argument, metavar="DIR", help="remote shards: folder of the local cache")
    parser.add_argument(
        "--cache-gb",
        type=GIGABYTES.parse,
        metavar="GB",
        help="remote shards: limit of the cache in GB (default: 100)",
    )


def sources_of(options: argparse.Namespace) -> list[SourceConfig]:
    """Return the sources that these arguments name.

    Raises:
        UserError: an empty name, or one index for several sources.
    """
    from disttempnet.config import SourceConfig

    given = [options.spec] if isinstance(options.spec, str) else options.spec
    specs = [spec for one in given for spec in one.split("::")]
    if not all(spec.strip() for spec in specs):
        raise UserError(f"'{'::'.join(given)}' names an empty source beside '::': leave it out")
    if options.index and len(specs) > 1:
        raise UserError(f"--index names one index, but there are {len(specs)} data sets; index them one by one")
    keys = ("caption_key", "images", "image_key", "join_rows", "index", "cache", "cache_gb")
    values = {key: value for key in keys if (value := getattr(options, key, None)) is not None}
    return [SourceConfig(path=spec, **values) for spec in specs]
