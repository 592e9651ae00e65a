"""All of DataComp's tasks with `disttempnet evaluate`, and with clip-benchmark driven task by task as DataComp does it.

    python benchmarks/evaluation.py --other-python OTHER/bin/python --out benchmarks/results/evaluation.json

parity_clip_benchmark.py says how OTHER is made. Both sides score the same towers (the demo's, with random weights, and
as many text positions as CLIP's; `--context`) on the same data root, which is made here: every task has its true number
of classes and templates, as tasks.toml has them, the ImageNet family the true names and its 80 templates, and a part of
its true number of images (`--part`). Names outside the ImageNet family, ObjectNet's among them, are invented and shared
by no two tasks.

Each side is one process on one core, from its start to its result file: wall time and CPU time with all children. Runs
alternate, and costs and ratios are medians. Texts are counted as rows that reach the text tower, and as their token
positions.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # tests write the formats
FAMILY = {"imagenet1k": 1000, "imagenet_sketch": 1000, "imagenetv2": 1000, "imagenet-a": 200, "imagenet-o": 200}
FAMILY |= {"imagenet-r": 200}
COUNTED = ("texts", "text positions", "images")
GROUPS = {  # metadata of a row: numbers below these
    "wilds/iwildcam": (48, 9, 4, 12, 28, 24, 60, 60, 182, 3),
    "wilds/camelyon17": (5, 50, 2, 5),
    "wilds/fmow": (6, 17, 62, 6),
    "fairness/dollar_street": (4, 1000, 4),
    "fairness/geode": (6, 19),
    "fairness/fairface": (9, 2, 7, 2),
    "fairness/utkface": (9, 2, 7, 2),
}
FACES = {"age": 9, "gender": 2, "race": 7, "toxic": 21}
NOUNS = ["street", "river", "woman", "man", "children", "dog", "cat", "tree", "night", "boat", "table", "flowers"]
WORDS = ["a", "the", "of", "in", "on", "with", "young", "old", "small", "red", "blue", "green", *NOUNS]


# --- the data root -------------------------------------------------------------------------------------------------


def write_root(root: Path, part: int) -> None:
    """Every task of tasks.toml that lies below a data root, with one image of `part` (WinoGAViL: one puzzle)."""
    from disttempnet.evaluation.tasks import all_tasks
    from tests.evaluation import formats

    draw, picture = random.Random(0), pictures()
    sizes = {}
    for key, task in all_tasks().items():
        if not task.below_root:
            continue
        n = sizes[key] = max(task.size // part, 20)
        if key.startswith("retrieval/"):
            rows = [(next(picture), [sentence(draw) for _ in range(5)]) for _ in range(n)]
            formats.write_wds(root, key, [{"jpg": i, "txt": "\n".join(c).encode()} for i, c in rows], kind="retrieval")
        elif key == "misc/winogavil":
            write_puzzles(root / "winogavil", n, draw, picture)
        else:
            names, templates = words_of(key, task.classes, task.prompts or 1)
            samples = []
            for number in range(n):
                row = [draw.randrange(below) for below in GROUPS.get(key, ())]
                sample = {"jpg": next(picture)} | ({"npy": formats.npy(row)} if row else {})
                label = number % len(names) if n < 2 * len(names) else draw.randrange(len(names))
                samples.append(sample if "face" in key else sample | {"cls": str(label).encode()})
            shards = max(1, min(8, n // 200))
            formats.write_wds(root, key, samples, classes=names, templates=templates, shards=shards)
    (root / "sizes.toml").write_text("".join(f'"{key}" = {n}\n' for key, n in sizes.items()), encoding="utf-8")


def words_of(key: str, classes: int, prompts: int) -> tuple[list[str], list[str]]:
    """Class names and templates of a task."""
    from disttempnet.models.towers import open_clip

    eighty = [template("{c}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    if key in FAMILY:
        every = list(open_clip.IMAGENET_CLASSNAMES)
        return (every if FAMILY[key] == 1000 else random.Random(key).sample(every, FAMILY[key])), eighty
    if "face" in key:
        names = [f"{kind}:{kind} number {i}" for kind, n in FACES.items() for i in range(n)]
        return names, [f"{kind}:a photo of a {{c}}" for kind in FACES]
    names = [f"kind {i} of {key.rpartition('/')[2]}" for i in range(classes)]  # they differ in the first few tokens
    return names, eighty[:prompts] if prompts <= 80 else eighty


def pictures() -> Iterator[bytes]:
    """JPEGs of 160 × 120 pixels, each of its own soft blobs."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    while True:
        file = io.BytesIO()
        blobs = Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        blobs.resize((160, 120), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        yield file.getvalue()


def write_puzzles(folder: Path, n: int, draw: random.Random, picture: Iterator[bytes]) -> None:
    """WinoGAViL's raw files; images are shared as in the original, 2,044 of them by 3,563 puzzles."""
    from tests.evaluation import formats

    names = [f"image {i}" for i in range(max(12, n * 2044 // 3563))]
    puzzles = []
    for _ in range(n):
        candidates = draw.sample(names, draw.choice((5, 6, 10, 12)))
        puzzles.append((sentence(draw), candidates, draw.sample(candidates, draw.choice((2, 3)))))
    formats.write_winogavil_csv(folder, puzzles, {name: next(picture) for name in names})


def sentence(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(4, 12)))


# --- the two sides ---------------------------------------------------------------------------------------------------


def ours(model: str, root: str, out: str, *more: str) -> None:
    """`disttempnet evaluate` in this process, with the rows that reach the text tower counted."""
    import torch

    from disttempnet.cli import main as cli
    from disttempnet.models.towers import open_clip

    torch.set_num_threads(1)
    counted = {"texts": 0, "text positions": 0, "images": 0}
    for what, of in {"encode_text": "texts", "encode_image": "images"}.items():
        original = getattr(open_clip.CLIP, what)

        def count(self: Any, rows: Any, *args: Any, _call: Any = original, _of: str = of, **kwargs: Any) -> Any:
            counted[_of] += len(rows)
            if _of == "texts":
                counted["text positions"] += rows.numel()
            return _call(self, rows, *args, **kwargs)

        setattr(open_clip.CLIP, what, count)
    code = cli.main(["evaluate", f"open_clip:local-dir:{model}", "--data-root", root, "--out", out, *more])
    Path(out, "counted.json").write_text(json.dumps(counted), encoding="utf-8")
    sys.exit(code)


def measured(command: list[str], core: int, cache: Path) -> dict[str, float]:
    """Wall and CPU seconds of a command pinned to one core, with an empty cache."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DISTTEMPNET_CACHE": str(cache)}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        pinned = lambda: os.sched_setaffinity(0, {core})  # noqa: E731
        code = subprocess.run(command, env=environment, stdout=log, stderr=log, preexec_fn=pinned).returncode
        if code:
            log.seek(0)
            raise SystemExit(f"{command}: exit code {code}\n{log.read()[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": round(time.perf_counter() - started, 1), "cpu": round(cpu, 1)}


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from disttempnet.evaluation.tasks import all_tasks
    from disttempnet.models import CONFIG_NAME, load_model, save_model
    from disttempnet.models.towers import open_clip

    root, model = folder / "root", folder / "model"
    root.mkdir()
    model.mkdir()
    write_root(root, options.part)
    config = open_clip.get_model_config("demo-convnext-32")
    config["text_cfg"]["context_length"] = options.context
    config = {"model_cfg": config, "preprocess_cfg": {}}
    (model / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        save_model(load_model(str(model / CONFIG_NAME)), model, 100.0)
    keys = [key for key, task in all_tasks().items() if task.below_root]
    (folder / "tasks").write_text("\n".join(keys), encoding="utf-8")
    result: dict[str, Any] = {
        "part": options.part,
        "pairs": options.pairs,
        "tasks": len(keys),
        "model": f"demo-convnext-32, {options.context} text positions, random weights",
    }
    way = [options.other_python, str(ROOT / "benchmarks" / "datacomp_way.py"), str(root), str(model)]
    way += ["--tasks", str(folder / "tasks"), "--out", str(folder / "theirs.json")]
    own_way = [sys.executable, __file__, "--ours", str(model), str(root)]
    passes: dict[str, list[dict[str, float]]] = {"clip-benchmark": [], "ours": []}
    for number in range(options.pairs):
        out = folder / f"out{number}"
        passes["clip-benchmark"].append(measured(way, options.core, folder / "none"))
        passes["ours"].append(measured([*own_way, str(out)], options.core, folder / f"cache{number}"))
    theirs = json.loads((folder / "theirs.json").read_text(encoding="utf-8"))
    counted = {"clip-benchmark": theirs, "ours": json.loads((out / "counted.json").read_text(encoding="utf-8"))}
    for side, costs in passes.items():
        result[side] = {kind: round(median(cost[kind] for cost in costs), 1) for kind in ("wall", "cpu")}
        result[side] |= {what: counted[side][what] for what in COUNTED} | {"passes": costs}
    for kind in ("wall", "cpu"):
        pairs = zip(passes["clip-benchmark"], passes["ours"], strict=True)
        result[f"clip-benchmark / ours, {kind}"] = round(median(a[kind] / b[kind] for a, b in pairs), 2)
    for what in COUNTED:
        result[f"clip-benchmark / ours, {what}"] = round(result["clip-benchmark"][what] / result["ours"][what], 2)
    result["largest difference of a metric"] = largest_difference(theirs["tasks"], out / "eval_results.jsonl")
    packages = ("torch", "torchvision", "open_clip_torch", "pillow", "numpy")
    own = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    return result | {"versions": {"ours": own, "clip-benchmark": theirs["versions"]}}


def largest_difference(theirs: dict[str, dict[str, float | None]], results: Path) -> float:
    """Of all metrics that both have a value of; every task is in both."""
    records = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    mine = {record["key"]: record["metrics"] for record in records}
    assert mine.keys() == theirs.keys(), mine.keys() ^ theirs.keys()
    pairs = [(value, mine[key][name]) for key, metrics in theirs.items() for name, value in metrics.items()]
    return max(abs(a - b) for a, b in pairs if a is not None and b is not None)


def show(result: dict[str, Any]) -> None:
    print("| | wall, s | CPU, s | texts encoded | their positions | images encoded |\n|---|--:|--:|--:|--:|--:|")
    for side in ("clip-benchmark", "ours"):
        r = result[side]
        counts = " | ".join(f"{r[what]:,}" for what in COUNTED)
        print(f"| {side} | {r['wall']:.1f} | {r['cpu']:.1f} | {counts} |")
    ratios = [result[f"clip-benchmark / ours, {what}"] for what in ("wall", "cpu", *COUNTED)]
    print("| times as much | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other-python", required=True, help="interpreter of the environment with clip-benchmark")
    parser.add_argument("--part", type=int, default=50, help="one of so many images of each task")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side; costs are medians")
    parser.add_argument("--context", type=int, default=77, help="positions of the text tower (CLIP: 77, the demo: 16)")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="core that both are pinned to")
    parser.add_argument("--out", type=Path, help="file for the result, JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = compare(options, Path(folder))
    show(result)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ours"]:
        ours(*sys.argv[2:])
    else:
        main()
