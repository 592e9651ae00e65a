"""The command `disttempnet export`. Heavy imports wait until it is needed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from disttempnet.errors import UserError
from disttempnet.io.paths import path_argument
from disttempnet.terminal import say

EXPORT = """RESULTS is what `evaluate --data-root` wrote: a folder with eval_results.jsonl and summary.json.

  clip-benchmark   a JSON file a task and model in the folder OUT, as `clip_benchmark build OUT/*.json` collects them
  openclip-csv     OUT is a CSV with the columns of open_clip's docs/openclip_results.csv, a row a model

Tasks that failed or are incomplete are left out, and named. The CSV has an average only where all 38 are there.

examples:
  disttempnet export runs/mine/evaluation/step-00010000 --to clip-benchmark --out clip_benchmark
  disttempnet export runs/*/evaluation/* --to openclip-csv --out results.csv
"""


def add_export_command(commands: Any) -> None:
    """Add `export` to the commands of the program."""
    export = commands.add_parser(
        "export",
        help="evaluation results as CLIP_benchmark's JSON files or open_clip's CSV",
        description=EXPORT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("results", nargs="+", type=path_argument, metavar="RESULTS", help="folder of an evaluation")
    export.add_argument("--to", required=True, choices=("clip-benchmark", "openclip-csv"), help="the form")
    export.add_argument("--out", type=path_argument, required=True, metavar="PATH", help="a folder, or a .csv file")
    export.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> int:
    from disttempnet.evaluation.results.averages import counted_tags
    from disttempnet.evaluation.results.export import clip_benchmark_files, left_out, openclip_csv, read_model_results
    from disttempnet.evaluation.tasks import all_tasks
    from disttempnet.io.files import refuse_unwritable, write_output

    every = [read_model_results(Path(folder)) for folder in options.results]
    out = Path(options.out)
    if options.to == "openclip-csv":
        titles = {key: task.display for key, task in all_tasks().items()}
        files = {out: openclip_csv(every, counted_tags(), titles)}
    else:
        files = {}
        for one in every:
            for name, text in clip_benchmark_files(one).items():
                if out / name in files:
                    raise UserError(f"two of the results are of the same model and weights: both make {name}")
                files[out / name] = text
    for path in files:
        refuse_unwritable(path)
    for path, text in files.items():
        write_output(path, text)
    for folder, one in zip(options.results, every, strict=True):
        for line in left_out(one):
            say(f"left out of {folder}: {line}")
    say(f"export: {out.resolve()} ({len(files):,} file{'s' if len(files) != 1 else ''})")
    return 0
