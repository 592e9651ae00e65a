"""The loop of the README and of docs/objectives.md runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from disttempnet import build_loss
from tests.losses.scenario import B, D, values

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["README.md", "docs/objectives.md"])
def test_the_loop_of_the_pages_runs_as_it_stands(page: str, tmp_path: Path) -> None:
    """Verbatim; the network waits for its epoch, then moves, and what was saved goes on where it was."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    torch.manual_seed(0)
    towers = nn.ModuleList([nn.Linear(5, D), nn.Linear(4, D)])
    towers.forward = lambda images, texts: (towers[0](images), towers[1](texts))
    loader = [(torch.randn(B, 5), torch.randn(B, 4), ids) for ids in torch.arange(2 * B).split(B)]
    given = {"N": 2 * B, "D": D, "device": "cpu", "model": towers, "loader": loader, "path": tmp_path / "saved.pt"}
    start = values(build_loss("disttempnet-v1", num_samples=2 * B, embed_dim=D))
    for epochs, moved in ((2, False), (3, True)):
        exec(block, given | {"epochs": epochs})
        saved = torch.load(tmp_path / "saved.pt", weights_only=True)
        loss = build_loss("disttempnet-v1", num_samples=2 * B, embed_dim=D)
        loss.load_state_dict(saved["loss"])
        assert any(not torch.equal(a, b) for a, b in zip(values(loss), start, strict=True)) == moved
        assert loss.epoch == epochs - 1
        assert loss.step == 2 * epochs
