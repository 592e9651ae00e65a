"""Fill the tables of docs/migrating.md from the tables that `disttempnet migrate` reads flags by.

`fill_migrating.py [--check]`: --check changes nothing and fails where the page differs; a test calls it.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "migrating.md"
MARK = re.compile(r"(<!-- flags: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def tables() -> Mapping[str, Mapping]:
    """Return name of a table on the page → its flags."""
    from disttempnet.migrate.first_code import FIRST_CODE_FLAGS
    from disttempnet.migrate.open_clip import OF_FASTCLIP, OPEN_CLIP_FLAGS

    return {"first-code": FIRST_CODE_FLAGS, "open-clip": OPEN_CLIP_FLAGS, "fastclip": OF_FASTCLIP}


def table(flags: Mapping) -> str:
    """Return the rows of a table: flag, what it becomes, how."""
    lines = ["| flag | becomes | |", "|---|---|---|"]
    for flag in flags.values():
        becomes = f"`{flag.becomes}`" if flag.becomes else "–"
        lines.append(f"| `{flag.name}` | {becomes} | {flag.about.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def filled(text: str) -> str:
    """Return the page with its tables made again."""
    known = tables()
    return MARK.sub(lambda found: f"{found[1]}{table(known[found[2]])}\n{found[3]}", text)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "src"))
    page = PAGE.read_text(encoding="utf-8")
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(filled(page), encoding="utf-8")
    elif page != filled(page):
        raise SystemExit(f"{PAGE}: its tables differ from the code; run tools/fill_migrating.py")
