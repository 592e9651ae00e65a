"""Imports go down only: a lower floor never knows an upper one."""

from __future__ import annotations

import ast
from pathlib import Path

import disttempnet

ROOT = Path(disttempnet.__file__).parent
FLOORS = [
    {"errors", "files", "machine", "sanitize", "terminal"},
    {"paths", "ranges"},
    {"config_file"},
    {"config", "launch", "watch", "distributed", "slurm"},
    {"sharding"},
    {"weights"},
    {"losses", "models", "origin", "pretrained", "texts", "transformers_clip"},
    {"data"},
    {"evaluation"},
    {"training"},
    {"report"},
    {"demo", "compare"},
    {"cli_data", "cli_evaluate", "cli_export", "cli_launch", "cli_task"},
    {"cli"},
    {"__main__"},
]
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}


def test_imports_go_down_only() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        place = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if place == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{a.name}" for a in node.names]
            for name in names:
                parts = name.split(".")
                if parts[0] != "disttempnet" or len(parts) < 2 or parts[1] not in FLOOR:
                    continue
                if FLOOR[parts[1]] > FLOOR[place]:
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, wrong


def test_every_module_has_a_floor() -> None:
    found = {p.name.removesuffix(".py") for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert found - {"__init__"} == set(FLOOR)


def test_torch_distributed_is_imported_in_two_files() -> None:
    found = {
        path.name
        for path in ROOT.rglob("*.py")
        if any(f"{word} torch.distributed" in path.read_text(encoding="utf-8") for word in ("import", "from"))
    }
    assert found == {"distributed.py", "sharding.py"}


def test_everything_is_printed_in_one_file() -> None:
    """There credentials and control characters are taken out."""
    wrong = []
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "Console"):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert {place.partition(":")[0] for place in wrong} <= {"terminal.py"}, wrong
