"""Rank and world size of this process, from the variables of torchrun, mpirun or SLURM's srun."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple
from zlib import crc32

from disttempnet.errors import UserError
from disttempnet.io.ranges import Range, integers

PORT = integers(1, 65_535)
WORLD_SIZES = integers(1, 1_000_000)
PORTS = range(10_000, 30_000)  # below the ports that Linux gives to outgoing connections


class Launch(NamedTuple):
    """One process of a launch.

    Attributes:
        launcher: `torchrun`, `mpirun` or `srun`.
        rank, world_size: this process among all.
        local_rank: this process among those of its node.
        address, port: of rank 0.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int

    @property
    def endpoint(self) -> str:
        """HOST:PORT of rank 0, an IPv6 address in brackets."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


LOCAL_WORLD_SIZES = (
    "LOCAL_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
)  # srun binds its tasks to cores
ALONE = Launch("", 0, 1, 0, "", 0)  # the only process of a launcher


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """Read the launcher's variables: torchrun, then mpirun, then SLURM's srun; None for a single process.

    An empty variable counts as not set.

    Raises:
        UserError: variables are missing or contradict each other.
    """
    env = {name: value for name, value in environment.items() if value}
    for read in (_torchrun, _open_mpi, _srun, _pmi):
        if launch := read(env):
            return None if launch is ALONE else launch
    return None


def local_processes(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of processes on this node, which share its cores; 1 if the launcher does not tell."""
    env = {name: value for name, value in environment.items() if value}
    return max(_number(env, name, WORLD_SIZES) if name in env else 1 for name in LOCAL_WORLD_SIZES)


def _torchrun(env: Mapping[str, str]) -> Launch | None:
    if "RANK" not in env and "WORLD_SIZE" not in env:
        return None
    rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE", WORLD_SIZES) if "WORLD_SIZE" in env else 1
    if "RANK" not in env or "WORLD_SIZE" not in env:
        if rank or size > 1:
            raise UserError("one of RANK and WORLD_SIZE is set, the other is not: start with torchrun, or unset it")
        return None
    if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
        if size > 1:
            raise UserError("RANK and WORLD_SIZE are set, but MASTER_ADDR or MASTER_PORT is not: start with torchrun")
        return ALONE
    port = _number(env, "MASTER_PORT", PORT)
    return _checked(Launch("torchrun", rank, size, _number(env, "LOCAL_RANK"), env["MASTER_ADDR"], port))


def _open_mpi(env: Mapping[str, str]) -> Launch | None:
    """Read Open MPI's variables; before SLURM's, as mpirun inside a job passes those on, too."""
    job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid", "")
    world = "OMPI_COMM_WORLD_"
    return _mpi(env, f"{world}RANK", f"{world}SIZE", f"{world}LOCAL_RANK", f"{world}LOCAL_SIZE", job)


def _pmi(env: Mapping[str, str]) -> Launch | None:
    """Read the variables of MPICH and Intel MPI; after SLURM's, as srun --mpi=pmi2 sets these as well."""
    return _mpi(env, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", env.get("PMI_JOBID", ""))


def _mpi(env: Mapping[str, str], rank: str, size: str, local_rank: str, local_size: str, job: str) -> Launch | None:
    if rank not in env or size not in env:
        return None
    processes = _number(env, size, WORLD_SIZES)
    if processes == 1:
        return ALONE
    address = env.get("MASTER_ADDR") or ("127.0.0.1" if _number(env, local_size) == processes else "")
    if not address:
        raise UserError(
            f"{size}={processes} on several nodes, but MASTER_ADDR is not set: "
            "export MASTER_ADDR=HOST (of rank 0) and MASTER_PORT=29500 to all processes"
        )
    port = _number(env, "MASTER_PORT", PORT) if "MASTER_PORT" in env else PORTS[crc32(job.encode()) % len(PORTS)]
    return _checked(Launch("mpirun", _number(env, rank), processes, _number(env, local_rank), address, port))


def _srun(env: Mapping[str, str]) -> Launch | None:
    # only srun sets a step: a command of the batch script itself is a single process, however many tasks the job has
    if "SLURM_PROCID" not in env or "SLURM_STEP_ID" not in env:
        return None
    # a step may have fewer tasks than the job
    tasks = _number(env, "SLURM_STEP_NUM_TASKS") or _number(env, "SLURM_NTASKS") or 1
    if tasks == 1:
        return ALONE
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    address = env.get("MASTER_ADDR") or first_host(nodes)
    if not address:
        raise UserError("several SLURM tasks, but neither SLURM_JOB_NODELIST nor MASTER_ADDR is set: start with srun")
    rank, local, job, step = (_number(env, f"SLURM_{name}") for name in ("PROCID", "LOCALID", "JOB_ID", "STEP_ID"))
    given = "MASTER_PORT" in env
    port = _number(env, "MASTER_PORT", PORT) if given else PORTS[(job + 1009 * step) % len(PORTS)]
    return _checked(Launch("srun", rank, tasks, local, address, port))


def _number(env: Mapping[str, str], name: str, allowed: Range | None = None) -> int:
    """Return the number in a variable; 0 if it is not set."""
    value = env.get(name, "0")
    if not (value.isascii() and value.isdecimal()) or len(value) > 18:
        raise UserError(f"the environment has {name}={value}, which is not a number")
    try:
        return int(allowed.check(int(value))) if allowed else int(value)
    except ValueError as error:
        raise UserError(f"the environment has {name}={value}: {error}") from None


def _checked(launch: Launch) -> Launch:
    if launch.rank >= launch.world_size:
        raise UserError(
            f"the environment of {launch.launcher} has rank {launch.rank} of {launch.world_size}: ranks count from 0"
        )
    return launch


def first_host(nodes: str) -> str:
    """Return the first host of SLURM's compact list: `node[01-04,07],login` → `node01`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0]) if first else ""


def gpu_of(launch: Launch | None, visible: int) -> int:
    """Return the index of this process's GPU among the visible ones.

    Raises:
        UserError: more processes on this node than GPUs.
    """
    local = launch.local_rank if launch else 0
    if launch and launch.launcher == "srun" and visible == 1:
        return 0  # --gpus-per-task shows each task its own; NCCL refuses two processes on one
    if local >= visible:
        raise UserError(f"local rank {local} has no GPU: {visible} are visible; start at most one process per GPU")
    return local
