"""docs/migrating.md: its tables are those of the code, and its commands are taken."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from disttempnet.cli.main import build_parser
from tests.migrate.scripts import FOUNDING
from tools.fill_migrating import PAGE, filled, tables

TEXT = PAGE.read_text(encoding="utf-8")


def test_the_tables_are_filled_from_the_code() -> None:
    assert filled(TEXT) == TEXT, "run tools/fill_migrating.py"
    assert sum(f"| `{name}` |" in TEXT for flags in tables().values() for name in flags) > 150


def test_the_shown_commands_are_commands() -> None:
    parser = build_parser()
    lines = re.findall(r"^(disttempnet .+)$", TEXT, re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        parser.parse_known_args(shlex.split(line)[1:])


def test_the_shown_launch_is_what_the_founding_script_gives(tmp_path: Path) -> None:
    from disttempnet.migrate.command import migrate

    command = migrate(FOUNDING, "train.sbatch", out="run.toml").settings.commands[0]
    assert f"  {command}\n" in TEXT
