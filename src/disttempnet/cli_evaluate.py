"""The command `disttempnet evaluate`. Heavy imports wait until it is needed."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disttempnet.errors import UserError

if TYPE_CHECKING:
    import torch

    from disttempnet.evaluation.readers import Task
    from disttempnet.evaluation.records import TaskRecord
    from disttempnet.models import Towers

EVALUATE = """Without --data-root: the tasks whose data ships with the package, or that the run's config names.

With --data-root DIR: DataComp's tasks, as far as their data is below DIR (--list says which are, and where to get
them). Each finished task is a line of OUT/eval_results.jsonl; the same command goes on after a stop. What is missing
is reported, what fails is reported and makes the exit code 1; neither ends the run.

examples:
  disttempnet evaluate runs/mine
  disttempnet evaluate runs/mine --data-root /data/datacomp
  disttempnet evaluate open_clip:ViT-B-32/laion2b_s34b_b79k --data-root /data/datacomp --tags imagenet retrieval
  disttempnet evaluate runs/mine --data-root /data/datacomp --tasks vtab/dtd imagenet1k --precision fp32
  torchrun --nproc_per_node 8 -m disttempnet evaluate runs/mine --data-root /data/datacomp --workers 8
  disttempnet evaluate --list --data-root /data/datacomp
"""
FACTS_FILE = "evaluation.json"
FIXED = ("checkpoint", "precision", "compat")  # what all results of a folder have in common


def add_evaluate_command(commands: Any) -> None:
    """Add `evaluate` to the commands of the program."""
    evaluate = commands.add_parser(
        "evaluate",
        help="zero-shot accuracy and retrieval of a run or an open_clip model",
        description=EVALUATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("target", nargs="?", help="a run folder, a checkpoint folder, or open_clip:NAME[/PRETRAINED]")
    evaluate.add_argument("--tasks", nargs="+", default=(), metavar="TASK", help="rows of tasks.toml")
    evaluate.add_argument(
        "--tags", nargs="+", default=(), metavar="TAG", help="all tasks of a group: imagenet, retrieval, vtab, …"
    )
    evaluate.add_argument("--data-root", metavar="DIR", help="folder of the data of DataComp's tasks")
    evaluate.add_argument("--list", action="store_true", help="print the tasks, and which are there; evaluate nothing")
    evaluate.add_argument(
        "--precision",
        choices=("fp32", "bf16", "datacomp"),
        help="with --data-root: fp32; bf16 autocast; or texts in half and images in full precision, as DataComp "
        "(default: bf16 on a GPU, else fp32)",
    )
    evaluate.add_argument(
        "--compat",
        choices=("datacomp-1.4",),
        default="",
        help="with --data-root: read class names as the CLIP_benchmark 1.4 that DataComp pins, without blank ones",
    )
    evaluate.add_argument("--workers", type=int, metavar="N", help="with --data-root: decoding processes of each rank")
    evaluate.add_argument("--batch", type=int, default=256, help="images a forward pass (default: 256)")
    evaluate.add_argument(
        "--out",
        metavar="PATH",
        help="with --data-root a folder (default: RUN/evaluation/STEP, or evaluation/NAME), else a JSON file "
        "(default: RUN/results.json)",
    )
    evaluate.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from disttempnet.evaluation.readers import all_tasks, choose_tasks

    root = Path(options.data_root) if options.data_root else None
    if root is not None and not root.is_dir():
        raise UserError(f"--data-root {root}: no such folder")
    if options.batch < 1 or (options.workers or 0) < 0:
        raise UserError("--batch is at least 1, --workers at least 0")
    chosen = choose_tasks(options.tasks, options.tags)
    if options.list:
        return _list(chosen or [task for task in all_tasks().values() if task.below_root], root)
    if options.target is None:
        raise UserError("evaluate what? a run folder, a checkpoint folder, or open_clip:NAME[/PRETRAINED]")
    if root is None:
        for flag in ("precision", "compat", "workers"):
            if getattr(options, flag):
                raise UserError(f"--{flag} goes with --data-root")
        return _without_root(options, [task.name for task in chosen])
    return _with_root(options, chosen or [task for task in all_tasks().values() if task.below_root], root)


def _without_root(options: argparse.Namespace, chosen: list[str]) -> int:
    """Tasks whose data ships with the package: a table, and one JSON file."""
    from rich.console import Console

    from disttempnet import distributed
    from disttempnet.evaluation.readers import all_tasks
    from disttempnet.evaluation.runner import evaluate
    from disttempnet.evaluation.scores import to_record
    from disttempnet.evaluation.table import results_table
    from disttempnet.training.checkpoint import refuse_unwritable, write_atomically

    out = Path(options.out) if options.out else None
    if out is not None:
        refuse_unwritable(out)
    towers, title, folder, _, config = _open(options.target)
    names, data_root = chosen, None
    if config is not None:
        names = names or list(config.eval.tasks)
        data_root = Path(config.eval.data_root) if config.eval.data_root else None
        out = out or folder / "results.json"
    names = names or [name for name, task in all_tasks().items() if not task.below_root]
    with distributed.session() as device:
        towers.module.to(device)
        results = evaluate(towers, names, device=device, batch=options.batch, data_root=data_root)
        if distributed.is_main():
            Console().print(results_table({title: results}))
            if out is not None:
                out.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(out, json.dumps({"model": title, **to_record(results)}, indent=2) + "\n")
                print(f"results: {out}")
    return 0


def _open(target: str) -> tuple[Towers, str, Path, str, Any]:
    """(towers, title, folder that its results go below, name of the checkpoint, config of a run or None)."""
    if target.startswith("open_clip:"):
        from disttempnet.models import load_model

        name, _, pretrained = target.removeprefix("open_clip:").partition("/")
        towers = load_model(name, pretrained)
        words = re.sub(r"[^A-Za-z0-9._]+", "-", f"{name}-{pretrained}" if pretrained else name)
        return towers, target, Path(), words.strip("-"), None
    from disttempnet.training.checkpoint import load_run

    run = load_run(target)
    title = f"{run.config.name} @ step {run.step}"
    return run.towers, title, run.folder, f"step-{run.step:08d}", run.config


def _with_root(options: argparse.Namespace, tasks: Sequence[Task], root: Path) -> int:
    """Tasks below a data root: a folder of results."""
    from disttempnet import distributed
    from disttempnet.data.cache import cache_folder
    from disttempnet.evaluation.classtexts import ClassTexts
    from disttempnet.evaluation.embed import checkpoint_hash, make_encoder
    from disttempnet.evaluation.layouts import is_there
    from disttempnet.evaluation.suite import Suite
    from disttempnet.training.checkpoint import refuse_unwritable

    if not any(is_there(task, root) for task in tasks):
        raise UserError(f"--data-root {root}: holds none of the {len(tasks)} tasks (--list says where to get them)")
    towers, title, folder, name, _ = _open(options.target)
    out = Path(options.out) if options.out else folder / "evaluation" / name
    refuse_unwritable(out / FACTS_FILE)
    with distributed.session(timeout_minutes=60.0) as device:
        precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
        facts = {
            "model": title,
            "checkpoint": checkpoint_hash(towers),
            "precision": precision,
            "compat": options.compat,
            "data_root": str(root.absolute()),
            "device": device.type,
        }
        distributed.together(lambda: _claim(out, facts) if distributed.is_main() else None)
        towers.module.to(device)
        dtype = str(make_encoder(towers, device, precision, False, 1).text_dtype or "fp32").removeprefix("torch.")
        texts = ClassTexts(cache_folder() / "text" / f"{facts['checkpoint']}-{dtype}")
        workers = _workers(device) if options.workers is None else options.workers
        suite = Suite(root, out, precision, options.compat, options.batch, workers, texts)
        records = suite.run(towers, tasks, device)
        if distributed.is_main():
            _show(records, tasks, out, title)
    return int(any(record.error for record in records))


def _claim(out: Path, facts: dict[str, str]) -> None:
    """Say in a folder what its results are of; UserError where it holds those of something else."""
    from disttempnet.training.checkpoint import write_atomically

    path = out / FACTS_FILE
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            different = [key for key in FIXED if before[key] != facts[key]]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: cannot be read; give another --out, or remove the folder") from None
        for key in different:
            was, now = (f"{one['model']}, {one[key][:12] or 'none'}" for one in (before, facts))
            raise UserError(f"{out}: holds results of another {key} ({was}; now {now}): give another --out")
    elif any(out.glob("*.jsonl")):
        raise UserError(f"{out}: holds results, but no {FACTS_FILE} that says of what: give another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(facts, indent=2) + "\n")


def _workers(device: torch.device) -> int:
    """Decoding processes for each rank: with a GPU its share of the cores, without none (they would take turns)."""
    if device.type != "cuda":
        return 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(16, len(os.sched_getaffinity(0)) // here - 1))


def _show(records: Sequence[TaskRecord], tasks: Sequence[Task], out: Path, title: str) -> None:
    """The table of all tasks, and what is wrong with some."""
    from rich.console import Console
    from rich.table import Table

    from disttempnet.evaluation.records import RESULTS_FILE

    console = Console()
    table = Table(title=title)
    for heading in ("task", "main metric", "per cent", "samples"):
        table.add_column(heading, justify="right" if heading in ("per cent", "samples") else "left")
    for record in records:
        value = "–" if record.value is None else f"{100 * record.value:.2f}" + ("" if record.counts else " *")
        table.add_row(record.dataset, record.main_metric_name, value, f"{record.samples:,}")
    console.print(table)
    there = {record.key for record in records}
    lines = [f"* {record.dataset}: {record.error}" for record in records if record.error]
    lines += [f"{record.dataset}: {note}" for record in records for note in record.notes]
    lines += [
        f"missing: {task.display} (huggingface.co/datasets/{task.source})" for task in tasks if task.name not in there
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    counted = [record.value for record in records if record.counts and record.value is not None]
    if counted:
        of = sum(bool(task.main) for task in tasks)
        console.print(f"average of {len(counted)}/{of} tasks: {100 * sum(counted) / len(counted):.2f}")
    print(f"results: {out / RESULTS_FILE}")


def _list(tasks: Sequence[Task], root: Path | None) -> int:
    """Print tasks: what they are, whether they are there, where to get them."""
    from disttempnet.evaluation.layouts import find_data

    print(f"{'task':54}{'samples':>8}  {'main metric':24}{'below the data root':44}huggingface.co/datasets/")
    for task in tasks:
        found = find_data(task, root) if root is not None and task.below_root else None
        where = found.name if found else "ships with the package" if not task.below_root else "–"
        size = f"{task.size:,}" if task.size else ""
        print(f"{task.name:54}{size:>8}  {task.main or '–':24}{where:44}{task.source}")
    return 0
