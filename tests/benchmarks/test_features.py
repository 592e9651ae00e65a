"""The benchmark of cached features in small; docs/features.md shows what its recorded run gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.benchmark import benchmark
from tests.features.locked import Towers, write_towers

ROOT = Path(__file__).parents[2]


@pytest.fixture
def features(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = benchmark("features")
    monkeypatch.setattr(module, "BATCH", 32)
    return module


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Towers:
    return write_towers(tmp_path_factory.mktemp("towers"))


def model_of(towers: Towers) -> dict[str, Any]:
    own = {"name": towers.name, "image_pretrained": str(towers.image), "text_pretrained": str(towers.text)}
    return {**own, "lock_image": True, "lock_text": True}


def test_both_parts_run(features: Any, towers: Towers, tmp_path: Path) -> None:
    emoji = features.emoji(tmp_path, model_of(towers), 2, "embedded:emoji/val")
    assert emoji["pairs"] > 1000
    for name in ("uncached", "cached", "build"):
        assert emoji[name]["wall_s"] > 0
        assert emoji[name]["private_mb"] > 1
    assert emoji["uncached"]["cpu_s"] > emoji["cached"]["cpu_s"]
    assert emoji["times_as_fast"]["cpu_s"] == pytest.approx(
        emoji["uncached"]["cpu_s"] / emoji["cached"]["cpu_s"], abs=0.05
    )

    row = features.pairs(tmp_path, model_of(towers), 700)
    assert (row["pairs"], row["steps"]) == (700, 22)
    assert row["cpu_s"] > 0
    (run,) = (tmp_path / "runs").glob("pairs*/checkpoints/step-*")
    assert run.name == "step-00000022"


def test_the_page_shows_the_recorded_result(features: Any, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
    result = json.loads((ROOT / "benchmarks" / "results" / "features.json").read_text(encoding="utf-8"))
    features.show(result)
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 6
    assert [row for row in rows if row not in page] == []
    assert f"{result['emoji']['times_as_fast']['cpu_s']:.0f} times as fast in CPU time" in page
    assert f"--threads {result['machine']['threads']}`" in page


def test_threads_are_set_and_stated(
    features: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    for name in ("real_towers", "emoji", "pairs"):
        monkeypatch.setattr(features, name, lambda *_: {})
    out = tmp_path / "result.json"
    monkeypatch.setattr("sys.argv", ["features.py", "--only", "emoji", "--threads", "2", "--out", str(out)])
    try:
        features.main()
    finally:
        torch.set_num_threads(before)
    assert json.loads(out.read_text())["machine"]["threads"] == 2
