"""The command `disttempnet embed`. Heavy imports wait until it is needed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from disttempnet.cli.model import TARGETS, add_resize_positions, open_target
from disttempnet.cli.source import add_source, sources_of
from disttempnet.io.paths import path_argument
from disttempnet.io.ranges import BATCH, WORKERS
from disttempnet.terminal import say

EMBED = """Embeds all images and captions of a data set with both towers, and writes unit features.

  OUT/features-00000.safetensors   ids, image [n, D], text [t, D], text_ids [t]; names and captions in its metadata
  OUT/features-00000.parquet       or columns id, name, captions, image, text
  OUT/about.json                   what the features are of, and the digest of that

After a stop, run the same command again: it goes on with what is left. Files of another origin are never replaced.
torchrun shares the work between GPUs.

examples:
  disttempnet embed runs/mine '/cc3m/{00000..00331}.tar' --out cc3m-features
  disttempnet embed ViT-B-32/openai photos.csv --images /photos --out photos --format parquet --dtype float16
"""


def add_embed_command(commands: Any) -> None:
    """Add `embed` to the commands of the program."""
    embed = commands.add_parser(
        "embed",
        help="features of a data set's images and captions as safetensors or Parquet",
        description=EMBED,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    embed.add_argument("target", type=path_argument, help=f"one of: {TARGETS}")
    add_resize_positions(embed)
    add_source(embed)
    embed.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="folder of the files")
    embed.add_argument("--format", choices=("safetensors", "parquet"), default="safetensors", help="of the files")
    embed.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the features")
    embed.add_argument(
        "--batch", type=BATCH.parse, default=256, metavar="N", help="images a forward pass (default: 256)"
    )
    embed.add_argument(
        "--workers", type=WORKERS.parse, default=2, metavar="N", help="decoding processes of each rank (default: 2)"
    )
    embed.set_defaults(run=_embed, memory="lower --batch")


def _embed(options: argparse.Namespace) -> int:
    from disttempnet import distributed
    from disttempnet.data import open_source
    from disttempnet.features.build import Build
    from disttempnet.features.export import check_output, embed_source

    out, sources = Path(options.out), sources_of(options)
    check_output(out, options.format)
    model = open_target(options.target, options.resize_positions, random=False)
    with distributed.session(timeout_minutes=60.0) as device:
        source = open_source(sources)
        model.towers.module.to(device)
        if distributed.is_main():
            for note in model.notes:
                say(note)
        how = Build(source, device, options.batch, options.workers, None, len(source))
        done = embed_source(model.towers, how, out, options.format, options.dtype, model.title)
        if distributed.is_main():
            for line in source.problems().splitlines():
                say(line)
            already = "already complete: " if done.was_complete else ""
            say(f"{already}features of {done.samples:,} samples of {len(source):,}: {out.resolve()}")
    return 0
