"""The loop of the README and of docs/objectives.md runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from disttempnet import build_loss
from disttempnet.losses.temperature.lead import FIRST_STEPS
from tests.losses.scenario import B, D, values

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["README.md", "docs/objectives.md"])
def test_the_loop_of_the_pages_runs_as_it_stands(page: str, tmp_path: Path) -> None:
    """Verbatim; the network is measured, then moves, and what was saved goes on where it was.

    Pairs are alike from the start (one tower, twice), so that the network starts after the first measured steps.
    """
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    torch.manual_seed(0)
    tower = nn.Linear(5, D)
    towers = nn.ModuleList([tower, tower])
    towers.forward = lambda images, texts: (towers[0](images), towers[1](texts))
    steps, rows = FIRST_STEPS, torch.randn(FIRST_STEPS * B, 5)
    loader = [(rows[ids], rows[ids], ids) for ids in torch.arange(len(rows)).split(B)]
    given = {"N": len(rows), "D": D, "device": "cpu", "model": towers, "loader": loader, "path": tmp_path / "saved.pt"}
    start = values(build_loss("disttempnet-v1", num_samples=len(rows), embed_dim=D))
    for epochs, moved in ((1, False), (2, True)):
        exec(block, given | {"epochs": epochs})
        saved = torch.load(tmp_path / "saved.pt", weights_only=True)
        loss = build_loss("disttempnet-v1", num_samples=len(rows), embed_dim=D)
        loss.load_state_dict(saved["loss"])
        assert any(not torch.equal(a, b) for a, b in zip(values(loss), start, strict=True)) == moved
        assert loss.epoch == epochs - 1
        assert loss.step == steps * epochs
