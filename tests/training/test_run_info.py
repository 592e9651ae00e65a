"""run.json: facts of a run, its times, and what of the data is left out."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from disttempnet.errors import UserNotice
from disttempnet.training import run_info
from disttempnet.training.run_info import about_data, data_facts, process_provenance, read_facts


def test_the_time_of_a_run_never_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = iter([100.0, 160.0])
    monkeypatch.setattr(run_info.time, "monotonic", lambda: next(passed))
    clock = run_info.Clock()
    begun = clock._start
    ended = datetime.fromisoformat(clock.now())
    assert (ended - begun.replace(microsecond=0)).total_seconds() == 60


def test_many_damaged_shards_are_told_in_few_lines() -> None:
    class Damaged:
        usable_counts = np.array([3, 4])

        def problems(self) -> str:
            return "\n".join(f"{n}.tar: cut off" for n in range(1000))

        def notes(self) -> list[str]:
            return []

        def __len__(self) -> int:
            return 1234

    facts = data_facts(Damaged())
    assert facts["left_out"][18:] == [
        "18.tar: cut off",
        "19.tar: cut off",
        "and 980 lines more: disttempnet data index shows all",
    ]
    assert (
        about_data(data_facts(Damaged(), 5))[0] == "1,234 samples: 5 to train on, 2 beyond data.limit, 1,227 unusable"
    )
    assert about_data(facts)[:2] == ["1,234 samples: 7 to train on, 1,227 unusable", "0.tar: cut off"]


def test_damaged_facts_are_skipped_one_by_one(tmp_path: Path) -> None:
    facts = {"world_size": "2", "started": "yesterday", "finished": "2026-11-30T08:00:00+00:00", "num_samples": 7}
    (tmp_path / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    with pytest.warns(UserNotice, match=r"run.json: skipped: (world_size is \"2\"|started is \"yesterday\")") as told:
        assert read_facts(tmp_path) == {"finished": facts["finished"], "num_samples": 7}
    assert len(told) == 2
    assert read_facts(tmp_path / "nowhere") == {}


def test_provenance_names_versions_and_a_command_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/disttempnet", "train", "data.train=https://me:secret@host/x.tar"])
    found = process_provenance()
    assert found["versions"]["torch"] == torch.__version__
    assert found["command"].startswith("disttempnet train ")
    assert "secret" not in found["command"]
