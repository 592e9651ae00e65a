"""`disttempnet data COMMAND`: index, check, show, write and download data sets."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from disttempnet.data import Source

SPEC = "shards or another layout, as in data.train"


def add_data_commands(commands: Any) -> None:
    """Add the group to the command line's sub-parsers; each command sets `run`."""
    data = commands.add_parser("data", help="index, check, show, write and download data sets")
    parts = data.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    _add_preview(parts)


def _add_source(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """What a source needs to be opened."""
    if several:
        parser.add_argument("spec", nargs="+", metavar="SPEC", help=SPEC)
    else:
        parser.add_argument("spec", metavar="SPEC", help=SPEC)
    parser.add_argument(
        "--caption-key", default="", metavar="KEY", help="key of a sample's .json that holds its captions"
    )


def _open_source(options: argparse.Namespace, spec: str) -> Source:
    from disttempnet.config import SourceConfig
    from disttempnet.data import open_source

    return open_source([SourceConfig(path=spec, caption_key=options.caption_key)])


def _add_preview(parts: Any) -> None:
    preview = parts.add_parser("preview", help="random samples with captions and ids on one sheet")
    _add_source(preview)
    preview.add_argument("--out", default="preview.png", metavar="FILE", help=".png or .html (default: preview.png)")
    preview.add_argument("--count", type=int, default=48, metavar="N", help="samples (default: 48)")
    preview.add_argument("--seed", type=int, default=0, help="which ones (default: 0)")
    preview.set_defaults(run=_preview)


def _preview(options: argparse.Namespace) -> int:
    from disttempnet.data.preview import write_preview

    out = Path(options.out)
    note = write_preview(_open_source(options, options.spec), out, options.count, options.seed)
    print(f"preview: {out.resolve()}")
    if note:
        print(f"  {note}")
    return 0
