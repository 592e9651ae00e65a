"""The command `disttempnet push`. Heavy imports wait until it is needed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from disttempnet.cli.model import open_target
from disttempnet.errors import UserError
from disttempnet.io.paths import path_argument
from disttempnet.terminal import say

PUSH = """Writes a folder that open_clip opens, with a model card made from the run, and uploads it to the Hugging Face
Hub.

  open_clip_model.safetensors, open_clip_config.json   as hf-hub:ORG/NAME of open_clip
  tokenizer files                                      of the text tower
  README.md                                            data, objective, settings, results, licence, limits

Results have intervals where finished runs of other seeds lie beside RUN. The card holds no paths of this machine.
Uploading takes the token of `hf auth login` or HF_TOKEN.

examples:
  disttempnet push runs/mine ORG/NAME --license mit --data "CC3M, 2.3 M pairs" --dry-run
  disttempnet push runs/mine ORG/NAME --license mit --private
"""


def add_push_command(commands: Any) -> None:
    """Add `push` to the commands of the program."""
    push = commands.add_parser(
        "push",
        help="a run as a repository of the Hugging Face Hub, with a model card",
        description=PUSH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    push.add_argument("run_folder", type=path_argument, metavar="RUN", help="a run folder or a checkpoint folder")
    push.add_argument("repository", metavar="ORG/NAME", help="the repository; it is made if it is missing")
    push.add_argument("--dry-run", action="store_true", help="write the folder and print the card; upload nothing")
    push.add_argument("--license", default="", metavar="ID", help="of the weights, as the Hub names it: mit, cc-by-4.0")
    push.add_argument("--data", default="", metavar="TEXT", help="what the training data is, in your words")
    push.add_argument("--private", action="store_true", help="make the repository private; refuse a public one")
    push.add_argument("--out", type=path_argument, metavar="DIR", help="the folder (default: RUN/export/STEP-hub)")
    push.set_defaults(run=_push)


def _push(options: argparse.Namespace) -> int:
    from disttempnet.export.folder import export_folder
    from disttempnet.export.hub import CARD, checked_repository, upload, write_hub_folder
    from disttempnet.export.model_card import UNKNOWN_LICENCE, CardFacts, model_card, same_config
    from disttempnet.report.compact import CompactResult
    from disttempnet.report.evaluations.compare import holds_evaluations, read_evaluations
    from disttempnet.report.read import read_run

    # Check what was asked for before weights are read.
    repository = checked_repository(options.repository)
    licence = options.license.strip().lower() or UNKNOWN_LICENCE
    if not licence.replace("-", "").replace(".", "").isalnum():
        raise UserError(f"--license {options.license}: not an identifier of the Hub, such as mit or cc-by-4.0")

    # Open the run, the seeds beside it, and its evaluation on a data root.
    model = open_target(options.run_folder, resize_positions=False, random=False)
    if model.config is None:
        raise UserError(f"{options.run_folder}: no run: push writes the card of one, and uploads that")
    run = read_run(model.folder)
    seeds: list[CompactResult] = same_config(run)
    place = model.folder / "evaluation" / model.name
    evaluation = read_evaluations([place])[0] if holds_evaluations(place) else None
    facts = CardFacts(repository, licence, options.data, run, model.towers, model.step, seeds, evaluation)
    card = model_card(facts)

    # Write the folder, then upload it.
    out = Path(options.out) if options.out else model.folder / "export" / f"{model.name}-hub"
    with export_folder(out) as folder:
        lines = write_hub_folder(model.towers, folder, repository, card, model.config.train.ema)
    for line in lines:
        say(line)
    if licence == UNKNOWN_LICENCE:
        say("licence: unknown, as the card says; name one with --license")
    files = sorted(path for path in out.iterdir() if not path.name.startswith("."))
    if options.dry_run:
        say(card)
        for path in files:
            say(f"{path.stat().st_size:>14,}  {path.name}")
        say(f"dry run: {out.resolve()} ({CARD} is printed above); nothing was uploaded")
        return 0
    url = upload(out, repository, options.private, f"{model.title}, by disttempnet push")
    say(f"pushed: {url} ({len(files)} files from {out.resolve()})")
    return 0
