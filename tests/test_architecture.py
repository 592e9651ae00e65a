"""Imports go down only, between folders and inside each: a lower floor never knows an upper one."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

import disttempnet

ROOT = Path(disttempnet.__file__).parent
TOP = Path(__file__).parents[1]
MOST_LINES = 80  # of a source file without a test file of its name
# source file → the test file that covers it; all others have one of their name
TESTED_ELSEWHERE = {
    "cli/data.py": "data/tools/test_verify.py",
    "cli/embed.py": "features/test_export.py",
    "cli/export.py": "export/test_clip_model.py",
    "cli/push.py": "export/test_hub.py",
    "cli/migrate.py": "migrate/test_command.py",
    "cli/model.py": "features/test_export.py",
    "cli/search.py": "search/test_command.py",
    "data/__init__.py": "data/test_open.py",
    "data/builtin/cache.py": "io/test_paths.py",
    "data/held_out.py": "evaluation/test_validation.py",
    "data/icons/splits.py": "data/icons/test_build.py",
    "data/shards/credentials.py": "data/shards/test_remote.py",
    "data/source.py": "data/test_old_indexes.py",
    "data/tools/sheet.py": "data/tools/test_preview.py",
    "data/listings/fields.py": "data/listings/test_index.py",
    "data/tools/summary.py": "data/listings/test_index.py",
    "evaluation/embed.py": "evaluation/test_probes.py",
    "evaluation/command.py": "cli/test_evaluate.py",
    "evaluation/results/summary.py": "evaluation/results/test_averages.py",
    "evaluation/score.py": "evaluation/test_evaluator.py",
    "features/store.py": "features/test_build.py",
    "losses/contrast/pairs.py": "losses/contrast/test_blocks.py",
    "losses/drift.py": "losses/test_global_contrastive.py",
    "losses/normaliser/amortised.py": "losses/minibatch/test_amorlip.py",
    "models/trunk.py": "features/test_build.py",
    "search/page.py": "search/test_command.py",
    "temperature/measure.py": "temperature/test_command.py",
    "temperature/page.py": "temperature/test_command.py",
    "temperature/plots.py": "temperature/test_command.py",
}
# Folder → its floors from the lowest; those on one floor may import each other, as long as modules make no circle.
FLOORS: dict[str, list[set[str]]] = {
    "": [
        {"sanitize"},
        {"terminal"},
        {"errors"},
        {"io"},
        {"config", "distributed"},
        {"losses"},
        {"models"},
        {"data"},
        {"features"},
        {"evaluation"},
        {"training"},
        {"report"},
        {"compare", "demo", "export", "migrate", "search", "temperature"},
        {"cli"},
        {"__main__"},
    ],
    "cli": [
        {"model", "source"},
        {"completion", "embed", "environment", "evaluate", "export", "migrate", "push", "search", "slurm", "task"},
        {"data", "launch"},
        {"main"},
    ],
    "compare": [
        {"display", "grid", "worker"},
        {"pool", "trials"},
    ],
    "config": [
        {"identity", "toml"},
        {"schema"},
    ],
    "data": [
        {"builtin", "headers", "images", "source", "workers"},
        {"icons"},
        {"augment", "epoch_plan", "held_out", "mixture", "shards"},
        {"listings", "loader"},
        {"folder", "open", "tools"},
    ],
    "data/builtin": [
        {"cache"},
        {"emoji", "scenes"},
    ],
    "data/icons": [
        {"release"},
        {"built", "draw", "package", "splits"},
        {"write"},
        {"build"},
    ],
    "data/listings": [
        {"encodings", "fields"},
        {"delimited", "json_kinds"},
        {"readers"},
        {"index", "parquet"},
        {"open"},
        {"listed"},
    ],
    "data/shards": [
        {"credentials", "patterns", "store"},
        {"remote"},
        {"names", "tar"},
        {"scan"},
        {"index"},
        {"journal"},
        {"build"},
        {"open"},
    ],
    "data/tools": [
        {"download", "hub_shards", "sheet", "summary", "unreadable"},
        {"preview", "verify", "write"},
    ],
    "distributed": [
        {"fsdp", "launcher", "watchdog"},
        {"collectives"},
    ],
    "evaluation": [
        {"encoder", "linear_probe", "metrics", "scores", "tars"},
        {"tasks"},
        {"loader", "protocols"},
        {"class_features", "datasets"},
        {"cached", "embed", "progress", "results", "score", "validation"},
        {"evaluator"},
        {"outputs"},
        {"probes"},
        {"command"},
    ],
    "export": [
        {"check", "folder", "model_card"},
        {"clip_model", "onnx"},
        {"hub"},
    ],
    "evaluation/datasets": [
        {"cifar", "class_names", "retrieval"},
        {"classification", "image_folder"},
        {"own"},
        {"built"},
        {"open"},
        {"convert"},
    ],
    "evaluation/results": [
        {"records"},
        {"averages"},
        {"summary", "tables"},
        {"export", "file"},
    ],
    "features": [
        {"cache_key", "store"},
        {"build"},
        {"batches", "export"},
        {"reference"},
    ],
    "io": [
        {"columns", "files", "jobs", "machine", "paths", "progress", "ranges"},
    ],
    "losses": [
        {"own_parameters", "schedule"},
        {"sample_state"},
        {"contrast", "drift", "objective"},
        {"distillation", "normaliser", "popularity", "temperature"},
        {"global_contrastive"},
        {"normaliser_error"},
        {"minibatch"},
        {"registry"},
    ],
    "losses/contrast": [
        {"pairs"},
        {"blocks", "triton"},
        {"backend"},
    ],
    "losses/minibatch": [
        {"amorlip", "cyclip", "onlineclr", "siglip", "vicreg"},
    ],
    "losses/normaliser": [
        {"amortised", "prototypes"},
    ],
    "losses/temperature": [
        {"lead", "scalar"},
        {"network"},
    ],
    "migrate": [
        {"script", "settings"},
        {"flags", "launcher"},
        {"first_code"},
        {"checkpoint", "open_clip"},
        {"command"},
    ],
    "models": [
        {"batch_norm", "depth", "hub", "package", "text", "transformers_clip", "weights"},
        {"activations", "efficientnet", "locks", "lora", "origin"},
        {"pretrained"},
        {"towers"},
        {"trunk"},
    ],
    "report": [
        {"accuracy_by_tau", "bins", "items", "page", "read"},
        {"compact", "runs"},
        {"seeds"},
        {"evaluations"},
        {"write"},
    ],
    "report/evaluations": [
        {"compare"},
        {"plots"},
        {"page"},
    ],
    "report/runs": [
        {"examples", "plots"},
        {"page"},
    ],
    "report/seeds": [
        {"intervals"},
        {"groups"},
        {"comparison"},
        {"tau_tables"},
        {"figure", "normaliser_table", "plots", "tuned_table"},
        {"tables"},
        {"page"},
    ],
    "search": [
        {"classes", "features", "nearest", "tau"},
        {"page"},
        {"command"},
    ],
    "temperature": [
        {"measure"},
        {"table"},
        {"statistics"},
        {"analysis"},
        {"plots"},
        {"page"},
        {"command"},
    ],
    "training": [
        {
            "atomic_folder",
            "model",
            "nan_check",
            "optim",
            "run_info",
            "run_log",
            "signals",
            "trackers",
            "weight_average",
        },
        {"gradients", "run_folder"},
        {"reference"},
        {"checkpoint"},
        {"trainer"},
    ],
}


def modules() -> dict[str, Path]:
    """Dotted name below the package → file; a folder's name stands for its __init__."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found.pop("")
    return found


@cache
def imports() -> dict[str, set[str]]:
    """Module → the package's modules that it imports, at its top or inside a function."""
    known = modules()
    result: dict[str, set[str]] = {}
    for name, path in known.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    part = f"{node.module}.{alias.name}"
                    found.add(part if part.removeprefix("disttempnet.") in known else node.module)
        inside = {one.removeprefix("disttempnet.") for one in found if one.startswith("disttempnet.")}
        result[name] = (inside & known.keys()) - {name}
    return result


def children(folder: str) -> set[str]:
    """Modules and folders that lie in a folder."""
    place = ROOT / folder
    files = {path.stem for path in place.glob("*.py")} - {"__init__"}
    return files | {path.parent.name for path in place.glob("*/__init__.py")}


def test_every_folder_states_its_floors() -> None:
    folders = {""} | {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("**/__init__.py")} - {"."}
    assert set(FLOORS) == folders
    for folder, floors in FLOORS.items():
        assert set().union(*floors) == children(folder), folder


def test_imports_go_down_only() -> None:
    wrong = []
    for folder, floors in FLOORS.items():
        height = {name: number for number, names in enumerate(floors) for name in names}
        prefix = folder.replace("/", ".") + "." if folder else ""
        for name, imported in imports().items():
            if not name.startswith(prefix):
                continue
            here = name.removeprefix(prefix).split(".")[0]
            for other in imported:
                there = other.removeprefix(prefix).split(".")[0]
                if other.startswith(prefix) and height[there] > height[here]:
                    wrong.append(f"{name} imports {other}")
    assert not wrong, wrong


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph, done = imports(), set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' → '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_torch_distributed_is_imported_in_two_files() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if any(f"{word} torch.distributed" in path.read_text(encoding="utf-8") for word in ("import", "from"))
    }
    assert found == {"distributed/collectives.py", "distributed/fsdp.py"}


def test_everything_is_printed_in_one_file() -> None:
    """There credentials and control characters are taken out."""
    wrong = []
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "Console"):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert {place.partition(":")[0] for place in wrong} <= {"terminal.py"}, wrong


def test_the_file_map_is_filled_from_docstrings() -> None:
    spec = importlib.util.spec_from_file_location("fill_file_map", TOP / "tools" / "fill_file_map.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    page = (TOP / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert page == tool.filled(page), "run tools/fill_file_map.py"


def test_tests_mirror_the_sources() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        source = path.relative_to(ROOT)
        name = source.parent.name if path.name == "__init__.py" else source.stem
        own = source.parent / f"test_{name}.py"
        test = TESTED_ELSEWHERE.get(source.as_posix(), own.as_posix())
        if len(path.read_text(encoding="utf-8").splitlines()) > MOST_LINES and not (TOP / "tests" / test).is_file():
            wrong.append(f"{source}: write tests/{own}, or name the file that tests it in TESTED_ELSEWHERE")
        if source.as_posix() in TESTED_ELSEWHERE and (TOP / "tests" / own).is_file():
            wrong.append(f"{source} has tests/{own}: take it out of TESTED_ELSEWHERE")
    assert not wrong, "\n".join(wrong)
    assert [source for source in TESTED_ELSEWHERE if not (ROOT / source).is_file()] == []


def test_every_room_says_what_is_where() -> None:
    """The docstring of a folder names each of its modules and folders, a line each."""
    for init in sorted(ROOT.rglob("__init__.py")):
        room = init.parent
        if room == ROOT:  # docs/architecture.md has its map
            continue
        inside = {path.name for path in room.glob("*.py")} - {"__init__.py", "__main__.py"}
        inside |= {f"{path.parent.name}/" for path in room.glob("*/__init__.py")}
        described = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
        named = {line.split()[0] for line in described.splitlines() if line.strip()}
        assert inside <= named, f"{init}: a line for {', '.join(sorted(inside - named))}"
