"""The command `disttempnet data task`. Heavy imports wait until it is needed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from disttempnet.io.paths import path_argument
from disttempnet.io.ranges import integers
from disttempnet.terminal import say

TASK = """Writes the raw data of an evaluation task as its tars below a data root, in the layout of DataComp's download:
ROOT/wds_TASK_test/test/0.tar …. `evaluate` reads raw folders as they are and gives the same numbers; tars are for disks
that many nodes read, where a hundred thousand small files are slow. Where both are below the root, the tars are taken.

RAW is one of

  a folder with the published CSV and its images, unzipped: Flickr, MSCOCO, WinoGAViL
  folder:PATH    images in folders of classes, or CIFAR for Python, for a task of plain classification;
                 PATH/classnames.txt and templates.txt are taken along (docs/evaluation.md)

Images are copied byte for byte. What the raw folder lacks is named, and makes the exit code 1. The folder is there when
it is whole; after a stop the same command begins anew.

examples:
  disttempnet data task retrieval/mscoco_2014_5k_test_image_text_retrieval raw/mscoco --out /data/datacomp
  disttempnet data task misc/winogavil /data/datacomp/winogavil --out /data/datacomp
  disttempnet data task imagenet1k folder:/imagenet/val --out /data/datacomp
  disttempnet evaluate --list                              the names of the tasks
"""
LEFT_OUT_SHOWN = 10  # of what is left out


def add_task_command(parts: Any) -> None:
    """Add `task` to the commands of `data`."""
    task = parts.add_parser(
        "task",
        help="write raw data of an evaluation task as its tars",
        description=TASK,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    task.add_argument("task", metavar="TASK", help="a task of `evaluate --list`")
    task.add_argument("source", type=path_argument, metavar="RAW", help="its raw folder, or folder:PATH")
    task.add_argument("--out", type=path_argument, required=True, metavar="ROOT", help="the data root")
    task.add_argument(
        "--samples-per-shard",
        type=integers(1, 10**9).parse,
        default=1000,
        metavar="N",
        help="images of a tar (default: 1000)",
    )
    task.set_defaults(run=_task)


def _task(options: argparse.Namespace) -> int:
    from rich.filesize import decimal

    from disttempnet.evaluation.datasets.convert import convert
    from disttempnet.evaluation.tasks import find_task
    from disttempnet.io.jobs import stopped_by_sigterm

    task, root = find_task(options.task), Path(options.out)
    with stopped_by_sigterm():
        done = convert(task, options.source, root, options.samples_per_shard)
    tars = f"{done.shards:,} tar{'s' if done.shards != 1 else ''}"
    say(f"{done.folder.resolve()}: {tars}, {done.samples:,} images, {decimal(done.size)}")
    for name in done.left_out[:LEFT_OUT_SHOWN]:
        say(f"left out: {name}")
    if len(done.left_out) > LEFT_OUT_SHOWN:
        say(f"and {len(done.left_out) - LEFT_OUT_SHOWN:,} more")
    say(f"evaluate on it: disttempnet evaluate MODEL --data-root {root.resolve()} --tasks {task.name}")
    return int(bool(done.left_out))
