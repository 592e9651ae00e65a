"""The command `disttempnet evaluate`. Heavy imports wait until it is needed."""

from __future__ import annotations

import argparse
import re
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from disttempnet.errors import Preempted, UserError
from disttempnet.io.machine import cores
from disttempnet.io.paths import path_argument
from disttempnet.io.ranges import BATCH, WORKERS
from disttempnet.terminal import console, say

if TYPE_CHECKING:
    import torch

    from disttempnet.config import Config
    from disttempnet.evaluation.results.records import TaskRecord
    from disttempnet.evaluation.results.summary import Subject
    from disttempnet.evaluation.tasks import Task
    from disttempnet.models import Towers

EVALUATE = """Without --data-root: the tasks whose data ships with the package, or that the run's config names.

With --data-root DIR: DataComp's tasks, as far as their data is below DIR (--list says which are, and where to get
them). Each finished task is a line of OUT/eval_results.jsonl; the same command goes on after a stop (SIGUSR1, as SLURM
sends it ahead of a time limit: exit code 138). What is missing is reported, what fails is reported and makes the exit
code 1; neither ends the run.

examples:
  disttempnet evaluate runs/mine
  disttempnet evaluate runs/mine --data-root /data/datacomp
  disttempnet evaluate ViT-B-32/laion2b_s34b_b79k --data-root /data/datacomp --tags imagenet,retrieval
  disttempnet evaluate runs/mine --data-root /data/datacomp --tasks vtab/dtd imagenet1k --precision fp32
  torchrun --nproc_per_node 8 -m disttempnet evaluate runs/mine --data-root /data/datacomp --workers 8
  disttempnet evaluate --list --data-root /data/datacomp
"""
TARGETS = (
    "a run folder, a checkpoint folder, NAME/TAG (ViT-B-32/openai), open_clip:NAME/FILE, a folder with an "
    "open_clip_config.json or of transformers' CLIPModel, hf-hub:ORG/NAME"
)
FIXED = ("checkpoint", "precision", "compat")  # what all results of a folder have in common


def add_evaluate_command(commands: Any) -> None:
    """Add `evaluate` to the commands of the program."""
    evaluate = commands.add_parser(
        "evaluate",
        help="zero-shot accuracy and retrieval of a run or an open_clip model",
        description=EVALUATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("target", nargs="?", type=path_argument, help=f"one of: {TARGETS}")
    evaluate.add_argument(
        "--resize-positions",
        action="store_true",
        help="take weights of another image size than the architecture's: interpolate their position embeddings",
    )
    evaluate.add_argument(
        "--tasks",
        nargs="+",
        type=path_argument,
        default=(),
        metavar="TASK",
        help="rows of tasks.toml; or data of one's own: folder:PATH, shards:SPEC, captions:FILE, each with "
        "?label=KEY for zero-shot (docs/evaluation.md)",
    )
    evaluate.add_argument(
        "--tags", nargs="+", default=(), metavar="TAG", help="all tasks of a group: imagenet, retrieval, vtab, …"
    )
    evaluate.add_argument(
        "--data-root", type=path_argument, metavar="DIR", help="folder of the data of DataComp's tasks"
    )
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
    evaluate.add_argument(
        "--workers", type=WORKERS.parse, metavar="N", help="with --data-root: decoding processes of each rank"
    )
    evaluate.add_argument(
        "--batch", type=BATCH.parse, default=256, metavar="N", help="images a forward pass (default: 256)"
    )
    evaluate.add_argument(
        "--out",
        type=path_argument,
        metavar="PATH",
        help="with --data-root a folder (default: RUN/evaluation/STEP, or evaluation/NAME), else a JSON file "
        "(default: RUN/results.json, or of a run that cannot be written evaluation/RUN-STEP.json)",
    )
    evaluate.set_defaults(run=_evaluate, memory="lower --batch")


def _words(given: Sequence[str]) -> list[str]:
    """`a,b c` as well as `a b c`; a comma in data of one's own (folder:PATH) belongs to its path."""
    from disttempnet.evaluation.tasks import OWN

    own = "|".join(OWN)
    pieces = [piece for part in given for piece in re.split(rf",(?={own})", part)]
    return [word for piece in pieces for word in ([piece] if re.match(own, piece) else piece.split(",")) if word]


def _evaluate(options: argparse.Namespace) -> int:
    from disttempnet.evaluation.tasks import VALIDATION_TASK, all_tasks, choose_tasks

    root = Path(options.data_root) if options.data_root else None
    if root is not None and not root.is_dir():
        raise UserError(f"--data-root {root}: no such folder")
    words = _words(options.tasks)
    chosen = choose_tasks([word for word in words if word != VALIDATION_TASK], _words(options.tags))
    if options.list:
        return _list(chosen or [task for task in all_tasks().values() if task.below_root], root)
    if options.target is None:
        raise UserError(f"evaluate what? {TARGETS}")
    if root is None:
        for flag in ("precision", "compat", "workers"):
            if getattr(options, flag):
                raise UserError(f"--{flag} goes with --data-root")
        return _without_root(options, [task.name for task in chosen], VALIDATION_TASK in words)
    if VALIDATION_TASK in words:
        raise UserError(f"task '{VALIDATION_TASK}' is of a run's own data: evaluate it without --data-root")
    return _with_root(options, chosen or [task for task in all_tasks().values() if task.below_root], root)


def _without_root(options: argparse.Namespace, chosen: list[str], validation: bool) -> int:
    """Tasks whose data ships with the package, is one's own, or is named by a run's config: a table, one JSON file.

    Args:
        chosen: names of tasks; none, and no `validation` = those of the run's config, or all that ship.
        validation: what the run's data.validation names is a task too.
    """
    from disttempnet import distributed
    from disttempnet.evaluation.encoder import checkpoint_hash
    from disttempnet.evaluation.progress import TaskProgress
    from disttempnet.evaluation.results.file import default_place, refuse_other, write_results
    from disttempnet.evaluation.results.summary import Subject
    from disttempnet.evaluation.results.tables import results_table
    from disttempnet.evaluation.runner import evaluate
    from disttempnet.evaluation.tasks import VALIDATION_TASK, TaskData, all_tasks, find_task
    from disttempnet.evaluation.validation import validation_data
    from disttempnet.io.files import refuse_unwritable

    out = Path(options.out) if options.out else None
    if out is not None:
        refuse_unwritable(out)  # learnt before the model is loaded
    opened = _open(options.target, options.resize_positions)
    subject = Subject(opened.title, checkpoint=checkpoint_hash(opened.towers), notes=opened.notes)
    names, data_root, config = chosen, None, opened.config
    if config is not None:
        data_root = Path(config.eval.data_root) if config.eval.data_root else None
        if not chosen and not validation:
            names, validation = list(config.eval.tasks), bool(config.data.validation)
        out = out or default_place(opened.folder, config.name, opened.name, subject)
    elif validation:
        find_task(VALIDATION_TASK)  # says that there is none
    if out is not None:
        refuse_other(out, subject)
    with distributed.session() as device:
        held_out = validation_data(config.data) if config is not None and validation else None
        if validation and held_out is None:
            find_task(VALIDATION_TASK)
        ship = [name for name, task in all_tasks().items() if not task.below_root and not task.is_built]
        tasks: list[str | TaskData] = [*(names or ([] if held_out else ship)), *([held_out] if held_out else [])]
        opened.towers.module.to(device)
        with TaskProgress() as progress:
            results = evaluate(
                opened.towers, tasks, device=device, batch=options.batch, data_root=data_root, progress=progress
            )
        if not distributed.is_main():
            return 0  # else a launcher might end rank 0 before its table is printed
    console().print(results_table({opened.title: results}))
    _print_notes(opened.notes)
    if out is not None:
        write_results(out, subject, results)
        if config is not None and not options.out and opened.folder not in out.parents:
            say(f"{opened.folder} cannot be written to: the results are in the current folder")
        say(f"results: {out}")
    return int(not all(scores.complete for scores in results.values()))


class Opened(NamedTuple):
    """Towers, and what is known of them.

    Attributes:
        title: for a reader; model, pretrained: names of the towers and of their weights.
        folder: that results go below, by `name`.
        config: of a run; objective, step: what run.json says, and where the checkpoint stands.
        notes: what a reader of scores has to know of the weights.
    """

    towers: Towers
    title: str
    model: str
    pretrained: str
    folder: Path
    name: str
    config: Config | None = None
    objective: dict[str, str] | None = None
    step: int = 0
    notes: tuple[str, ...] = ()


def _open(target: str, resize_positions: bool) -> Opened:
    from disttempnet.models import read_target

    if named := read_target(target):
        return _open_named(target, *named, resize_positions)
    if resize_positions:
        raise UserError("--resize-positions is for weights of others: the towers of a run have the size of its config")
    from disttempnet.losses import OBJECTIVES
    from disttempnet.training.checkpoint import load_run

    run = load_run(target)
    recipe = OBJECTIVES[run.config.loss.name]
    objective = {"name": run.config.loss.name, "title": recipe.title, "formula": recipe.formula}
    title, name = f"{run.config.name} @ step {run.step}", f"step-{run.step:08d}"
    about = (run.config, objective, run.step, run.towers.notes)
    return Opened(run.towers, title, run.config.model.name, title, run.folder, name, *about)


def _open_named(target: str, model: str, pretrained: str, resize_positions: bool) -> Opened:
    """Towers that are no run of ours."""
    import torch

    from disttempnet.models import is_random, load_model

    torch.manual_seed(0)  # random towers are the same every time
    towers = load_model(model, pretrained, resize_positions=resize_positions)
    notes = (*towers.notes, *((f"random weights: {target} names none",) if is_random(model, pretrained) else ()))
    words = re.sub(r"[^A-Za-z0-9._]+", "-", f"{model}-{pretrained}").strip("-")
    return Opened(towers, target, model, pretrained, Path(), words, notes=notes)


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        say(f"note: {note}")


def _with_root(options: argparse.Namespace, tasks: Sequence[Task], root: Path) -> int:
    """Tasks below a data root: a folder of results."""
    from disttempnet import distributed
    from disttempnet.data.builtin.cache import cache_folder
    from disttempnet.evaluation.class_features import ClassFeatures
    from disttempnet.evaluation.datasets.open import is_there
    from disttempnet.evaluation.encoder import make_encoder
    from disttempnet.evaluation.results.averages import counted_tags
    from disttempnet.evaluation.results.records import RESULTS_FILE, read_records
    from disttempnet.evaluation.results.summary import SUMMARY_FILE, write_summary
    from disttempnet.evaluation.suite import Suite
    from disttempnet.io.files import refuse_unwritable
    from disttempnet.training.signals import StopSignal

    if not any(is_there(task, root) for task in tasks):
        others = sorted(path.name for path in root.glob("wds_*"))
        there = f"; {others[0]} is no folder of theirs" if others else ""
        raise UserError(
            f"--data-root {root}: holds none of the {len(tasks)} tasks (--list says where to get them){there}"
        )
    if options.out:
        refuse_unwritable(Path(options.out) / SUMMARY_FILE)  # learnt before the model is loaded
    opened = _open(options.target, options.resize_positions)
    out = Path(options.out) if options.out else _results_folder(opened)
    refuse_unwritable(out / SUMMARY_FILE)
    with distributed.session(timeout_minutes=60.0) as device:
        precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
        subject = _subject(opened, precision, options.compat)
        try:
            distributed.together(lambda: _claim(out, subject) if distributed.is_main() else None)
        except distributed.OtherRankFailed:
            return 0  # rank 0 says why, with its exit code: a launcher ends the others where one fails
        opened.towers.module.to(device)
        dtype = make_encoder(opened.towers, device, precision, False, 1).text_dtype
        kept = f"{subject.checkpoint}-{str(dtype or 'torch.float32').removeprefix('torch.')}"
        texts = ClassFeatures(cache_folder() / "text" / kept)
        workers = _workers(device) if options.workers is None else options.workers
        stop = StopSignal({signal.SIGUSR1: Preempted.code})
        suite = Suite(root, out, precision, options.compat, options.batch, workers, texts, lambda: stop.code)
        try:
            with stop:
                records = suite.run(opened.towers, tasks, device)
        except Preempted:
            if distributed.is_main():
                say("stopped: the same command goes on with the task that was cut off")
            raise
        finally:  # a summary of what there is, after Ctrl-C too
            if distributed.is_main():
                every = read_records(out / RESULTS_FILE)
                write_summary(out, subject, every, counted_tags())
        if not distributed.is_main():
            return 0  # else a launcher might end rank 0 before its table is printed
        _show(every, tasks, opened.title, root)
        _print_notes(opened.notes)
        say(f"results: {out / RESULTS_FILE}")
    return int(any(record.error for record in records))


def _results_folder(opened: Opened) -> Path:
    """Below the run; where that cannot be written to (it may be a colleague's), here."""
    from disttempnet.evaluation.results.summary import SUMMARY_FILE
    from disttempnet.io.files import refuse_unwritable

    folder = opened.folder / "evaluation" / opened.name
    try:
        refuse_unwritable(folder / SUMMARY_FILE)
    except UserError:
        if opened.config is None:
            raise
        say(f"{opened.folder} cannot be written to: results go to the current folder")
        return Path("evaluation") / f"{opened.config.name}-{opened.name}"
    return folder


def _subject(opened: Opened, precision: str, compat: str) -> Subject:
    from disttempnet.config import public_table
    from disttempnet.evaluation.encoder import checkpoint_hash
    from disttempnet.evaluation.results.summary import Subject
    from disttempnet.training.run_info import provenance

    run = {}
    if opened.config is not None:
        table = public_table(opened.config)
        run = {"name": opened.config.name, "config": table, "objective": opened.objective, "step": opened.step}
    return Subject(
        model=opened.model,
        pretrained=opened.pretrained,
        checkpoint=checkpoint_hash(opened.towers),
        precision=precision,
        compat=compat,
        versions=provenance()["versions"],
        parameters=sum(p.numel() for p in opened.towers.module.parameters()),
        run=run,
        notes=opened.notes,
    )


def _claim(out: Path, subject: Subject) -> None:
    """Say in a folder what its results are of; UserError where it holds those of something else."""
    from disttempnet.evaluation.results.averages import counted_tags
    from disttempnet.evaluation.results.records import RESULTS_FILE, read_records
    from disttempnet.evaluation.results.summary import SUMMARY_FILE, read_subject, write_summary

    before, records = read_subject(out), read_records(out / RESULTS_FILE)
    if before is None and records:
        raise UserError(f"{out}: holds results, but no {SUMMARY_FILE} that says of what: give another --out")
    for key in FIXED if before is not None else ():
        was, now = getattr(before, key), getattr(subject, key)
        if was != now:
            raise UserError(f"{out}: holds results of another {key} ({was or 'none'}; now {now or 'none'}): give --out")
    write_summary(out, subject, records, counted_tags())


def _workers(device: torch.device) -> int:
    """Decoding processes for each rank: with a GPU its share of the cores, without none (they would take turns)."""
    if device.type != "cuda":
        return 0
    from disttempnet.distributed.launcher import local_processes

    return max(1, min(16, cores() // local_processes() - 1))


def _show(found: Mapping[str, TaskRecord], tasks: Sequence[Task], title: str, root: Path) -> None:
    """The table of all tasks in the folder of results and of averages, and where to get what is missing."""

    from disttempnet.evaluation.datasets.open import where_to_get
    from disttempnet.evaluation.results.averages import counted_tags
    from disttempnet.evaluation.results.tables import records_table
    from disttempnet.evaluation.tasks import all_tasks

    places = {key: place for place, key in enumerate(all_tasks())}
    by_key = {key: found[key] for key in sorted(found, key=lambda key: places.get(key, len(places)))}
    console().print(records_table(title, by_key, counted_tags()))
    for task in tasks:
        if task.name not in by_key:
            say(f"missing: {task.display} ({where_to_get(task, root)})")


def _list(tasks: Sequence[Task], root: Path | None) -> int:
    """Print tasks: what they are, whether they are there, where to get them."""
    from disttempnet.evaluation.results.tables import tasks_list

    say("\n".join(tasks_list(tasks, root)))
    return 0
