"""Provenance of a run for run.json (versions, data, machine), and its plan for the console."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from disttempnet import distributed
from disttempnet.config import Config, SourceConfig
from disttempnet.data import Source, TrainingData
from disttempnet.data.held_out import HeldOut
from disttempnet.errors import notice
from disttempnet.evaluation.scores import Scores
from disttempnet.evaluation.tasks import task_title
from disttempnet.io.files import read_object, write_atomically
from disttempnet.losses import OBJECTIVES
from disttempnet.models import Towers
from disttempnet.sanitize import redacted

PROBLEM_LINES = 20  # about samples that are left out


class Clock:
    """Clock that never goes back: the time of day at the start plus a monotonic clock."""

    def __init__(self) -> None:
        self._start, self._begun = datetime.datetime.now(datetime.UTC), time.monotonic()

    def now(self) -> str:
        """Return UTC to the second in ISO 8601."""
        passed = datetime.timedelta(seconds=time.monotonic() - self._begun)
        return (self._start + passed).isoformat(timespec="seconds")


def write_facts(
    config: Config,
    device: torch.device,
    data: TrainingData,
    towers: Towers,
    *,
    started: str = "",
    finished: str = "",
) -> None:
    """Write run.json at the start or at the end of a run. Only rank 0 calls this.

    Args:
        config, device, data, towers: of the run.
        started, finished: the time now, at the start or at the end.
    """
    path = config.folder / "run.json"
    known = read_facts(config.folder)
    known.pop("finished", None)  # of an earlier start with fewer steps
    objective = OBJECTIVES[config.loss.name]
    facts = {
        **known,
        **process_provenance(),
        "objective": {"name": config.loss.name, "title": objective.title, "formula": objective.formula},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "world_size": distributed.world_size(),
        "index_digest": data.source.digest,
        "num_samples": data.plan.samples,
        "data": data_facts(data.source, config.data.limit),
        "parameters": sum(p.numel() for p in towers.module.parameters()),
        "model_notes": list(towers.notes),
        # kept if a run is resumed: its own checkpoint is not where they came from
        "weights": known.get("weights", list(towers.weights)),
    }
    if started:
        facts.setdefault("started", started)  # kept if a run is resumed
    if finished:
        facts["finished"] = max(
            finished, str(facts.get("started", ""))
        )  # the clock may have been set back between two starts
    write_atomically(path, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def read_facts(run: Path) -> dict[str, Any]:
    """Read run.json; damaged values are skipped with a notice, and missing in the result."""
    path = run / "run.json"
    facts = read_object(path)
    for key, is_one in FACTS.items():
        if key in facts and not is_one(facts[key]):
            notice(f"{path}: skipped: {key} is {json.dumps(facts[key], ensure_ascii=False)[:40]}")
            del facts[key]
    return facts


def _is_objective(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("title", "formula"))


def _is_time(value: Any) -> bool:
    try:
        return datetime.datetime.fromisoformat(value).tzinfo is not None
    except (TypeError, ValueError):
        return False


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _is_count(value: Any) -> bool:
    return type(value) is int


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


FACTS: dict[str, Callable[[Any], bool]] = {
    "objective": _is_objective, "started": _is_time, "finished": _is_time, "versions": _is_table,
    "world_size": _is_count, "num_samples": _is_count, "parameters": _is_count,
    "weights": _is_texts, "device": _is_text, "git": _is_text, "command": _is_text, "index_digest": _is_text,
}  # fmt: skip


def plan_line(config: Config, data: TrainingData, step: int) -> str:
    """Return the plan of a run in one line: samples, epochs, steps, batch."""
    batch, ranks = config.data.global_batch, distributed.world_size()
    share = f" = {ranks} × {batch // ranks}" if ranks > 1 else ""
    begun = f", from step {step}" if step else ""
    return (
        f"{config.folder.name}: {data.plan.samples:,} samples an epoch, {config.train.epochs} epochs of "
        f"{data.plan.steps:,} steps, global batch {batch}{share}{begun}"
    )


def data_facts(source: Source, limit: int = 0) -> dict[str, Any]:
    """Return facts about the training data for run.json.

    These are: samples, usable samples, those of them that are held out for validation and that data.limit leaves out,
    a line for each reason why samples are left out, and notes on how the data was read if that had to be guessed.

    Args:
        source: the training data.
        limit: data.limit; 0 = none.
    """
    lines = source.problems().splitlines()
    if len(lines) > PROBLEM_LINES:  # every damaged shard has a line
        lines[PROBLEM_LINES:] = [f"and {len(lines) - PROBLEM_LINES:,} lines more: disttempnet data index shows all"]
    held_out = len(source.held_out) if isinstance(source, HeldOut) else 0
    usable = int(source.usable_counts.sum()) + held_out
    beyond = max(0, usable - held_out - limit) if limit else 0
    facts = {"samples": len(source), "usable": usable, "held_out": held_out, "beyond_limit": beyond, "left_out": lines}
    return facts | ({"read": notes} if (notes := source.notes()) else {})


def about_data(facts: Mapping[str, Any]) -> list[str]:
    """Return the facts of `data_facts` as lines for the console."""
    unusable, held_out, beyond = facts["samples"] - facts["usable"], facts["held_out"], facts["beyond_limit"]
    parts = [f"{facts['usable'] - held_out - beyond:,} to train on"]
    others = (held_out, "held out for validation"), (beyond, "beyond data.limit"), (unusable, "unusable")
    parts += [f"{count:,} {what}" for count, what in others if count]
    return [f"{facts['samples']:,} samples: {', '.join(parts)}", *facts.get("read", ()), *facts["left_out"]]


def opening_weights(towers: Towers) -> list[str]:
    """Return where the weights of the towers came from, as lines for the console."""
    return [*towers.weights] or ["weights of both towers: random (model.pretrained names others)"]


def closing_lines(
    config: Config, step: int, best: Mapping[str, Any], checkpoints: Sequence[Path], scores: Mapping[str, Scores]
) -> list[str]:
    """Return lines for the console after the last step: where the run is, how to read its scores, what to do next.

    Args:
        config: the run's.
        step: the last one.
        best: step of the best checkpoint, which commands take; may be empty.
        checkpoints: folders of all that are there, `step-N`.
        scores: of the evaluation at this step, by task; may be empty.
    """
    run = shlex.quote(str(config.folder))
    saved = {int(folder.name.removeprefix("step-")): folder for folder in checkpoints}
    lines = [f"run: {config.folder}"]
    lines += [f"  checkpoint: {saved[step]}"] if step in saved else []
    if best.get("step", step) != step and best["step"] in saved:
        lines.append(f"  the best, which commands take: {saved[best['step']]}")
    lines += [f"  {task_title(name)}: {words}" for name, one in scores.items() if (words := _read_recall(one))]
    lines += [f"  next:  disttempnet report {run} --out {run}/report.html", f"         disttempnet evaluate {run}"]
    images = next((shlex.quote(one.images or one.path) for one in config.data.sources if _is_folder(one)), "IMAGES")
    return [*lines, f'         disttempnet search {run} {images} "a red apple"']


def _is_folder(source: SourceConfig) -> bool:
    return Path(source.images or source.path).expanduser().is_dir()


def _read_recall(scores: Scores) -> str:
    """Return what the mean recall of a task says, beside chance; empty where it has none."""
    value, chance = scores.metrics.get("mean_recall"), scores.chance.get("mean_recall")
    if value is None or chance is None:
        return ""
    return (
        f"the right partner is among the nearest 1, 5, 10 of {scores.samples:,} in {100 * value:.1f} % on average "
        f"(mean recall); by chance {100 * chance:.1f} %"
    )


def process_provenance() -> dict[str, Any]:
    """Return versions, git revision and command, as needed to repeat a run."""
    versions = {"python": platform.python_version()}
    for package in ("disttempnet", "torch", "torchvision", "open_clip_torch", "timm", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "versions": versions,
        "git": _git_revision(),
        "command": redacted(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])),
    }


def _git_revision() -> str:
    """Return the git revision that the package runs from, with + if it was changed; empty if it is installed."""
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(here.parents[3])}
    try:
        run = [
            subprocess.run(["git", *words], cwd=here, env=environment, capture_output=True, text=True, timeout=10)
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if run[0].returncode:
        return ""
    return run[0].stdout.strip() + ("+" if run[1].stdout.strip() else "")
