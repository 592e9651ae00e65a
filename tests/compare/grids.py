"""Grid files for tests of comparisons."""

from __future__ import annotations

import json
from pathlib import Path

GRID = """
config = "debug.toml"
seeds = [1, 2]
[common]
eval.tasks = ["emoji-concepts"]
"data.limit" = 64
[runs.clip]
loss = { name = "clip" }
[runs.v1]
loss = { name = "disttempnet-v1", rho = 2.0 }
"""


def write(folder: Path, text: str = GRID, out: str = "") -> Path:
    path = folder / "grid.toml"
    path.write_text(f"out = {json.dumps(out or str(folder / 'out'))}\n{text}", encoding="utf-8")
    return path


def losses(run: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(line["step"], line["loss"]) for line in lines]
