"""The line about an evaluation over many tasks."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from disttempnet.evaluation import progress
from disttempnet.evaluation.progress import EvaluationProgress
from disttempnet.evaluation.tasks import find_task


def test_place_rate_time_left_and_average(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    keys = ("vtab/dtd", "vtab/flowers", "vtab/eurosat")
    tasks = [
        find_task(key).model_copy(update={"seconds": seconds})
        for key, seconds in zip(keys, (10.0, 20.0, 30.0), strict=True)
    ]
    shown = EvaluationProgress(tasks, {keys[0]: 0.2}, batch=100)
    shown.console = Console(file=io.StringIO(), width=200)
    shown.begin(tasks[1])
    shown.advance("images", 1, 4)
    now[0] = 5.0
    shown.advance("images", 3, 4)  # two batches in five seconds; three quarters of 20 parts of 50 are done in five
    task = shown.bars.tasks[0]
    assert task.description == f"2/3 {tasks[1].display}"
    assert task.fields["text"] == "40 images/s  ETA 0:00:12  average of 1/3 20.00"
    now[0] = 8.0
    shown.finish(tasks[1], 0.5, f"{tasks[1].main} 50.00")  # 20 of 50 parts in eight seconds
    line = shown.console.file.getvalue()  # type: ignore[attr-defined]
    what = f"2/3  {tasks[1].display}: {tasks[1].main} 50.00"
    assert line == f"{what}  (40 images/s  ETA 0:00:12  average of 2/3 35.00)\n"
