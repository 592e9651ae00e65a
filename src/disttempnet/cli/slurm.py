"""Batch scripts for SLURM, from one template: slurm/*.sbatch and `disttempnet launch`."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from disttempnet.config import Config
from disttempnet.errors import UserError

SCRIPT_TEMPLATE = Path(__file__).with_name("slurm.sbatch")
TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}")  # forms of sbatch: minutes, m:s, h:m:s, d-h, d-h:m, d-h:m:s
WORD = re.compile(r"[\w.,@+-]*")

USAGE = {
    "train": """# Trains a run on 4 nodes with 2 GPUs each, a process a GPU; flags of sbatch override this.
#   sbatch slurm/train.sbatch configs/cc12m_vitb32_v1_corrected.toml 'data.train=/data/cc12m/{00000..01242}.tar'
#   sbatch --nodes=1 --array=1-3 --job-name=demo slurm/train.sbatch configs/demo.toml     demo--seed-1 to -3
# `disttempnet launch` writes such a script for one run, and checks its config first. docs/cluster.md has more.""",
    "evaluate": """# Evaluates a run on 4 nodes with 2 GPUs each, a process a GPU; flags of sbatch override this.
#   sbatch --nodes=1 slurm/evaluate.sbatch runs/mine [--tasks TASK …]
#   sbatch --nodes=1 --array=1-3 slurm/evaluate.sbatch runs/demo                          runs/demo--seed-1 to -3""",
}


@dataclass(frozen=True)
class Job:
    """Settings of a SLURM job.

    Attributes:
        command: command of the processes.
        name: name of the job; with seeds, also prefix of the run names.
        nodes: number of nodes.
        gpus: GPUs of each node, a process for each.
        cpus: cores of each process.
        time: time limit in a form of sbatch.
        partition, account: empty = the site's default.
        seeds: a run for each, as a job array; empty = one run.

    Raises:
        UserError: a setting that sbatch would refuse.
    """

    command: Literal["train", "evaluate"] = "train"
    name: str = "disttempnet"
    nodes: int = 4
    gpus: int = 2
    cpus: int = 8
    time: str = "24:00:00"
    partition: str = ""
    account: str = ""
    seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if min(self.nodes, self.gpus) < 1:
            raise UserError(f"launch: --nodes {self.nodes} and --gpus {self.gpus} must be at least 1")
        if not TIME.fullmatch(self.time):
            raise UserError(f"launch: --time {self.time}: give minutes, hours:minutes:seconds or days-hours:minutes")
        for key in ("partition", "account"):
            if not WORD.fullmatch(getattr(self, key)):
                raise UserError(f"launch: --{key} {getattr(self, key)!r} is not a valid SLURM name")
        if any(seed < 0 for seed in self.seeds) or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"launch: --seeds {' '.join(map(str, self.seeds))}: give different integers from 0 on")


def published(command: Literal["train", "evaluate"]) -> str:
    """Return the text of slurm/COMMAND.sbatch, which passes its arguments on to the command."""
    return _render(Job(command), USAGE[command], "${PYTHON:-python}", "")


def script(job: Job, config_path: str, config: Config, overrides: Sequence[str]) -> str:
    """Return the batch script of a training run, or of a run for each seed.

    Args:
        job: nodes, GPUs, limits.
        config_path, overrides: arguments of `train`.
        config: the config that they give.

    Raises:
        UserError: the batch cannot be divided among that many processes, or into train.accumulate chunks.
    """
    processes = job.nodes * job.gpus
    if config.data.lanes % processes:
        raise UserError(
            f"launch: {job.nodes} nodes × {job.gpus} GPUs are {processes} processes, which cannot share data.lanes = "
            f"{config.data.lanes} evenly; set data.lanes to a multiple of {processes} that divides global_batch "
            f"{config.data.global_batch}"
        )
    rows = config.data.global_batch // processes
    if config.train.accumulate > rows:
        raise UserError(
            f"launch: train.accumulate = {config.train.accumulate} is more than the {rows} rows of a process"
        )
    given = [override.partition("=")[0].strip() for override in overrides]
    if job.seeds and "train.seed" in given:
        raise UserError("launch: --seeds and train.seed=… are both given; give one")
    kept = [text for key, text in zip(given, overrides, strict=True) if not (job.seeds and key == "name")]
    return _render(job, "", shlex.quote(sys.executable), shlex.join([config_path, *kept]) + " ")


def submit(text: str) -> str:
    """Submit a script with sbatch and return its output.

    Raises:
        UserError: sbatch is missing or refuses the script.
    """
    try:
        done = subprocess.run(["sbatch"], input=text, text=True, capture_output=True)
    except FileNotFoundError:
        raise UserError(
            "launch: sbatch was not found; run this on a login node of the cluster, or print the script with --dry-run"
        ) from None
    if done.returncode:
        raise UserError(f"launch: sbatch refused the script: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


def _render(job: Job, usage: str, python: str, arguments: str) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    template = environment.from_string(SCRIPT_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(job=job, usage=usage, python=python, arguments=arguments)
