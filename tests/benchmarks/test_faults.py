"""The harness of faults, in small; docs/reliability.md shows what its recorded run of all kinds gave."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("faults")


@pytest.mark.slow
def test_runs_that_are_disturbed_end_like_the_undisturbed(
    faults: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes and one; the seed draws the moments."""
    for module in (faults, importlib.import_module("faulty_run")):
        monkeypatch.setattr(module, "STEPS", 20)
    kinds = ["kill", "write", "commit", "damage"]
    launchers = {"alone": 1, "srun": 1}
    trials = list(faults.run_trials(tmp_path, seed=0, count=4, only=kinds, jobs=2, launchers=launchers))
    assert [trial["wrong"] for trial in trials] == [[]] * 4
    assert {fault["kind"] for trial in trials for fault in trial["faults"]} == set(kinds)
    for fault in (fault for trial in trials for fault in trial["faults"] if fault["kind"] != "damage"):
        assert 0 <= fault["repeated"] <= faults.EVERY


def test_the_result_says_of_which_revision_it_is(faults: Any) -> None:
    about = faults.machine()
    assert about["torch"] == torch.__version__
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert about["git"].rstrip("+") == head.stdout.strip()  # both empty where this is no checkout


@pytest.mark.slow
def test_every_kind_of_fault(faults: Any, tmp_path: Path) -> None:
    trials = list(faults.run_trials(tmp_path, seed=1000, count=3 * len(faults.KINDS), jobs=2))
    assert [trial["wrong"] for trial in trials] == [[]] * len(trials)
    assert {trial["kind"] for trial in trials} == set(faults.KINDS)


def test_the_page_shows_the_recorded_result(faults: Any) -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    recorded = json.loads((ROOT / "benchmarks" / "results" / "faults.json").read_text(encoding="utf-8"))
    trials = recorded["trials"]
    assert len(trials) >= 50
    assert [trial["wrong"] for trial in trials] == [[]] * len(trials)
    assert {trial["kind"] for trial in trials} == set(faults.KINDS)
    assert [row for row in faults.summary(trials) if row not in page] == []
    assert f"torch {recorded['torch']}" in page
