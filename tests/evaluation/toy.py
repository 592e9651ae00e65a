"""A task that can be scored by hand: images of one colour, and towers that read the mean colour."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from disttempnet.evaluation import evaluate
from disttempnet.evaluation import tasks as readers
from disttempnet.evaluation.evaluator import Evaluator
from disttempnet.evaluation.outputs import ResultsFolder
from disttempnet.evaluation.results.records import TaskRecord
from disttempnet.evaluation.results.summary import Subject
from disttempnet.evaluation.scores import Scores
from disttempnet.evaluation.tasks import Task
from disttempnet.models import Towers
from tests.evaluation.colours import COLOURS, MeaningTowers, tokenize_meaning

METRICS = (
    "acc1",
    "acc5",
    "mean_per_class_recall",
    *(f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)),
    "mean_recall",
)


class ColourModule(nn.Module):
    """Both towers answer with a unit colour; dropout would change it if evaluation left it on."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(3).eval()  # a part that training keeps in evaluation mode

    def encode_image(self, pixels: Tensor, normalize: bool) -> Tensor:
        return nn.functional.normalize(self.dropout(pixels.mean((2, 3))), dim=-1)

    def encode_text(self, tokens: Tensor, normalize: bool) -> Tensor:
        return nn.functional.normalize(self.dropout(tokens.float()), dim=-1)


def tokenize(texts: Sequence[str]) -> Tensor:
    """The colour that a text names, or black."""
    named = [next((rgb for name, rgb in COLOURS.items() if name in text), (0, 0, 0)) for text in texts]
    return torch.tensor(named, dtype=torch.int64)


def colour_towers() -> Towers:
    return Towers("colours", ColourModule(), tokenize, {"embed_dim": 3}, 8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def meaning_towers() -> Towers:
    """Towers for the data root of dataroot.py."""
    return Towers("meaning", MeaningTowers(), tokenize_meaning, {"embed_dim": 3}, 8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def write_shard(path: Path, rows: Sequence[tuple[str, str, str]]) -> None:
    """A shard of solid images: rows of (colour shown or "corrupt", captions one a line, label)."""
    with tarfile.open(path, "w") as tar:
        for i, (colour, captions, label) in enumerate(rows):
            png = io.BytesIO()
            Image.new("RGB", (12, 10), COLOURS.get(colour, (0, 0, 0))).save(png, "PNG")
            image = b"\x89PNG no image" if colour == "corrupt" else png.getvalue()
            parts = {"png": image, "txt": captions.encode(), "json": json.dumps({"label": label}).encode()}
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"{i:05d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def toy_task(folder: Path, **fields: object) -> Task:
    row = {
        "name": "toy",
        "display": "Toy colours",
        "about": "Solid colours.",
        "data": str(folder),
        "classes_from": (),
        "protocols": ("classification", "retrieval"),
        "metrics": METRICS,
        "templates": ("{c}",),
        "tags": (),
    }
    return Task.model_validate({**row, **fields})


def unit_rows(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, d, generator=generator), dim=-1)


def evaluate_into(
    out: Path,
    root: Path,
    tasks: Sequence[Task],
    *,
    compat: str = "",
    batch: int = 256,
    workers: int = 0,
    stopped: Callable[[], object] = bool,
) -> dict[str, TaskRecord]:
    """Records of the tasks that are below a data root, in the order of the tasks; every rank calls this."""
    cpu, towers = torch.device("cpu"), meaning_towers()
    sink = ResultsFolder(out, root, tasks, Subject("meaning", compat=compat), cpu, batch, stopped)
    todo = sink.unfinished()
    with sink:
        Evaluator(towers, cpu, batch=batch, workers=workers).run(todo, sink.load, sink, sink.progress)
    return {task.name: sink.done[task.name] for task in tasks if task.name in sink.done}


def evaluate_toy(folder: Path) -> dict[str, object]:
    """The result of the toy task on this rank, as plain values and arrays."""
    with mock.patch.object(readers, "all_tasks", return_value={"toy": toy_task(folder)}):
        result = evaluate(colour_towers(), ["toy"], device="cpu", batch=2)["toy"]
    return {key: value.numpy() if isinstance(value, Tensor) else value for key, value in vars(result).items()}


def accuracy(acc1: float, trials: int = 100, corrupt: tuple[str, ...] = ()) -> Scores:
    """Scores of a task with one metric."""
    return Scores({"acc1": acc1}, {"acc1": 0.01}, {"acc1": trials}, trials, corrupt)
