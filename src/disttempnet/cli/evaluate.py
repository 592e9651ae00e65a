"""The command `disttempnet evaluate`. Heavy imports wait until it is needed."""

from __future__ import annotations

import argparse
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from disttempnet.cli.model import TARGETS, add_resize_positions, open_target
from disttempnet.errors import Preempted, UserError
from disttempnet.io.paths import path_argument
from disttempnet.io.ranges import BATCH, WORKERS
from disttempnet.terminal import say

EVALUATE = """Without --data-root: the tasks that the run's config names, or those whose data ships with the package.

With --data-root DIR: DataComp's tasks whose data is below DIR. --list prints which are, and where to get the others.
Each finished task is a line of OUT/eval_results.jsonl. After a stop, run the same command again: it goes on with the
tasks that are left. (SIGUSR1, which SLURM sends ahead of a time limit, gives exit code 138.) Missing tasks are
reported. Failed tasks are reported and make the exit code 1. Neither ends the run.

examples:
  disttempnet evaluate runs/mine
  disttempnet evaluate runs/mine --data-root /data/datacomp
  disttempnet evaluate ViT-B-32/laion2b_s34b_b79k --data-root /data/datacomp --tags imagenet,retrieval
  disttempnet evaluate runs/mine --data-root /data/datacomp --tasks vtab/dtd imagenet1k --precision fp32
  torchrun --nproc_per_node 8 -m disttempnet evaluate runs/mine --data-root /data/datacomp --workers 8
  disttempnet evaluate --list --data-root /data/datacomp
"""


def add_evaluate_command(commands: Any) -> None:
    """Add `evaluate` to the commands of the program."""
    evaluate = commands.add_parser(
        "evaluate",
        help="zero-shot accuracy and retrieval of a run or an open_clip model",
        description=EVALUATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("target", nargs="?", type=path_argument, help=f"one of: {TARGETS}")
    add_resize_positions(evaluate)
    evaluate.add_argument(
        "--tasks",
        nargs="+",
        type=path_argument,
        default=(),
        metavar="TASK",
        help="rows of tasks.toml; or your own data: folder:PATH, shards:SPEC, captions:FILE, each with "
        "?label=KEY for zero-shot (docs/evaluation.md)",
    )
    evaluate.add_argument(
        "--tags", nargs="+", default=(), metavar="TAG", help="all tasks of a group: imagenet, retrieval, vtab, …"
    )
    evaluate.add_argument(
        "--data-root", type=path_argument, metavar="DIR", help="folder of the data of DataComp's tasks"
    )
    evaluate.add_argument("--list", action="store_true", help="print the tasks and which of them are there, then exit")
    evaluate.add_argument(
        "--precision",
        choices=("fp32", "bf16", "datacomp"),
        help="with --data-root: fp32; bf16 (autocast); or datacomp (texts in half precision, images in fp32) "
        "(default: bf16 on a GPU, else fp32)",
    )
    evaluate.add_argument(
        "--compat",
        choices=("datacomp-1.4",),
        default="",
        help="with --data-root: drop blank class names, as CLIP_benchmark 1.4, which DataComp pins, does",
    )
    evaluate.add_argument(
        "--workers", type=WORKERS.parse, metavar="N", help="with --data-root: decoding processes of each rank"
    )
    evaluate.add_argument(
        "--batch", type=BATCH.parse, default=256, metavar="N", help="images a forward pass (default: 256)"
    )
    evaluate.add_argument(
        "--probe",
        action="store_true",
        help="with --data-root: then train a linear probe of each task that has a train split (docs/evaluation.md)",
    )
    evaluate.add_argument(
        "--cache-features",
        type=path_argument,
        metavar="DIR",
        help="compute the features of locked towers once and keep them in DIR; none = run the towers in full "
        "(default: as the run's train.cache_features and train.cache_folder have it)",
    )
    evaluate.add_argument(
        "--out",
        type=path_argument,
        metavar="PATH",
        help="with --data-root a folder (default: RUN/evaluation/STEP, or evaluation/NAME), else a JSON file "
        "(default: RUN/results.json; evaluation/RUN-STEP.json if the run is read-only)",
    )
    evaluate.set_defaults(run=_evaluate, memory="lower --batch")


def _words(given: Sequence[str]) -> list[str]:
    """Return words that are separated by spaces or commas; a comma after `folder:` and the like belongs to the path."""
    from disttempnet.evaluation.tasks import OWN_DATA

    own = "|".join(OWN_DATA)
    pieces = [piece for part in given for piece in re.split(rf",(?={own})", part)]
    return [word for piece in pieces for word in ([piece] if re.match(own, piece) else piece.split(",")) if word]


def _evaluate(options: argparse.Namespace) -> int:
    from disttempnet.evaluation.command import EvaluationRequest, check_request, run_evaluation
    from disttempnet.evaluation.results.tables import tasks_list
    from disttempnet.evaluation.tasks import VALIDATION_TASK, choose_tasks
    from disttempnet.training.signals import StopSignal

    # What to evaluate on; with --list no more than print it.
    root = Path(options.data_root) if options.data_root else None
    if root is not None and not root.is_dir():
        raise UserError(f"--data-root {root}: no such folder")
    words = _words(options.tasks)
    chosen = choose_tasks([word for word in words if word != VALIDATION_TASK], _words(options.tags))
    if options.list:
        say("\n".join(tasks_list(EvaluationRequest(tasks=chosen).below_root, root)))
        return 0

    # Flags that do not go together.
    if options.target is None:
        raise UserError(f"evaluate what? {TARGETS}")
    for flag in ("precision", "compat", "workers", "probe") if root is None else ():
        if getattr(options, flag):
            raise UserError(f"--{flag} goes with --data-root")
    if root is not None and VALIDATION_TASK in words:
        raise UserError(f"task '{VALIDATION_TASK}' is of a run's own data: evaluate it without --data-root")

    # The model is opened last: it takes longest.
    request = EvaluationRequest(
        tasks=chosen,
        validation=VALIDATION_TASK in words,
        root=root,
        out=Path(options.out) if options.out else None,
        precision=options.precision or "",
        compat=options.compat,
        batch=options.batch,
        cache_features=options.cache_features or "",
        workers=options.workers,
        probe=options.probe,
    )
    check_request(request)
    model = open_target(options.target, options.resize_positions)
    with StopSignal({signal.SIGUSR1: Preempted.code}) as stop:
        return run_evaluation(model, request, lambda: stop.code)
