"""Fill the tables and draw the figures of docs/results*.md from compact results: `fill_results.py [--check]`.

A table stands between `<!-- disttempnet report FILE.jsonl … -->`, the command that makes it (with --out table.md), and
`<!-- end -->`, so no number is typed by hand. --check changes nothing and fails where a table differs from the output
of its command; a test calls it.
"""

import re
import shlex
import sys
import tempfile
from pathlib import Path

from disttempnet.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "docs" / "results.md", ROOT / "docs" / "results_scratch.md"]
FIGURE = re.compile(r"<!-- figure: disttempnet (report [^\n]*) -->")
TABLE = re.compile(r"(<!-- disttempnet (report [^\n]*) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(command: str) -> str:
    """Return the output of a command; its paths are relative to the top of the repository."""
    words = [str(ROOT / word) if word.endswith(".jsonl") else word for word in shlex.split(command)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "table.md")
        if main([*words, "--out", str(out)]):
            raise SystemExit(f"this command failed: disttempnet {command}")
        return out.read_text(encoding="utf-8")


def draw(text: str, folder: Path = ROOT) -> list[Path]:
    """Draw the page's figures below a folder; return their paths."""
    paths = []
    for command in FIGURE.findall(text):
        *words, out = [str(ROOT / word) if word.endswith(".jsonl") else word for word in shlex.split(command)]
        (folder / out).parent.mkdir(parents=True, exist_ok=True)
        if main([*words, str(folder / out)]):
            raise SystemExit(f"this command failed: disttempnet {command}")
        paths.append(Path(out))
    return paths


def filled(text: str) -> str:
    """Return the page with every table made again."""
    return TABLE.sub(lambda match: f"{match[1]}{table(match[2])}{match[3]}", text)


if __name__ == "__main__":
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = filled(before)
        if "--check" not in sys.argv[1:]:
            page.write_text(after, encoding="utf-8")
            draw(after)
        elif before != after:
            raise SystemExit(f"{page}: a table differs from the output of its command; run tools/fill_results.py")
