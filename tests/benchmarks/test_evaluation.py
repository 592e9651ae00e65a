"""Our sides of the evaluation's benchmarks run, and docs/evaluation.md shows what their recorded results hold."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from disttempnet.evaluation.datasets.open import load_task
from disttempnet.evaluation.tasks import all_tasks, find_task
from tests.benchmarks.benchmark import benchmark
from tests.evaluation.dataroot import EXPECTED, write_data_root
from tests.evaluation.toy import meaning_towers

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def recorded(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_parity_as_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    result = recorded("parity")
    benchmark("parity_clip_benchmark").show(result)
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 5
    assert [row for row in rows if row not in PAGE] == []
    assert all(one["largest difference"] <= 1e-6 for one in result["comparisons"].values())
    assert all(one["tasks"] == 40 for one in result["comparisons"].values())
    assert result["versions"]["clip-benchmark"]["clip-benchmark"] == "1.6.2"


def test_speed_as_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    result = recorded("evaluation")
    benchmark("evaluation").show(result)
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 5
    assert [row for row in rows if row not in PAGE] == []
    assert result["clip-benchmark / ours, cpu"] >= 3
    assert result["clip-benchmark / ours, texts"] >= 2
    short = recorded("evaluation_16")
    assert f"it is {short['clip-benchmark / ours, cpu']} times the" in PAGE
    assert max(one["largest difference of a metric"] for one in (result, short)) <= 1e-6


def test_our_side_of_parity(tmp_path: Path) -> None:
    parity = benchmark("parity_clip_benchmark")
    write_data_root(tmp_path)
    mine = parity.ours(tmp_path, tmp_path / "out", meaning_towers())
    expected = {key: {name: v for name, v in m.items() if name != "main_metric"} for key, m in EXPECTED.items()}
    found = parity.compare(mine, expected)
    assert found["tasks"] == 40
    assert found["metrics"] == sum(len(metrics) for metrics in expected.values())
    assert found["beyond tolerance"] == {}
    expected["vtab/dtd"]["acc1"] += 2e-6
    expected["wilds/fmow"]["acc_region:2"] = 0.0  # the group is empty
    gaps = parity.compare(mine, expected)["beyond tolerance"]
    assert gaps == {"vtab/dtd acc1": pytest.approx(2e-6), "wilds/fmow acc_region:2": math.inf}


def test_the_timed_root_has_the_true_classes_and_templates(tmp_path: Path) -> None:
    benchmark("evaluation").write_root(tmp_path, 20_000)
    for key, task in all_tasks().items():
        if not task.below_root:
            continue
        data = load_task(task, tmp_path)
        assert len(data.samples) >= 12
        assert data.broken == ()
        if task.classes:
            assert (key, len(data.class_names)) == (key, task.classes)
            assert (key, len(data.heads[0].templates)) == (key, task.prompts or 1)
    family = ("imagenet1k", "imagenet_sketch", "imagenetv2", "imagenet-a", "imagenet-o", "imagenet-r")
    names = [load_task(find_task(key), tmp_path).class_names for key in family]
    assert [len(set(names[0]) & set(other)) for other in names] == [998, 998, 998, 200, 200, 200]  # two occur twice
