"""Folders of evaluations with invented numbers: no model, no data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from disttempnet.evaluation.results.averages import counted_tags
from disttempnet.evaluation.results.records import RESULTS_FILE, TaskRecord, read_records, write_records
from disttempnet.evaluation.results.summary import Subject, write_summary
from disttempnet.evaluation.tasks import all_tasks
from tests.report.invented import config

CLIP = (0.20, 0.21, 0.25)

TEMPNET = (0.30, 0.32, 0.34)
TITLES = {"clip": "CLIP", "disttempnet-v1": "DistTempNet-v1"}


def record(key: str, value: float | None, **more: object) -> TaskRecord:
    task = all_tasks()[key]
    metrics = {task.main or "acc": value, "main_metric": value if task.main else None}
    return TaskRecord(key, task.display, metrics, task.main, 10, 10, seconds=1.0, **more)  # type: ignore[arg-type]


def write_evaluation(folder: Path, values: Mapping[str, float], subject: Subject) -> Path:
    """A folder of an evaluation: a complete record of each key with this main metric, beside those that are there."""
    records = read_records(folder / RESULTS_FILE) | {key: record(key, value) for key, value in values.items()}
    write_records(folder / RESULTS_FILE, records.values())
    write_summary(folder, subject, records, counted_tags())
    return folder


def run_subject(loss: str, seed: int) -> Subject:
    """A run of ours."""
    name = f"{loss}--seed-{seed}"
    run = {"name": name, "config": config(name, loss, seed), "objective": {"title": TITLES[loss]}, "step": 100}
    return Subject("ViT-B-32", f"{name} @ step 100", "feed" * 16, "fp32", "", {"torch": "2.9"}, 1000, run)


def model_subject(pretrained: str) -> Subject:
    """A model of open_clip."""
    return Subject("ViT-B-32", pretrained, "beef" * 16, "fp32", "", {"torch": "2.9"}, 151_277_313)


def flat(value: float) -> dict[str, float]:
    """Every task that counts at this value, but retrieval at twice it."""
    return {key: value * (2 if "retrieval" in tags else 1) for key, tags in counted_tags().items()}


def folders(grid: Path) -> list[Path]:
    return sorted(grid.glob("*/evaluation"))


def average_of(value: float) -> float:
    """Of `flat(value)` by hand: 35 tasks at it and 3 of retrieval at twice it."""
    return (35 * value + 3 * 2 * value) / 38
