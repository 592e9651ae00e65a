"""500 malformed commands, configs and small files over all commands: no traceback, no hang, no nonsense accepted.

Another draw: `FUZZ_SEED=7 FUZZ_COUNT=2000 python -m pytest -m slow tests/fuzz`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.cases import Case, draw
from tests.fuzz.material import write_material, write_runs

SEED, COUNT = int(os.environ.get("FUZZ_SEED", "2026")), int(os.environ.get("FUZZ_COUNT", "500"))
ROOT = Path(__file__).parents[2]


def fault(case: Case, outcome: dict[str, Any]) -> str | None:
    """What is wrong with an outcome, in words; None where nothing is."""
    said = outcome["out"] + outcome["err"]
    lines = [line for line in outcome["err"].splitlines() if line.strip()]
    if outcome["code"] is None:
        return "hangs"
    if "Traceback (most recent call last)" in said:
        return "traceback"
    if outcome["code"] not in (0, 1, 2):
        return f"exit code {outcome['code']}"
    if case.refused and outcome["code"] != 2:
        return "nonsense is accepted"
    if outcome["code"] == 2 and not (lines and ("disttempnet" in lines[-1] or lines[0].startswith("usage:"))):
        return "refused without a line that says why"
    if any(ord(letter) < 32 and letter not in "\n\r\t\b" for letter in outcome["err"].replace("\x1b[", "")):
        return "control characters reach the terminal"
    return None


def as_json(case: Case) -> dict[str, Any]:
    files = {name: None if content is None else b64encode(content).decode() for name, content in case.files.items()}
    return {"words": case.words, "files": files}


@pytest.mark.slow
def test_malformed_input_is_refused_in_one_line(tmp_path: Path) -> None:
    material, scratch = write_material(tmp_path / "material"), tmp_path / "scratch"
    scratch.mkdir()
    write_runs(material)
    cases = draw(COUNT, SEED, material)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.fuzz.server", str(material), str(scratch)],
        input=json.dumps([as_json(case) for case in cases]),
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
        check=True,
    )
    outcomes = json.loads(done.stdout)
    assert len(outcomes) == COUNT
    faults = [
        f"{number}: {what}: {case.words} {list(case.files)} -> {outcome['code']}\n    {outcome['err'].strip()[-600:]}"
        for number, (case, outcome) in enumerate(zip(cases, outcomes, strict=True))
        if (what := fault(case, outcome))
    ]
    assert not faults, f"{len(faults)} of {COUNT} (seed {SEED}):\n" + "\n".join(faults)


def test_a_fault_is_told_from_a_refusal() -> None:
    refusal = {"code": 2, "out": "", "err": "disttempnet: own.toml: no such key\n"}
    assert fault(Case([]), refusal) is None
    assert fault(Case([]), refusal | {"code": None}) == "hangs"
    assert fault(Case([]), {"code": 1, "out": "", "err": "Traceback (most recent call last):\n"}) == "traceback"
    assert fault(Case([]), refusal | {"code": -11}) == "exit code -11"
    assert fault(Case([], refused=True), refusal | {"code": 0}) == "nonsense is accepted"
    assert fault(Case([]), refusal | {"err": ""}) == "refused without a line that says why"
    assert fault(Case([]), refusal | {"err": "disttempnet: \x1b]52;c;x\x07"}) == "control characters reach the terminal"
