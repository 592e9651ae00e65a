"""Names, docstrings and messages use the field's words; docs/glossary.md has the few of this project's own."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "disttempnet"

# Words that are not used → the field's.
BANNED = {
    r"shared? out|shares .{1,30} out|sharing out": "sharded",
    r"dealt anew": "resharded, reshuffled",
    r"whole or absent": "atomic",
    r"(told|tells?|telling) apart": "distinguished, classified",
    r"but for": "except",
    r"guessing gives": "chance",
    r"must be a word|must be words": "must be a string",
    r"judge[sd]?|judging": "validate, check",
    r"census": "statistics",
    r"(is|are) ours|ours is|of ours": "new here",
    r"another since|others? since": "has changed",
    r"(is|are|be) asked of": "(say what is done)",
    r"one's own": "your own",
}
# Docstrings open with a verb or a noun phrase.
CLAUSE = re.compile(r"(What|How|Where|Whom?|Whether|When|Why|Which)\b")
# Names that say nothing, or an action without its object.
VAGUE = {
    "whole",
    "finite",
    "facts",
    "opening",
    "building",
    "runs",
    "misc",
    "utils",
    "helpers",
    "common",
    "things",
    "stuff",
}


def sources() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def texts() -> list[Path]:
    """Return every file with words for readers: code, templates, configs, docs."""
    found = [path for suffix in ("py", "toml", "html", "sbatch", "jinja", "j2") for path in SOURCE.rglob(f"*.{suffix}")]
    return sorted(
        {
            *found,
            *(ROOT / "docs").rglob("*.md"),
            ROOT / "README.md",
            ROOT / "CHANGELOG.md",
            *(ROOT / "benchmarks").glob("*.py"),
            *(ROOT / "examples").glob("*.*"),
        }
    )


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_messages_and_docs_use_the_fields_words() -> None:
    wrong = []
    for path in texts():
        flat = re.sub(r"\s+", " ", path.read_text(encoding="utf-8"))
        for banned, word in BANNED.items():
            wrong += [
                f"{name_of(path)}: “{flat[max(found.start() - 30, 0) : found.end() + 20]}”; say: {word}"
                for found in re.finditer(rf"\b({banned})\b", flat, re.IGNORECASE)
            ]
    assert not wrong, "\n".join(wrong)


def test_docstrings_open_with_a_verb_or_a_noun() -> None:
    wrong = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if CLAUSE.match(text):
                    wrong.append(f"{name_of(path)}:{getattr(node, 'lineno', 1)}: {text.splitlines()[0][:60]}")
    assert not wrong, "\n".join(wrong)


def public_names(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return {name for name in found if not name.startswith("_")}


def test_a_public_name_is_defined_once() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for path in sources():
        for name in public_names(ast.parse(path.read_text(encoding="utf-8"))):
            homes[name].append(name_of(path))
    twice = [f"{name}: {', '.join(paths)}" for name, paths in sorted(homes.items()) if len(paths) > 1]
    assert not twice, "\n".join(twice)


def test_no_module_or_class_has_a_vague_name() -> None:
    wrong = []
    for path in sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {path.stem, *(node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef))}
        vague = {name for name in names if name.lower() in VAGUE or re.fullmatch(r"[a-z]+ing", name)}
        wrong += [f"{name_of(path)}: {name}" for name in sorted(vague)]
    assert not wrong, "\n".join(wrong)
