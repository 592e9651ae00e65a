"""Every metric of every task beside clip-benchmark's and wilds', on the same data roots and the same towers.

    python -m venv other
    other/bin/pip install torch==2.13.0 torchvision clip-benchmark==1.6.2 open_clip_torch==3.3.0 requests "numpy<2.4" \\
        "webdataset==0.2.111" pandas pytz
    other/bin/pip install --no-deps wilds==2.0.0
    python benchmarks/parity_clip_benchmark.py --other-python other/bin/python --out benchmarks/results/parity.json

(clip-benchmark 1.6.2 does not declare `requests`, fails on NumPy 2.4, and with webdataset 1.0 on data sets of few
shards; wilds asks for packages that its metrics do not use.) datacomp_way.py is the other side; it runs in that
environment and imports nothing of this package.

Three comparisons, in fp32: the fixture root of tests/evaluation/dataroot.py (solid colours, forty tasks, every format)
with towers that read colours, and with the demo's towers; and the root of evaluation.py (textured images, true numbers
of classes and templates) with the demo's towers. These have been trained for two epochs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # tests write the formats
TOLERANCE = 1e-6
PART = 400  # of the textured root: one image in so many


def speed_benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("speed_benchmark", ROOT / "benchmarks" / "evaluation.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ours(root: Path, out: Path, towers: Any) -> dict[str, dict[str, float | None]]:
    """Metrics by task."""
    import torch

    from disttempnet.evaluation.evaluator import Evaluator
    from disttempnet.evaluation.outputs import ResultsFolder
    from disttempnet.evaluation.results.summary import Subject
    from disttempnet.evaluation.tasks import all_tasks

    tasks = [task for task in all_tasks().values() if task.below_root]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        sink = ResultsFolder(out, root, tasks, Subject("towers"), torch.device("cpu"))
        todo = sink.unfinished()
        with sink:
            Evaluator(towers, torch.device("cpu")).run(todo, sink.load, sink, sink.progress)
    records = sink.done.values()
    wrong = {record.key: record.error for record in records if record.error}
    if wrong:
        raise SystemExit(f"tasks failed: {wrong}")
    return {record.key: dict(record.metrics) for record in records}


def others(python: str, root: Path, model: str, keys: list[str]) -> dict[str, Any]:
    """What datacomp_way.py writes."""
    with tempfile.TemporaryDirectory() as folder:
        tasks, out = Path(folder, "tasks"), Path(folder, "out.json")
        tasks.write_text("\n".join(keys), encoding="utf-8")
        command = [python, str(ROOT / "benchmarks" / "datacomp_way.py"), str(root), model]
        command += ["--tasks", str(tasks), "--out", str(out)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return json.loads(out.read_text(encoding="utf-8"))


def difference(a: float | None, b: float | None) -> float:
    """Infinite where only one of them is defined."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    return abs(a - b)


def compare(mine: dict[str, dict[str, float | None]], theirs: dict[str, dict[str, float | None]]) -> dict[str, Any]:
    """Every metric of theirs beside ours of that name; one that ours lack, or a task, is an error."""
    assert mine.keys() == theirs.keys(), mine.keys() ^ theirs.keys()
    gaps = {f"{key} {name}": difference(mine[key][name], v) for key, m in theirs.items() for name, v in m.items()}
    defined = [value for metrics in theirs.values() for value in metrics.values() if value is not None]
    return {
        "tasks": len(theirs),
        "metrics": len(gaps),
        "of them defined": len(defined),
        "distinct values": len({round(value, 9) for value in defined}),
        "largest difference": max(gaps.values()),
        "beyond tolerance": {what: gap for what, gap in gaps.items() if gap > TOLERANCE},
    }


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import torch

    from disttempnet.config import CONFIG_FOLDER, load_config
    from disttempnet.training.checkpoint import load_run
    from disttempnet.training.run_folder import list_checkpoints
    from disttempnet.training.trainer import train
    from tests.evaluation.dataroot import EXPECTED, write_data_root
    from tests.evaluation.toy import meaning_towers

    torch.set_num_threads(1)
    colours, textured = folder / "colours", folder / "textured"
    for made in (colours, textured):
        made.mkdir()
    write_data_root(colours)
    speed_benchmark().write_root(textured, PART)
    trained = [f"out={json.dumps(str(folder))}", "train.epochs=2", "eval.tasks=[]", "data.workers=0"]
    config = load_config(CONFIG_FOLDER / "demo.toml", trained)
    train(config)
    (model,) = list_checkpoints(config.folder)[-1:]
    demo = load_run(model).towers
    cases = {
        "solid colours, towers that read colours": (colours, "colours", meaning_towers()),
        "solid colours, demo towers, trained": (colours, str(model), demo),
        "textured images, demo towers, trained": (textured, str(model), demo),
    }
    result: dict[str, Any] = {"tolerance": TOLERANCE, "part": PART, "comparisons": {}}
    for number, (name, (root, source, towers)) in enumerate(cases.items()):
        theirs = others(options.other_python, root, source, list(EXPECTED))
        mine = ours(root, folder / f"out{number}", towers)
        result["comparisons"][name] = compare(mine, theirs["tasks"])
    packages = ("torch", "torchvision", "open_clip_torch", "pillow", "numpy")
    own = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    return result | {"versions": {"ours": own, "clip-benchmark": theirs["versions"]}}


def show(result: dict[str, Any]) -> None:
    print("| data, towers | tasks | metrics | distinct values | largest difference |\n|---|--:|--:|--:|--:|")
    for name, c in result["comparisons"].items():
        print(f"| {name} | {c['tasks']} | {c['metrics']} | {c['distinct values']} | {c['largest difference']:.1e} |")
        for what, gap in c["beyond tolerance"].items():
            print(f"  beyond {result['tolerance']}: {what}: {gap}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other-python", required=True, help="interpreter of the environment with clip-benchmark")
    parser.add_argument("--out", type=Path, help="file for the result, JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(options, Path(folder))
    show(result)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(comparison["beyond tolerance"] for comparison in result["comparisons"].values()))


if __name__ == "__main__":
    main()
