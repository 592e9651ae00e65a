"""docs/results.md: every table is what its command gives, and every grid that it names can be run."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from disttempnet.compare.grid import load_grid
from disttempnet.config import CONFIG_FOLDER

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"


def test_every_table_is_what_its_command_gives(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("fill_results", ROOT / "tools" / "fill_results.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    text = PAGE.read_text(encoding="utf-8")
    assert tool.filled(text) == text
    emptied = re.sub(r"(<!-- disttempnet [^\n]* -->\n).*?(<!-- end -->)", r"\1\2", text, flags=re.DOTALL)
    assert emptied != text, "no table was filled"
    assert tool.filled(emptied) == text


@pytest.mark.parametrize("path", sorted(CONFIG_FOLDER.glob("compare*.toml")), ids=lambda path: path.stem)
def test_every_shipped_grid_is_valid_and_named_on_the_page(path: Path) -> None:
    assert load_grid(path).configs
    assert f"configs/{path.name}" in PAGE.read_text(encoding="utf-8")
