"""Batch scripts, run against the stand-ins of conftest.py."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from disttempnet.config import CONFIG_FOLDER

DEBUG = str(CONFIG_FOLDER / "debug.toml")


def batch(text: str, *arguments: str, **variables: str) -> subprocess.Popen:
    """Run a script as SLURM runs it, on one node with two tasks."""
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "demo", "SLURM_CPUS_PER_TASK": "8", "SLURM_NTASKS": "2"}
    environment = {**os.environ, **job, "SLURM_JOB_NODELIST": "localhost", "OMP_NUM_THREADS": "1", **variables}
    Path("job.sbatch").write_text(text, encoding="utf-8")
    return subprocess.Popen(["bash", "job.sbatch", *arguments], env=environment, stdout=-1, stderr=-2, text=True)


def calls(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "srun.jsonl").read_text().splitlines()]
