"""The commands `disttempnet migrate` and `disttempnet import`. Heavy imports wait until they are needed."""

from __future__ import annotations

import argparse
import textwrap
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


def add_migrate_commands(commands: Any) -> None:
    """Add `migrate` to the commands of the program."""
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


def _migrate(options: argparse.Namespace) -> int:
    from disttempnet.io.files import refuse_unwritable, write_output
    from disttempnet.migrate.command import migrate, read_text

    given = {}
    for word in options.overrides:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"'{word}': variables of the script are given as NAME=VALUE")
        given[name] = value
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
