"""Facts of a run: for run.json, where it comes from and on what data and machine it ran; for the console, its plan."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from disttempnet import distributed
from disttempnet.config import Config
from disttempnet.data import Source, TrainingData
from disttempnet.errors import notice
from disttempnet.io.files import read_object, write_atomically
from disttempnet.losses import OBJECTIVES
from disttempnet.models import Towers
from disttempnet.sanitize import redacted

PROBLEMS = 20  # lines that say what of the data is left out


class Clock:
    """The time of day at the start, carried on by a monotonic clock: it never goes back."""

    def __init__(self) -> None:
        self._start, self._begun = datetime.datetime.now(datetime.UTC), time.monotonic()

    def now(self) -> str:
        """UTC, to the second, in ISO 8601."""
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
    """Write run.json, at the start and at the end of a run, with the time of either. Only rank 0 calls this."""
    path = config.folder / "run.json"
    known = read_facts(config.folder)
    known.pop("finished", None)  # of an earlier, shorter goal
    objective = OBJECTIVES[config.loss.name]
    facts = {
        **known,
        **provenance(),
        "objective": {"name": config.loss.name, "title": objective.title, "formula": objective.formula},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "world_size": distributed.world_size(),
        "index_digest": data.source.digest,
        "num_samples": data.plan.samples,
        "data": data_facts(data.source),
        "parameters": sum(p.numel() for p in towers.module.parameters()),
        "model_notes": list(towers.notes),
    }
    if started:
        facts.setdefault("started", started)  # kept where a run goes on
    if finished:
        facts["finished"] = max(finished, str(facts.get("started", "")))  # the clock may have been set back in a pause
    write_atomically(path, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def read_facts(run: Path) -> dict[str, Any]:
    """What run.json says; facts that are damaged are passed over with a notice, and are not there."""
    path = run / "run.json"
    facts = read_object(path)
    for key, is_one in FACTS.items():
        if key in facts and not is_one(facts[key]):
            notice(f"{path}: passed over: {key} is {json.dumps(facts[key], ensure_ascii=False)[:40]}")
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


FACTS: dict[str, Callable[[Any], bool]] = {
    "objective": _is_objective, "started": _is_time, "finished": _is_time, "versions": _is_table,
    "world_size": _is_count, "num_samples": _is_count, "parameters": _is_count,
    "device": _is_text, "git": _is_text, "command": _is_text, "index_digest": _is_text,
}  # fmt: skip


def plan_line(config: Config, data: TrainingData, step: int) -> str:
    """What is ahead, in one line."""
    batch, ranks = config.data.global_batch, distributed.world_size()
    share = f" = {ranks} × {batch // ranks}" if ranks > 1 else ""
    begun = f", from step {step}" if step else ""
    return (
        f"{config.folder.name}: {data.plan.samples:,} samples an epoch, {config.train.epochs} epochs of "
        f"{data.plan.steps:,} steps, global batch {batch}{share}{begun}"
    )


def data_facts(source: Source) -> dict[str, Any]:
    """What run.json says of the training data: samples, how many are usable, how they were read where that had to be
    found out, and a line for each reason of those that are not usable."""
    lines = source.problems().splitlines()
    if len(lines) > PROBLEMS:  # every damaged shard has one
        lines[PROBLEMS:] = [f"and {len(lines) - PROBLEMS:,} lines more: disttempnet data index shows all"]
    facts = {"samples": len(source), "usable": int(source.usable_counts.sum()), "left_out": lines}
    return facts | ({"read": notes} if (notes := source.notes()) else {})


def about_data(facts: Mapping[str, Any]) -> list[str]:
    """The same as lines for the console."""
    return [f"{facts['samples']:,} samples, {facts['usable']:,} usable", *facts.get("read", ()), *facts["left_out"]]


def provenance() -> dict[str, Any]:
    """Versions, git revision and command: what is needed to run the same thing again."""
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
    """The revision of the checkout that the package runs from, with + where it was changed; empty when installed."""
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
