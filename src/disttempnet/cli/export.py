"""The command `disttempnet export`. Heavy imports wait until it is needed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from disttempnet.cli.model import TARGETS, add_resize_positions, open_target
from disttempnet.errors import UserError
from disttempnet.io.paths import path_argument
from disttempnet.terminal import say

EXPORT = f"""A model as files of other programs. Its features are compared with the towers' before anything is kept:

  onnx             image.onnx, text.onnx and about.json in a folder, for onnxruntime; any batch size
  transformers     a folder of transformers' CLIPModel with tokenizer and image processor, where the architecture is
                   CLIP's own

The model is {TARGETS}.

Or results, of folders that `evaluate --data-root` wrote (with eval_results.jsonl and summary.json):

  clip-benchmark   a JSON file a task and model in the folder OUT, as `clip_benchmark build OUT/*.json` collects them
  openclip-csv     OUT is a CSV with the columns of open_clip's docs/openclip_results.csv, a row a model

Tasks that failed or are incomplete are left out, and named. The CSV has an average only where all 38 are there.

examples:
  disttempnet export runs/mine --to onnx
  disttempnet export ViT-B-32/openai --to transformers --out clip-vit-b-32
  disttempnet export runs/mine/evaluation/step-00010000 --to clip-benchmark --out clip_benchmark
  disttempnet export runs/*/evaluation/* --to openclip-csv --out results.csv
"""
OF_MODELS = ("onnx", "transformers")
OF_RESULTS = ("clip-benchmark", "openclip-csv")


def add_export_command(commands: Any) -> None:
    """Add `export` to the commands of the program."""
    export = commands.add_parser(
        "export",
        help="a model as ONNX or transformers' CLIPModel; results as CLIP_benchmark's JSON or open_clip's CSV",
        description=EXPORT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument(
        "targets", nargs="+", type=path_argument, metavar="RUN|RESULTS", help="one model, or folders of evaluations"
    )
    add_resize_positions(export)
    export.add_argument("--to", required=True, choices=(*OF_MODELS, *OF_RESULTS), help="the form")
    export.add_argument(
        "--out",
        type=path_argument,
        metavar="PATH",
        help="a folder, or a .csv file (default of a model: export/MODEL-FORM, in the run's folder if it is one)",
    )
    export.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> int:
    if options.to in OF_MODELS:
        return _export_model(options)
    if options.out is None:
        raise UserError(f"--to {options.to} needs --out: where the results go")
    if options.resize_positions:
        raise UserError(f"--resize-positions is for models, not for --to {options.to}")
    return _export_results(options)


def _export_model(options: argparse.Namespace) -> int:
    from disttempnet.export.clip_model import write_clip_model
    from disttempnet.export.folder import export_folder
    from disttempnet.export.onnx import write_onnx

    if len(options.targets) > 1:
        raise UserError(f"--to {options.to} takes one model, not {len(options.targets)}")
    model = open_target(options.targets[0], options.resize_positions, random=False)
    out = Path(options.out) if options.out else model.folder / "export" / f"{model.name}-{options.to}"
    towers = model.towers
    towers.module.eval()
    for note in model.notes:
        say(note)
    with export_folder(out) as folder:
        if options.to == "onnx":
            checked = write_onnx(towers, folder, float(towers.module.logit_scale.detach().exp()))
        else:
            checked = write_clip_model(towers, folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if options.to == "transformers" and getattr(towers.module, "logit_bias", None) is not None:
        say("left out: the logit bias, for which a CLIPModel has no place; features and rankings are the same")
    say(f"checked: {checked}")
    say(f"export: {out.resolve()} ({model.title}; {size / 1e6:,.1f} MB)")
    return 0


def _export_results(options: argparse.Namespace) -> int:
    from disttempnet.evaluation.results.averages import counted_tags
    from disttempnet.evaluation.results.export import clip_benchmark_files, left_out, openclip_csv, read_model_results
    from disttempnet.evaluation.tasks import all_tasks
    from disttempnet.io.files import refuse_unwritable, write_output

    every = [read_model_results(Path(folder)) for folder in options.targets]
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
    for folder, one in zip(options.targets, every, strict=True):
        for line in left_out(one):
            say(f"left out of {folder}: {line}")
    say(f"export: {out.resolve()} ({len(files):,} file{'s' if len(files) != 1 else ''})")
    return 0
