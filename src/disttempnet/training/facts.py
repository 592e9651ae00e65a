"""Facts of a run: for run.json, where it comes from and on what data and machine it ran; for the console, its plan."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from disttempnet import distributed
from disttempnet.config import Config
from disttempnet.data import Source, TrainingData
from disttempnet.files import write_atomically
from disttempnet.losses import OBJECTIVES
from disttempnet.models import Towers

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
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
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
    return {"versions": versions, "git": _git_revision(), "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])}


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
