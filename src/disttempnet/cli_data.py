"""The commands `disttempnet data …`. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from disttempnet.errors import UserError

INDEX = """Reads every shard once and writes a small index beside them: which samples there are, where they lie, which
of them cannot be used and why. Training does the same on first use; this command does it ahead, on all cores, and
says what it found. Ctrl-C or a kill loses nothing: the same command goes on where it was.

Again on changed shards: only those that are new or changed are scanned. New shards get ids after all others, so ids
stay; where shards are gone or changed, ids change. Either way the digest is another, and checkpoints of before do not
fit.

examples:
  disttempnet data index '/cc12m/{00000..01242}.tar'
  disttempnet data index '/data/{0..3}/{00000..00099}.tar' --workers 32
  disttempnet data index /recap --caption-key captions --out ~/recap.index
  disttempnet data index '/cc12m/{00000..01242}.tar' --checksum     the first time: store, then: compare
"""


def add_data_commands(commands: Any) -> None:
    """Add `data` and what is below it to the commands of the program."""
    data = commands.add_parser("data", help="index and look at training data")
    below = data.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    _add_index(below)


def _add_index(commands: Any) -> None:
    index = commands.add_parser(
        "index",
        help="index shards, or bring their index up to date",
        description=INDEX,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    index.add_argument(
        "patterns", nargs="+", metavar="PATTERN", help="a folder of .tar, or a pattern, as in data.train"
    )
    index.add_argument(
        "--checksum", action="store_true", help="hash all bytes of every shard (sha256), and compare with what is known"
    )
    index.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: one a core, at most)")
    index.add_argument("--caption-key", default="", metavar="KEY", help="captions are under this key of the .json")
    index.add_argument("--out", default="", metavar="FILE", help="the index (default: beside the shards)")
    index.set_defaults(run=run_index)


def run_index(options: argparse.Namespace) -> int:
    from rich.console import Console

    from disttempnet.data.building import Scan
    from disttempnet.data.indexing import update_index
    from disttempnet.data.summary import index_summary

    specs = [spec for pattern in options.patterns for spec in pattern.split("::")]
    if options.out and len(specs) > 1:
        raise UserError(f"--out names one index, but there are {len(specs)} patterns: index them one by one")
    if options.workers < 0:
        raise UserError(f"--workers {options.workers}: a number of processes, 0 for as many as there are cores")
    console = Console()
    for spec in specs:
        how = Scan(options.caption_key, options.workers, options.checksum)
        index, news = update_index(spec, str(Path(options.out)) if options.out else "", how)
        console.print(index_summary(index))
        console.print(news, markup=False, highlight=False)
    return 0
