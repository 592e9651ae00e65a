"""Benchmarks run, and docs/performance.md shows what the loader's recorded result holds."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.benchmark import benchmark
from tests.data.pictures import photo

ROOT = Path(__file__).parents[2]


@pytest.fixture
def loader() -> Any:
    return benchmark("loader")


def test_the_page_shows_the_recorded_result(loader: Any, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    recorded = json.loads((ROOT / "benchmarks" / "results" / "loader.json").read_text(encoding="utf-8"))
    for name in loader.SETS:
        loader.show(name, recorded[name])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 10
    assert [row for row in rows if row not in page] == []
    for side in ("open_clip", "ours"):
        for package in ("torch", "torchvision", "pillow"):
            assert recorded["500x375"][side]["versions"][package].partition("+")[0] in page


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_our_side_of_the_benchmark_runs(loader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "BATCH", 4)
    photos = tmp_path / "photos"
    photos.mkdir()
    photo(520, 400).save(photos / "one.jpg")
    loader.write_shards(tmp_path, photos, 16)
    batches, parts, versions = loader.own_loader("ours", tmp_path / "341x256", 16)
    cost = loader.one_pass(batches)
    assert cost["images"] == 16
    assert 0 <= cost["cpu"] < 60
    steps = parts()
    assert {"read", "decode", "crop and resize", "tokenise", "collate"} < steps.keys()
    assert steps["decode"] > 0
    assert versions["simplejpeg"][0].isdigit()


def test_steps_in_chunks_are_measured() -> None:
    accumulate = benchmark("accumulate")
    whole, chunks = (accumulate.measure("debug.toml", 32, chunks) for chunks in (1, 4))
    assert chunks["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    assert whole["seconds"] > 0
    assert whole["MB"] >= 0
    rounds = [{"MB": 2.04, "seconds": 3.0, "loss": 0.5}, {"MB": 4.0, "seconds": 1.0, "loss": 0.5}]
    assert accumulate.summary(rounds) == {"MB": 2.0, "seconds": 1.0, "loss": 0.5}


def test_both_ways_of_the_columns_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "ring.py"), "--ranks", "2", "--rows", "16", "--rounds", "1"]
    subprocess.run([*command, "--out", str(tmp_path / "ring.json")], check=True, capture_output=True)
    ring = benchmark("ring")
    (found,) = json.loads((tmp_path / "ring.json").read_text(encoding="utf-8"))["sizes"]
    assert min(found[way]["seconds"] for way in ring.WAYS) > 0
    assert found["times_as_long"] > 0
    ring.show(json.loads((ROOT / "benchmarks" / "results" / "ring.json").read_text(encoding="utf-8")))
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert [row for row in capsys.readouterr().out.splitlines() if row not in page] == []


def test_a_run_at_scale_is_computed_and_simulated() -> None:
    scale = benchmark("scale")
    found = scale.simulate(gpus=8, samples=400_000)
    assert found["state, MB a rank"] == 8 * 400_000 / 8 / 1e6
    assert found["8 → 4 ranks: files that a rank reads"] == 2
    assert found["8 → 7 ranks: files that a rank reads"] == 8
    result = json.loads((ROOT / "benchmarks" / "results" / "scale.json").read_text(encoding="utf-8"))
    assert {name: scale.on_paper(*case(name), Namespace(**result["setting"])) for name in result["paper"]} == result[
        "paper"
    ]
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    rows = {"towers, ms": "towers", "step, ms": "step"}
    alike = ("of it the towers, %", "read from storage, GB/s a node", "read from storage, GB/s in all")
    for row, key in (rows | dict(zip(alike, alike, strict=True))).items():
        shown = next(line for line in page.splitlines() if line.startswith(f"| {row} |"))
        numbers = [float(cell) for cell in shown.split("|")[2:-1]]
        assert numbers == pytest.approx([one[key] for one in result["paper"].values()], rel=0.02)


def case(name: str) -> tuple[str, int]:
    model, rows = name.removesuffix(" a GPU").split(", ")
    return model, int(rows)
