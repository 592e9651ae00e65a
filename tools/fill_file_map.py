"""Fill the file map of docs/architecture.md from the modules' docstrings: `fill_file_map.py [--check]`.

A line has the name of a file or folder and the first line of its docstring. --check changes nothing and fails where the
map differs; a test calls it.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
SOURCE = ROOT / "src" / "disttempnet"
FIRST, LAST = "src/disttempnet/\n", "  configs/"  # the generated lines stand between these
# from the lowest floor to the highest
ORDER = (
    *("sanitize.py", "terminal.py", "errors.py", "io", "config", "distributed", "losses", "models", "data", "features"),
    *("evaluation", "training", "report", "search", "temperature", "compare", "export", "migrate", "demo.py", "cli"),
)


def summary(path: Path) -> str:
    """Return the first line of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].removesuffix(".")


def lines(folder: Path, indent: int) -> Iterator[str]:
    """Yield a line for each file and folder: files first, at the top in the order of the floors."""
    packages = [path.parent for path in folder.glob("*/__init__.py")]
    modules = [path for path in folder.glob("*.py") if not path.name.startswith("__")]
    paths = [*sorted(modules), *sorted(packages)]
    if folder == SOURCE:
        paths.sort(key=lambda path: ORDER.index(path.name))
    for path in paths:
        name = f"{path.name}/" if path.is_dir() else path.name
        text = summary(path / "__init__.py" if path.is_dir() else path)
        yield f"{' ' * indent}{name:<{24 - indent}} {text}\n"
        if path.is_dir():
            yield from lines(path, indent + 2)


def filled(text: str) -> str:
    """Return the page with the map made again."""
    before, _, rest = text.partition(FIRST)
    after = rest[rest.index(LAST) :]
    return f"{before}{FIRST}{''.join(lines(SOURCE, 2))}{after}"


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(filled(page), encoding="utf-8")
    elif page != filled(page):
        raise SystemExit(f"{PAGE}: the file map differs from the docstrings; run tools/fill_file_map.py")
