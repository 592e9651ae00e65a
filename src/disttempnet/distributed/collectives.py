"""Collectives as plain functions, which are the identity in one process.

So world size is invisible to the losses, the data and the trainer. Only this file and fsdp.py import torch.distributed.
launcher.py reads the variables of torchrun, mpirun and srun.
"""

from __future__ import annotations

import datetime
import faulthandler
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.tensor import DTensor

from disttempnet.distributed.launcher import Launch, gpu_of, launched
from disttempnet.distributed.watchdog import Watch
from disttempnet.errors import Preempted, UserError

SILENCE = 1 / 5  # of the timeout: a rank without a heartbeat for so long counts as lost (two of ten minutes)
LEAVE_SECONDS = 120.0  # for a rank that has failed to end; then it is ended, with the stacks of its threads
NEWS_SECONDS = 5.0  # from a failed collective to the news which rank has failed, at most

_T = TypeVar("_T")
BROADCAST_BYTES = 64 << 20  # of a file, in one message
_collectives = 0  # entered by this process: the watchdog finds by it which rank the others wait for


def is_active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_active() else 0


def world_size() -> int:
    return dist.get_world_size() if is_active() else 1


def is_main() -> bool:
    return rank() == 0


@contextmanager
def session(timeout_minutes: float = 10.0) -> Iterator[torch.device]:
    """Join the process group that the launcher describes, and yield this rank's device.

    A single process makes no group. The backend is NCCL if the rank has a GPU, else gloo. A rank that fails or dies
    ends all others, each with one line that names it.

    Args:
        timeout_minutes: how long a collective waits for other ranks.

    Raises:
        UserError: the processes do not find each other, or lose one.
    """
    # Choose the device; a single process is done.
    launch = launched()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", gpu_of(launch, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    if launch is None or launch.world_size == 1:
        yield device
        return

    # Join the group, and watch the other ranks. At the end, leave in order or tell the others why.
    _join(launch, device, timeout_minutes)
    watch = _watch(launch, 60 * timeout_minutes)
    try:
        yield device
    except Preempted:  # all ranks end in order
        watch.leave()
        dist.destroy_process_group()
        raise
    except BaseException as error:
        lost = _lost_others(error, watch)
        faulthandler.dump_traceback_later(LEAVE_SECONDS, exit=True)  # teardown has hung where other ranks were gone
        watch.leave(lost or f"{type(error).__name__}: {error}".removeprefix("UserError: ").partition("\n")[0])
        if device.type == "cpu":  # NCCL would wait for ranks that may be gone; the process ends now
            dist.destroy_process_group()
        if lost:
            raise UserError(lost) from None
        raise
    else:
        watch.leave()
        dist.destroy_process_group()


def _join(launch: Launch, device: torch.device, timeout_minutes: float) -> None:
    """Join the process group; raise UserError if not all processes are met."""
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            # torchrun keeps a store of its own, which env:// finds
            init_method="env://" if launch.launcher == "torchrun" else f"tcp://{launch.endpoint}",
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=datetime.timedelta(minutes=timeout_minutes),
            device_id=device if device.type == "cuda" else None,
        )
    except RuntimeError as error:
        raise UserError(
            f"rank {launch.rank} did not meet all {launch.world_size} processes at {launch.endpoint} within "
            f"{timeout_minutes:g} minutes: did all start (srun, torchrun), and is the port free and open? "
            f"({_first_line(error)})"
        ) from None


def _watch(launch: Launch, timeout: float) -> Watch:
    """Connect this rank with rank 0, which reports ranks that die, hang or fall silent."""
    limits: dict[str, Any] = {"silence": timeout * SILENCE, "timeout": timeout, "progress": lambda: _collectives}
    watch = Watch(0, launch.world_size, launch.address, **limits) if launch.rank == 0 else None
    try:
        port, token, addresses = gather_objects((watch.port, watch.token, watch.addresses) if watch else None)[0]
        trouble = ""
        try:
            watch = watch or Watch(
                launch.rank, launch.world_size, launch.address, port, token, addresses=addresses, **limits
            )
        except OSError as error:
            trouble = f"rank {launch.rank} cannot reach rank 0 at {launch.address}:{port}: {error}"
        trouble = next(filter(None, gather_objects(trouble)), "")
    except RuntimeError as error:
        raise UserError(f"rank {launch.rank} lost the other ranks at once: {_first_line(error)}") from None
    if trouble or watch is None:  # on every rank: none waits for the one that is not watched
        raise UserError(trouble)
    return watch


def _lost_others(error: BaseException, watch: Watch) -> str:
    """Return which rank was lost if that is why a collective failed here; else empty."""
    if not isinstance(error, RuntimeError) or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
        return ""
    return watch.news(NEWS_SECONDS) or f"rank {rank()} lost the other ranks: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def describe(device: torch.device, timeout_minutes: float) -> str:
    """Return a line about the processes: number, nodes, device, backend. Every rank calls this."""
    hosts = gather_objects(platform.node())
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    if world_size() == 1:
        return f"one process, {kind}"
    launch, nodes = launched(), len(set(hosts))
    where = "1 node" if nodes == 1 else f"{nodes} nodes"
    if launch:
        where += f" ({launch.launcher})"
    return (
        f"{world_size()} processes on {where}, {kind}, {dist.get_backend()}, timeout {timeout_minutes:g} minutes; "
        f"rank 0 is {device} on {hosts[0]}"
    )


def _count_collective() -> None:
    global _collectives
    _collectives += 1


def all_gather(local: Tensor) -> Tensor:
    """Gather the rows of all ranks, in rank order: [b, ...] → [K·b, ...], no gradient; equal shapes on all ranks."""
    local = local.detach()
    if world_size() == 1:
        return local
    _count_collective()
    local = local.contiguous()
    gathered = local.new_empty((world_size() * local.shape[0], *local.shape[1:]))
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13
    gather(gathered, local)
    return gathered


def ring(local: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (rank, rows [b, ...]) of every rank, this one's first; equal shapes on all ranks, no gradient.

    The next rows are on their way while the last ones are used. Every rank takes all of them, in its own order: rank r
    sees r, r − 1, …, r − K + 1. Rows are overwritten two steps later; besides `local` two blocks are held at most.
    """
    size, own = world_size(), rank()
    held, spare = local.detach().contiguous(), None
    if size > 1:
        _count_collective()
    for step in range(size - 1):
        arriving = torch.empty_like(held) if spare is None else spare
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, held, (own + 1) % size),
                dist.P2POp(dist.irecv, arriving, (own - 1) % size),
            ]
        )
        yield (own - step) % size, held
        for work in works:
            work.wait()
        spare = None if step == 0 else held  # the caller's own rows are not overwritten
        held = arriving
    yield (own + 1) % size, held


def first_rows(local: Tensor, count: int) -> Tensor:
    """Return the first `count` rows of the global batch, on every rank; no more than that is exchanged."""
    start = rank() * len(local)
    rows = local.new_zeros(count, *local.shape[1:])
    own = local.detach()[: max(0, count - start)]
    rows[start : start + len(own)] = own
    return all_sum(rows)


def all_sum(local: Tensor) -> Tensor:
    """Return the sum over ranks, without gradient; the input is not changed."""
    total = local.detach().clone()
    if world_size() > 1:
        _count_collective()
        dist.all_reduce(total)
    return total


def all_mean(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the means over ranks of several tensors, in one collective, no gradient; equal shapes on all ranks."""
    if world_size() == 1:
        return parts
    total = all_sum(torch.cat([part.reshape(-1) for part in parts])) / world_size()
    pieces = total.split([part.numel() for part in parts])
    return [piece.view_as(part).to(part.dtype) for piece, part in zip(pieces, parts, strict=True)]


def largest(value: int, device: torch.device) -> int:
    """Return the largest value of all ranks, on every rank."""
    if world_size() == 1:
        return value
    _count_collective()
    result = torch.tensor(value, device=device)
    dist.all_reduce(result, dist.ReduceOp.MAX)
    return int(result)


def gather_objects(value: object) -> list:
    """Return small Python values of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    _count_collective()
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


class OtherRankFailed(UserError):
    """Error that another rank raised in `together`."""


def together(action: Callable[[], _T]) -> _T:
    """Call a function on every rank; if one rank fails, all raise.

    Args:
        action: contains no collectives.

    Raises:
        OtherRankFailed: on the ranks that did not fail themselves.
    """
    if world_size() == 1:
        return action()
    try:
        result, error = action(), None
    except Exception as caught:  # of any kind: the others must be told
        result, error = None, caught
    told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    for number, message in enumerate(gather_objects(None if error is None else told)):
        if error is not None:
            raise error
        if message is not None:
            raise OtherRankFailed(f"rank {number}: {message}")
    return result  # type: ignore[return-value]  # set if nothing was raised


def file_of_main(path: Path) -> Iterator[bytes]:
    """Yield the content of rank 0's file in pieces, on every rank; every rank has to take all pieces.

    Raises:
        UserError: rank 0 cannot read it; every rank raises.
    """
    offset = 0
    while True:
        message: list[bytes | str] = [b""]
        if is_main():
            try:
                with path.open("rb") as file:
                    file.seek(offset)
                    message[0] = file.read(BROADCAST_BYTES)
            except OSError as error:
                message[0] = f"{path}: cannot be read: {error.strerror}"
        if world_size() > 1:
            _count_collective()
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
        _count_collective()
        dist.barrier()


def data_parallel(module: nn.Module, device: torch.device, half: bool = False) -> nn.Module:
    """Wrap a module in DDP over all ranks.

    It is returned as it is in one process, if it has no parameter to train (DDP refuses that), and if its parameters
    are sharded: FSDP2 exchanges their gradients.

    Args:
        module: the towers.
        device: of this rank.
        half: exchange gradients in bf16: half the bytes. They are rounded before they are summed, and kept in float32.
    """
    if world_size() == 1:
        return module
    trained = [p for p in module.parameters() if p.requires_grad]
    if trained and not any(isinstance(p, DTensor) for p in trained):
        module = nn.parallel.DistributedDataParallel(
            module,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
        if half:
            # by its name DDP takes its own hook on GPUs only, and gloo sums bf16 too
            module.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
    # its forward pass begins with torch's own collectives: buffers of rank 0, or shards of parameters
    module.register_forward_pre_hook(lambda *_: _count_collective())
    return module


def without_exchange(module: nn.Module) -> AbstractContextManager:
    """Accumulate gradients of a module from `data_parallel` on this rank, without exchange, inside a `with`.

    A sharded module exchanges anyway: its full gradients would not fit.
    """
    return module.no_sync() if isinstance(module, nn.parallel.DistributedDataParallel) else nullcontext()
