"""A run whose model reads colours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from disttempnet.data import open_index
from disttempnet.evaluation import tasks as readers
from disttempnet.report import read_run
from disttempnet.report.runs import examples
from disttempnet.training.checkpoint import Run
from tests.evaluation.toy import COLOURS, colour_towers, toy_task, write_shard
from tests.report.pages import EVIL
from tests.report.synthetic import write_run


@pytest.fixture
def toy_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose model reads colours, evaluated on and trained with images of one colour."""
    rows = [(colour, colour, colour) for colour in COLOURS]
    for split in ("val", "train"):
        (tmp_path / split).mkdir()
    write_shard(tmp_path / "val" / "0.tar", [*rows, ("green", EVIL, "red"), ("corrupt", "red", "red")])
    write_shard(tmp_path / "train" / "0.tar", [*rows, ("red", EVIL, "red"), ("corrupt", "red", "red")])
    monkeypatch.setattr(readers, "all_tasks", lambda: {"toy": toy_task(tmp_path / "val")})
    folder = write_run(tmp_path / "runs" / "a", tasks=("toy",), train=str(tmp_path / "train"))
    digest = open_index(str(tmp_path / "train"), progress=False).digest
    loss = torch.nn.Identity()
    # τ grows with the green part of the image and with the blue part of the text
    loss.temperatures = lambda images, texts, ids: torch.stack([images[:, 1], texts[:, 2]]) / 10

    def opened(record: object) -> Run:
        return Run(folder, read_run(folder).config, colour_towers(), loss, 40, 6, digest)

    monkeypatch.setattr(examples, "open_model", opened)
    return folder
