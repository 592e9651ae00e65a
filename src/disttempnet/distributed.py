"""The one file that talks to torch.distributed.

Everything else sees plain functions that are the identity in one process, so world size is invisible
to the losses, the data and the trainer. Launchers: torchrun and SLURM's srun, both read from the environment.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from disttempnet.errors import UserError

Result = TypeVar("Result")
PIECE = 64 << 20  # bytes that are sent at a time


def is_active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_active() else 0


def world_size() -> int:
    return dist.get_world_size() if is_active() else 1


def is_main() -> bool:
    return rank() == 0


def _launch_environment() -> tuple[int, int, int] | None:
    """(rank, world_size, local_rank) as torchrun or srun set them; None for a plain process."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0"))
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
            raise UserError(
                "several SLURM tasks, but MASTER_ADDR or MASTER_PORT is not set: export both in the batch script "
                '(MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1))'
            )
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", "0"))
    return None


@contextmanager
def session(timeout_minutes: float = 10.0) -> Iterator[torch.device]:
    """Join the process group that the launcher describes and yield this rank's device.

    One process without a launcher: no group is made. NCCL where there is a GPU for the rank, gloo otherwise.
    """
    launch = _launch_environment()
    local_rank = launch[2] if launch else 0
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} are visible; "
                "start at most one process a GPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if launch is None or launch[1] == 1:
        yield device
        return
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=launch[0],
        world_size=launch[1],
        timeout=datetime.timedelta(minutes=timeout_minutes),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()


def all_gather(local: Tensor) -> Tensor:
    """Rows of all ranks in rank order: [b, ...] → [K·b, ...], no gradient. Every rank passes the same shape."""
    local = local.detach()
    if world_size() == 1:
        return local
    local = local.contiguous()
    gathered = local.new_empty((world_size() * local.shape[0], *local.shape[1:]))
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13
    gather(gathered, local)
    return gathered


def all_sum(local: Tensor) -> Tensor:
    """The sum over ranks, no gradient; the input is not changed."""
    total = local.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on at least one rank; all ranks get the same answer."""
    if world_size() == 1:
        return flag
    return bool(all_sum(torch.tensor(float(flag), device=device)).item())


def gather_objects(value: object) -> list:
    """Small Python values of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


class OtherRankFailed(UserError):
    """What another rank raised in `together`."""


def together(action: Callable[[], Result]) -> Result:
    """Do something without collectives on every rank; where one fails, all of them raise, and none waits for it.

    Raises:
        OtherRankFailed: on the ranks that did not fail themselves.
    """
    if world_size() == 1:
        return action()
    try:
        result, error = action(), None
    except Exception as caught:  # of any kind: the others must hear of it
        result, error = None, caught
    told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    for number, message in enumerate(gather_objects(None if error is None else told)):
        if error is not None:
            raise error
        if message is not None:
            raise OtherRankFailed(f"rank {number}: {message}")
    return result  # type: ignore[return-value]  # there is one where nothing was raised


def file_of_main(path: Path) -> Iterator[bytes]:
    """The content of rank 0's file, piece by piece, on every rank; every rank has to take all pieces.

    Raises:
        UserError: rank 0 cannot read it. Every rank raises.
    """
    offset = 0
    while True:
        message: list[bytes | str] = [b""]
        if is_main():
            try:
                with path.open("rb") as file:
                    file.seek(offset)
                    message[0] = file.read(PIECE)
            except OSError as error:
                message[0] = f"{path}: cannot be read: {error.strerror}"
        if world_size() > 1:
            dist.broadcast_object_list(message, src=0)
        piece = message[0]
        if isinstance(piece, str):
            raise UserError(piece)
        if not piece:
            return
        offset += len(piece)
        yield piece


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def data_parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """DDP over all ranks; the module itself in one process, or where no parameter is trained (DDP refuses that)."""
    if world_size() == 1 or not any(p.requires_grad for p in module.parameters()):
        return module
    return nn.parallel.DistributedDataParallel(
        module,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )
