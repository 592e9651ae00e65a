"""`disttempnet data COMMAND`: index, check, show, write and download data sets."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disttempnet.cli.source import add_source, sources_of
from disttempnet.cli.task import add_task_command
from disttempnet.errors import UserError
from disttempnet.io.files import refuse_unwritable, unwritable_named
from disttempnet.io.machine import cores
from disttempnet.io.paths import path_argument
from disttempnet.io.ranges import SAMPLES, SEEDS, WORKERS, integers
from disttempnet.terminal import console, say

if TYPE_CHECKING:
    from disttempnet.data.tools.unreadable import Fault

SAMPLE_COUNT = integers(1, 10**9)

INDEX_HELP = """\
Reads every shard once and writes a small index beside them: samples, byte ranges, unusable samples and why. Training
does the same on first use; this command does it ahead of time, on all cores, and prints statistics. After Ctrl-C or a
kill, run it again: it resumes. For other layouts it reads the rows, in one process.

On changed shards, run it again: it scans only new and changed ones. New shards get the last ids, so old ids stay. If
shards are gone or changed, ids change. In both cases the digest changes and older checkpoints do not fit.

examples:
  disttempnet data index '/cc12m/{00000..01242}.tar'
  disttempnet data index '/data/{0..3}/{00000..00099}.tar' --workers 32
  disttempnet data index /recap --caption-key captions --index ~/recap.index
  disttempnet data index '/cc12m/{00000..01242}.tar' --checksum     stores hashes, later compares
"""

VERIFY_HELP = """\
Reads images and captions as training does. Exit code 0: all can be read; 1: something is broken; 2: the data could not
be opened.

examples:
  disttempnet data verify '/cc12m/{00000..01242}.tar' --out broken.jsonl
  disttempnet data verify /cc3m /cc12m --sample 5000
"""

SHARD_HELP = """\
Writes FOLDER/00000.tar …: KEY.jpg (.png .webp), KEY.txt, KEY.json with all other fields. KEY is the id of the sample
in the input. Unreadable samples are left out and listed in a table and in FOLDER/skipped.jsonl; they get no id in the
new shards. The same input gives the same bytes for any --workers. After a kill, run it again: it resumes. At the end it
writes the index.

examples:
  disttempnet data shard '/raw/{00000..00331}.tar' --out /cc3m --resize 256
  disttempnet data shard downstream/flickr30k_test.json --images flickr30k --captions lines \\
      --out /data/datacomp/wds_flickr30k_test/test        for evaluate --data-root /data/datacomp; COCO goes to
                                                          /data/datacomp/wds_mscoco_captions_test/test
"""

DOWNLOAD_HELP = """\
--from hub downloads the shards that lie ready on the Hugging Face Hub (pixparse/cc3m-wds, pixparse/cc12m-wds), of the
train split: cc3m-train-0000.tar and so on. Each is compared with the hub's sha256.

--from links, the default, downloads the images of a public list of captions and URLs with img2dataset (pip install
'disttempnet[download]'). Larger images are resized to a shorter side of --image-size, JPEG quality 95, 10,000 per
shard. Many URLs of these lists are dead.

After a kill, run the same command again: it resumes.

examples:
  disttempnet data download cc3m --from hub --out /cc3m
  disttempnet data download cc12m --tsv cc12m.tsv --out /cc12m --processes 16 --threads 64
  disttempnet data download cc3m --out /cc3m --dry-run
"""

ICONS = """Builds 258,075 real icons by 184 artists with their names, in three splits: train, val (artists never trained
on), val_concepts (concepts never trained on). Downloads one npm package (100 MB; npm_config_registry names another
registry), draws its icons in minutes, and checks that the published rows come out. After a kill the same command goes
on. Needs 'disttempnet[icons]'. Licences and authors: OUT/LICENSES.md.

examples:
  disttempnet data icons                                    into the cache folder, where the tasks find it
  disttempnet data icons /data/icons --workers 8
  npm pack @iconify/json@2.2.535                            on a machine with a network; then, without one:
  disttempnet data icons /data/icons --package iconify-json-2.2.535.tgz
"""


def add_data_commands(commands: Any) -> None:
    """Add the group `data` to the command line's sub-parsers; each command sets `run`."""
    data = commands.add_parser("data", help="index, check, show, write and download data sets")
    parts = data.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    _add_index(parts)
    _add_preview(parts)
    _add_verify(parts)
    _add_shard(parts)
    _add_download(parts)
    _add_icons(parts)
    add_task_command(parts)


def _add_index(commands: Any) -> None:
    index = commands.add_parser(
        "index",
        help="index a data set, or bring the index of shards up to date",
        description=INDEX_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source(index, several=True)
    index.add_argument(
        "--checksum", action="store_true", help="hash all bytes of every shard (sha256) and compare with stored hashes"
    )
    _add_workers(index, "one per GiB of shards, at most one per core")
    index.set_defaults(run=run_index)


def run_index(options: argparse.Namespace) -> int:

    from disttempnet.data.listings.open import is_listing, open_listing
    from disttempnet.data.shards.open import update_index
    from disttempnet.data.tools.summary import index_summary, listing_summary

    workers, shown = options.workers, console()
    for source in sources_of(options):
        if is_listing(source):
            if options.checksum:
                raise UserError(f"{source.path}: --checksum is for shards; a listing is always compared by content")
            shown.print(listing_summary(open_listing(source)))
            continue
        index, news = update_index(source, workers, options.checksum)
        shown.print(index_summary(index))
        shown.print(news)
    return 0


def _add_preview(parts: Any) -> None:
    preview = parts.add_parser("preview", help="write random samples with captions and ids on one sheet")
    add_source(preview)
    preview.add_argument(
        "--out", type=path_argument, default="preview.png", metavar="FILE", help=".png or .html (default: preview.png)"
    )
    preview.add_argument("--count", type=SAMPLE_COUNT.parse, default=48, metavar="N", help="samples (default: 48)")
    preview.add_argument("--seed", type=SEEDS.parse, default=0, metavar="N", help="seed of the choice (default: 0)")
    preview.set_defaults(run=_preview)


def _preview(options: argparse.Namespace) -> int:
    from disttempnet.data import open_source
    from disttempnet.data.tools.preview import write_preview

    out = Path(options.out)
    note = write_preview(open_source(sources_of(options)), out, options.count, options.seed)
    say(f"preview: {out.resolve()}")
    if note:
        say(f"  {note}")
    return 0


def _add_workers(parser: argparse.ArgumentParser, default: str = "one per core") -> None:
    parser.add_argument("--workers", type=WORKERS.parse, default=0, metavar="N", help=f"processes (default: {default})")


def _workers(options: argparse.Namespace) -> int:
    return options.workers or cores()


def _add_verify(parts: Any) -> None:
    verify = parts.add_parser(
        "verify",
        help="read every sample and list the broken ones",
        description=VERIFY_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source(verify, several=True)
    verify.add_argument(
        "--sample",
        type=SAMPLES.parse,
        default=0,
        metavar="N",
        help="read this many random samples of each, not all",
    )
    verify.add_argument("--seed", type=SEEDS.parse, default=0, metavar="N", help="seed of the choice (default: 0)")
    verify.add_argument(
        "--out", type=path_argument, metavar="FILE", help="write all broken samples and shards, one JSON line each"
    )
    _add_workers(verify)
    verify.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    from disttempnet.data.tools.unreadable import fault_table, write_faults
    from disttempnet.data.tools.verify import verify
    from disttempnet.io.jobs import stopped_by_sigterm

    workers, everything = _workers(options), []
    if options.out:
        refuse_unwritable(Path(options.out))
    with stopped_by_sigterm():
        for source in sources_of(options):
            checked, faults = verify(source, workers, options.sample, options.seed)
            say(f"{source.path}: {checked:,} samples read, {_count_faults(faults)}")
            if faults:
                console().print(fault_table(faults))
            everything += faults
    if options.out:
        with unwritable_named(Path(options.out)):
            Path(options.out).parent.mkdir(parents=True, exist_ok=True)
            write_faults(everything, Path(options.out))
    return 1 if everything else 0


def _count_faults(faults: Sequence[Fault]) -> str:
    shards = sum(fault.sample is None for fault in faults)
    return (f"{shards:,} shards and " if shards else "") + f"{len(faults) - shards:,} samples broken"


def _add_shard(parts: Any) -> None:
    shard = parts.add_parser(
        "shard",
        help="write a data set as webdataset shards",
        description=SHARD_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source(shard)
    shard.add_argument("--out", type=path_argument, required=True, metavar="FOLDER", help="folder for the shards")
    shard.add_argument(
        "--samples-per-shard", type=SAMPLE_COUNT.parse, default=10_000, metavar="N", help="default: 10000"
    )
    shard.add_argument(
        "--resize",
        type=integers(0, 65_535).parse,
        default=0,
        metavar="PIXELS",
        help="resize larger images to this shorter side, as JPEG (default: copy all bytes)",
    )
    shard.add_argument(
        "--captions",
        choices=("first", "lines"),
        default="first",
        help="captions in .txt: the first, for training, or all, one per line, for retrieval (default: first)",
    )
    shard.add_argument(
        "--quality", type=integers(1, 100).parse, default=95, metavar="N", help="quality of these JPEGs (default: 95)"
    )
    _add_workers(shard)
    shard.set_defaults(run=_shard)


def _shard(options: argparse.Namespace) -> int:
    from rich.filesize import decimal

    from disttempnet.config import SourceConfig
    from disttempnet.data import open_source
    from disttempnet.data.tools.unreadable import fault_table
    from disttempnet.data.tools.write import SKIPPED, WriteSettings, write_shards
    from disttempnet.io.jobs import stopped_by_sigterm

    settings = WriteSettings(options.samples_per_shard, options.resize, options.quality, options.captions)
    out, workers = Path(options.out), _workers(options)
    with stopped_by_sigterm():
        written = write_shards(open_source(sources_of(options)), out, settings, workers)
        say(f"{out.resolve()}: {written.shards:,} shards, {written.samples:,} samples, {decimal(written.size)}")
        if written.faults:
            say(f"{len(written.faults):,} samples are left out; {out / SKIPPED} lists all of them:")
            console().print(fault_table(written.faults))
        open_source([SourceConfig(path=str(out))])  # writes the index
    if options.captions == "lines":
        from disttempnet.evaluation.datasets.open import how_to_evaluate

        say(how_to_evaluate(out.resolve(), written.samples))
        say(f'train on it: data.train=[{{path="{out.resolve()}", caption_key="captions"}}]')
    else:
        say(f"train on it: data.train={out.resolve()}")
    return 0


def _add_download(parts: Any) -> None:
    download = parts.add_parser(
        "download",
        help="download CC3M or CC12M, as ready shards or from their lists of URLs",
        description=DOWNLOAD_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    download.add_argument("name", choices=("cc3m", "cc12m"), help="the data set")
    download.add_argument("--out", type=path_argument, required=True, metavar="FOLDER", help="folder for the shards")
    download.add_argument(
        "--from", dest="origin", choices=("links", "hub"), default="links", help="where from (default: links)"
    )
    download.add_argument(
        "--tsv", type=path_argument, metavar="FILE", help="list of URLs (default: its public name, in this folder)"
    )
    download.add_argument("--processes", type=integers(1, 1024).parse, metavar="N", help="default: one per core")
    download.add_argument(
        "--threads", type=integers(1, 1024).parse, metavar="N", help="threads of each process (default: 64)"
    )
    download.add_argument(
        "--image-size",
        type=integers(1, 65_535).parse,
        metavar="PIXELS",
        help="resize larger images to this shorter side (default: 256)",
    )
    download.add_argument("--dry-run", action="store_true", help="only print what would be done")
    download.set_defaults(run=_download)


def _download(options: argparse.Namespace) -> int:
    from disttempnet.data.tools.download import (
        LISTS,
        Download,
        as_typed,
        check_list,
        download_result,
        run_download,
        write_headed,
    )

    processes = cores() if options.processes is None else options.processes
    if options.origin == "hub":
        return _download_from_hub(options, processes)
    tsv, out = Path(options.tsv or LISTS[options.name].file), Path(options.out)
    job = Download(options.name, tsv, out, processes, options.threads or 64, options.image_size or 256)
    check_list(job)
    say(as_typed(job.command))
    if options.dry_run:
        say(f"(it reads {job.headed.name}, a copy of {tsv} with a header and quotes, which is made first)", error=True)
        return 0
    from disttempnet.io.jobs import stopped_by_sigterm  # it loads torch, which the above need not wait for

    with stopped_by_sigterm():
        if left_out := write_headed(job):
            say(f"{tsv}: {left_out:,} lines without a caption and a URL are left out")
        code = run_download(job)
    found = download_result(out)
    failed = sum(found.failures.values())
    say(f"{out.resolve()}: {found.shards:,} shards, {found.samples:,} samples; {failed:,} URLs failed")
    for reason, count in found.failures.most_common(10):
        say(f"  {count:>10,}  {reason}")
    if code:
        raise UserError(f"img2dataset ended with exit code {code}; run the same command again to resume")
    say(f"train on it: data.train={out.resolve()}")
    return 0


def _download_from_hub(options: argparse.Namespace, processes: int) -> int:
    from disttempnet.data.tools.hub_shards import (
        check_space,
        fetch_shard,
        free_space,
        list_hub_shards,
        missing_shards,
        note_checked,
        to_download,
    )
    from disttempnet.io.jobs import run_jobs, stopped_by_sigterm
    from disttempnet.io.progress import Meter

    for flag in ("tsv", "threads", "image_size"):
        if getattr(options, flag) is not None:
            raise UserError(f"--{flag.replace('_', '-')} goes with --from links: the hub's shards are as they are")
    out = Path(options.out)
    listed = list_hub_shards(options.name)
    wanted = missing_shards(listed, out)
    there = listed.bytes - sum(shard.size for shard in wanted)
    say(
        f"{listed.repository} at {listed.revision[:12]}: {len(listed.shards):,} shards, {listed.bytes / 1e9:,.1f} GB; "
        f"{len(listed.shards) - len(wanted):,} of them are in {out.resolve()}"
    )
    if options.dry_run:
        new, free = to_download(wanted, out), free_space(out)
        for shard in wanted:
            say(f"  {shard.name}  {shard.size:>15,} bytes{'' if shard in new else ', there: to compare'}")
        need, to_compare = sum(shard.size for shard in new), sum(shard.size for shard in wanted if shard not in new)
        say(
            f"would download {need:,} bytes ({need / 1e9:,.1f} GB), and compare {to_compare:,} bytes that are there "
            f"with the hub's sha256; {free:,} bytes ({free / 1e9:,.1f} GB) are free for {out}"
            + (": too little free space" if need > free else "")
        )
        return 0
    check_space(listed, wanted, out)
    with stopped_by_sigterm(), Meter("downloading", listed.bytes, there, sizes=True) as meter:
        for shard, _ in run_jobs(partial(fetch_shard, listed, out), wanted, min(processes, len(wanted)) or 1):
            note_checked(out, shard)
            meter.advance(shard.size)
    say(f"{out.resolve()}: {len(listed.shards):,} shards, each with the hub's sha256")
    say(f"train on it: data.train={out.resolve()}")
    return 0


def _add_icons(parts: Any) -> None:
    icons = parts.add_parser(
        "icons",
        help="build the icon data set from its npm package",
        description=ICONS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    icons.add_argument("out", nargs="?", type=path_argument, metavar="OUT", help="default: icons in the cache folder")
    icons.add_argument(
        "--package", type=path_argument, metavar="PATH", help="the npm package, a .tgz or a folder (default: download)"
    )
    _add_workers(icons)
    icons.set_defaults(run=_icons)


def _icons(options: argparse.Namespace) -> int:
    from disttempnet.data.icons.build import build_icons
    from disttempnet.data.icons.built import BUILT, default_folder
    from disttempnet.io.jobs import stopped_by_sigterm

    out = Path(options.out) if options.out else default_folder()
    with stopped_by_sigterm():
        counts = build_icons(out, Path(options.package) if options.package else None, _workers(options))
    for split, count in counts.items():
        say(f"{split:<12}  {count}")
    say(f"{out.resolve()}: licences and authors are in LICENSES.md")
    found = out.resolve() == default_folder().resolve()
    train = f"{BUILT}icons/train" if found else out.resolve() / "train"
    root = "" if found else f" eval.data_root={out.resolve()}"
    say(f'train on it: data.train={train} \'eval.tasks=["icons-artists", "icons-concepts"]\'{root}')
    return 0
