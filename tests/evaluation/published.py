"""Rows of open_clip's published results (docs/openclip_results.csv of mlfoundations/open_clip, revision 89fb801), and
the groups of DataComp's aggregate script: facts of the field that averages and exports are checked against.
"""

from __future__ import annotations

import csv
from pathlib import Path

from disttempnet.evaluation.results.records import TaskRecord
from disttempnet.evaluation.tasks import all_tasks

CSV = Path(__file__).with_name("openclip_results.csv")
SHIFTS = {"ImageNet Sketch", "ImageNet v2", "ImageNet-A", "ImageNet-O", "ImageNet-R", "ObjectNet"}
RETRIEVAL = {"Flickr", "MSCOCO", "WinoGAViL"}
VTAB = {
    "Caltech-101", "CIFAR-100", "CLEVR Counts", "CLEVR Distance", "Describable Textures", "EuroSAT",
    "KITTI Vehicle Distance", "Oxford Flowers-102", "Oxford-IIIT Pet", "PatchCamelyon", "RESISC45", "SVHN", "SUN397",
}  # fmt: skip


def header() -> list[str]:
    with CSV.open(encoding="utf-8", newline="") as file:
        return next(csv.reader(file))


def rows() -> list[dict[str, str]]:
    with CSV.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def scores(row: dict[str, str]) -> dict[str, float]:
    """Display name → main metric of the 38 tasks."""
    return {name: float(row[name]) for name in header()[5:]}


def records(values: dict[str, float]) -> dict[str, TaskRecord]:
    """Records of our tasks with these main metrics, by display name."""
    made = {}
    for key, task in all_tasks().items():
        if task.display in values:
            value = values[task.display]
            made[key] = TaskRecord(key, task.display, {task.main: value, "main_metric": value}, task.main, 10, 10)
    return made
