"""A cluster of stand-ins for SLURM's commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

SRUN = """
import json, os, subprocess, sys
with open("srun.jsonl", "a") as file:
    print(json.dumps({"arguments": sys.argv[1:], "cpus": os.environ["SRUN_CPUS_PER_TASK"]}), file=file)
if "FAKE_CODE" in os.environ:
    sys.exit(int(os.environ["FAKE_CODE"]))
words = [word for word in sys.argv[1:] if not word.startswith(("--kill", "--wait"))]
tasks = int(os.environ["SLURM_NTASKS"])
places = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_STEP_ID": "0"} for i in range(tasks)]
running = [subprocess.Popen(words, env={**os.environ, **place}) for place in places]
open("pids", "w").write(" ".join(str(one.pid) for one in running))
codes = [one.wait() for one in running]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""

SCONTROL = 'import sys; open("scontrol", "a").write(" ".join(sys.argv[1:]) + "\\n")'

SBATCH = 'import sys; open("submitted", "w").write(sys.stdin.read()); print("Submitted batch job 7")'


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, with commands on the path that stand for SLURM's."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH)):
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!{sys.executable}\n{text}", encoding="utf-8")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path
