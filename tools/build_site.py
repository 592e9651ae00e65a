"""Build the site from docs/ and the reference: `python -m tools.build_site [FOLDER]` (default: build/docs, made anew).

FOLDER/docs holds the pages that are built, FOLDER/html the site. A warning, such as a link that leads nowhere, fails.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = ROOT / "build" / "docs"
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


def collect(folder: Path) -> None:
    """Write the pages and the config of the site into the folder, which must be empty unless it is the default."""
    if folder == DEFAULT:
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.is_dir() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty: name a new folder")
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    shutil.copy(ROOT / "CHANGELOG.md", folder / "docs" / "changelog.md")
    for path in (folder / "docs").rglob("*.md"):
        _bring_linked_files(path, folder / "docs")
    from tools.reference_pages import pages  # imports the package, which takes seconds

    for name, text in pages().items():
        path = folder / "docs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _bring_linked_files(page: Path, docs: Path) -> None:
    """Copy the files of the repository that a page links to outside of docs/, and let its links lead to the copies."""
    original = ROOT / "docs" / page.relative_to(docs)

    def inside(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(original.parent / match[1]))
        if target.is_relative_to(ROOT / "docs"):
            return match[0]
        copy = docs / "files" / target.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(target, copy)
        return f"]({os.path.relpath(copy, page.parent)}"

    page.write_text(LINK.sub(inside, page.read_text(encoding="utf-8")), encoding="utf-8")


def build(folder: Path) -> int:
    """Build the collected pages strictly; return the exit code."""
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "NO_COLOR": "1"}
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    collect(target)
    code = build(target)
    if code == 0:
        print(f"site: {(target / 'html' / 'index.html').resolve()}")
    sys.exit(code)
