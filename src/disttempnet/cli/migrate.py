"""The commands `disttempnet migrate` and `disttempnet import`. Heavy imports wait until they are needed."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from disttempnet.errors import UserError
from disttempnet.io.paths import path_argument
from disttempnet.io.ranges import integers
from disttempnet.terminal import say

MIGRATE = """Reads a shell or SLURM script that calls DistTempNet's first code (clip_cc12m.py, clip_cc3m.py), or the
training main of FastCLIP or open_clip. Writes the run's config. Nothing of the script is run.

Each key has a comment with the flag that it came from, or the default of that code. Behind the keys stand the flags
without a counterpart and why, what is done differently, and the commands that train, launch and evaluate. #SBATCH lines
become options of `launch`. docs/migrating.md has the tables.

Variables are filled in where the script sets them plainly. NAME=VALUE gives one that it takes from elsewhere.

examples:
  disttempnet migrate train.sbatch --out run.toml
  disttempnet migrate train.sh lr=1e-3 SCRATCH=/scratch/me
  disttempnet migrate sweep.sh lr=1e-3 --call 2 --processes 8
"""


IMPORT = """Reads a .pth file of DistTempNet's first code: ViT-B/32 and its text transformer, or ResNet-50 and
DistilBERT (needs disttempnet[hf]), with their temperature networks. Writes a run folder that evaluate, search,
classify, embed and temperature open, and that model.pretrained trains on from.

Arguments of that run come from the file, or from args.json beside it. NAME=VALUE gives those that neither has, by the
names of that code: rho=9.5 ita_type=isogclr_tempnet. No code in the file is run. Unknown weights are refused.

examples:
  disttempnet import output/TempNet/checkpoint_best.pth --out runs/tempnet
  disttempnet evaluate runs/tempnet --data-root /data/datacomp
  disttempnet import checkpoint_30.pth rho=9.5 --out runs/rn50 --text-encoder /models/distilbert-base-uncased
"""


def add_migrate_commands(commands: Any) -> None:
    """Add `migrate` and `import` to the commands of the program."""
    migrate = commands.add_parser(
        "migrate",
        help="a training script of the first code, FastCLIP or open_clip as a config",
        description=MIGRATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    migrate.add_argument("script", type=path_argument, metavar="SCRIPT", help="a shell or SLURM script")
    migrate.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="variables of the script, from elsewhere")
    migrate.add_argument("--out", type=path_argument, metavar="FILE", help="the config (default: the terminal)")
    migrate.add_argument(
        "--call", type=integers(1, 10_000).parse, default=0, metavar="N", help="which of several training commands"
    )
    migrate.add_argument(
        "--processes",
        type=integers(1, 1_000_000).parse,
        default=0,
        metavar="N",
        help="GPUs of the run (default: as the script says)",
    )
    migrate.set_defaults(run=_migrate)
    importing = commands.add_parser(
        "import",
        help="a checkpoint of the first code as a run folder",
        description=IMPORT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    importing.add_argument("checkpoint", type=path_argument, metavar="CHECKPOINT", help="a .pth file of the first code")
    importing.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="arguments of that run, as rho=9.5")
    importing.add_argument("--out", type=path_argument, required=True, metavar="RUN", help="the run folder to write")
    importing.add_argument(
        "--text-encoder",
        type=path_argument,
        metavar="FOLDER",
        help="config and tokenizer of a Hugging Face text encoder (default: its name, from the hub or its cache)",
    )
    importing.set_defaults(run=_import)


def _migrate(options: argparse.Namespace) -> int:
    from disttempnet.io.files import refuse_unwritable, write_output
    from disttempnet.migrate.command import migrate, read_text

    given = _given(options.overrides)
    out = Path(options.out) if options.out else None
    if out is not None:
        if out.exists():
            raise UserError(f"--out {out}: exists already: choose another name, or remove it")
        refuse_unwritable(out)
    source = str(options.script)
    result = migrate(
        read_text(Path(source)), source, given, options.call, options.processes, str(out) if out else "run.toml"
    )
    if out is None:
        say(result.text, end="")
        return 0
    write_output(out, result.text)
    say(f"{source}, {result.title}")
    for title, entries in result.report.items():
        say()
        say(f"{title}:")
        for entry in entries:
            lines = [entry] if title == "Commands" else textwrap.wrap(entry, 112, subsequent_indent="  ")
            for line in lines:
                say(f"  {line}")
    say()
    say(f"config: {out.resolve()}")
    return 0


def _import(options: argparse.Namespace) -> int:
    from disttempnet.migrate.checkpoint import import_checkpoint

    result = import_checkpoint(
        Path(options.checkpoint), Path(options.out), _given(options.overrides), options.text_encoder or ""
    )
    for note in result.notes:
        say(note)
    say(f"run: {result.folder.resolve()}")
    return 0


def _given(words: Sequence[str]) -> dict[str, str]:
    """Return NAME → VALUE of words on the command line."""
    given = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"'{word}' is not of the form NAME=VALUE")
        given[name] = value
    return given
