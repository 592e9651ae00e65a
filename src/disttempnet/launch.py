"""Where this process stands among those of a run: what torchrun or SLURM's srun put into its environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from disttempnet.errors import UserError

PORTS = range(10_000, 30_000)  # below the ports that Linux gives to outgoing connections


class Launch(NamedTuple):
    """One process of a launch.

    Attributes:
        launcher: `torchrun` or `srun`.
        rank, world_size: this process among all.
        local_rank: this process among those of its node.
        address, port: where rank 0 is met.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int

    @property
    def place(self) -> str:
        """HOST:PORT of rank 0, an IPv6 address in brackets."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """What the launcher says, torchrun's variables before SLURM's; None for a process that was started alone.

    Raises:
        UserError: a launcher that says too little.
    """
    env = environment
    if "RANK" in env and "WORLD_SIZE" in env:
        if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
            raise UserError("RANK and WORLD_SIZE are set, but MASTER_ADDR or MASTER_PORT is not: start with torchrun")
        rank, size, local, port = (_number(env, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
        return Launch("torchrun", rank, size, local, env["MASTER_ADDR"], port)
    # a command of the batch script itself is alone, however many tasks its job has: only srun numbers a step
    if "SLURM_PROCID" not in env or "SLURM_STEP_ID" not in env:
        return None
    # a step may have fewer tasks than the job
    tasks = _number(env, "SLURM_STEP_NUM_TASKS") or _number(env, "SLURM_NTASKS") or 1
    if tasks == 1:
        return None
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    address = env.get("MASTER_ADDR") or first_host(nodes)
    if not address:
        raise UserError("several SLURM tasks, but neither SLURM_JOB_NODELIST nor MASTER_ADDR is set: start with srun")
    rank, local, job, step = (_number(env, f"SLURM_{name}") for name in ("PROCID", "LOCALID", "JOB_ID", "STEP_ID"))
    port = _number(env, "MASTER_PORT") or PORTS[(job + 1009 * step) % len(PORTS)]
    return Launch("srun", rank, tasks, local, address, port)


def _number(env: Mapping[str, str], name: str) -> int:
    """A variable's number; 0 where it is empty or not set."""
    value = env.get(name) or "0"
    if not value.isdecimal():
        raise UserError(f"the environment says {name}={value}, which is no number")
    return int(value)


def first_host(nodes: str) -> str:
    """The first host of SLURM's compact list: `node[01-04,07],login` → `node01`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0]) if first else ""


def gpu_of(launch: Launch | None, visible: int) -> int:
    """The number of this process's GPU among those that it sees.

    Raises:
        UserError: more processes on this node than GPUs.
    """
    local = launch.local_rank if launch else 0
    if launch and launch.launcher == "srun" and visible == 1:
        return 0  # --gpus-per-task shows each task its own; NCCL refuses two processes on one
    if local >= visible:
        raise UserError(f"local rank {local} has no GPU: {visible} are visible; start at most one process a GPU")
    return local
