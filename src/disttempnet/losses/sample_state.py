"""Tables with a few numbers for every sample and side, shared out over the ranks: owner = id mod K, slot = id div K.

Shapes: N samples, K ranks, B rows of the global batch, C columns. 8 bytes · C · N / K a rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from disttempnet import distributed

NEVER = float("-inf")  # log u of a sample that was not visited yet; also fills slots behind the last sample


class SampleState(nn.Module):
    """Columns of numbers for every sample, image and text side: log u, or a temperature and its momenta.

    Args:
        num_samples: N.
        columns: name → value that every sample starts with.

    Each rank holds only the samples it owns. The table is in `state_dict()`, with the world size it was written at,
    and moves with `.to()`, but it is no registered buffer: DDP broadcasts buffers from rank 0, at its construction
    in any case, and would overwrite what the other ranks own.

    Writing is in place and in fixed shapes: rows that another rank owns go to a spare last column, so that the
    device never waits and no row meets an owned one of the same slot.
    """

    def __init__(self, num_samples: int, columns: Mapping[str, float]) -> None:
        super().__init__()
        if num_samples < 1:
            raise ValueError(f"num_samples must be positive, got {num_samples}")
        self.num_samples = num_samples
        self.columns = dict(columns)
        self.world_size = distributed.world_size()
        self.rank = distributed.rank()
        slots = -(-num_samples // self.world_size)
        starts = torch.tensor([start for start in columns.values() for _ in range(2)], dtype=torch.float32)
        self._table = starts[:, None].repeat(1, slots + 1)

    @property
    def bytes_a_sample(self) -> int:
        """In float32, over all ranks."""
        return 4 * len(self._table)

    def local(self, column: str) -> Tensor:
        """This rank's part of a column [2, ceil(N / K)]: float32, and float64 from the first float64 write on."""
        row = 2 * list(self.columns).index(column)
        return self._table[row : row + 2, :-1]

    def read(self, ids: Tensor) -> Tensor:
        """The rows of the global batch, the same on every rank: ids int64 [B] → [2C, B]. One all-reduce.

        Image and text side of the first column, then of the second …
        """
        self._check(ids)
        owned = ids % self.world_size == self.rank
        mine = self._table[:, ids // self.world_size]
        return distributed.all_sum(torch.where(owned, mine, torch.zeros_like(mine)))

    def write(self, ids: Tensor, values: Tensor) -> None:
        """Store values [2C, B] of the global batch; every rank keeps those it owns.

        Equal ids must come with equal values, so that the order of writing does not matter.
        """
        if values.dtype == torch.float64 and self._table.dtype != torch.float64:
            self._table = self._table.double()
        owned = ids % self.world_size == self.rank
        spare = self._table.shape[1] - 1
        self._table[:, torch.where(owned, ids // self.world_size, spare)] = values.to(self._table.dtype)

    def _check(self, ids: Tensor) -> None:
        if distributed.world_size() != self.world_size:
            raise RuntimeError(
                f"the loss was built for {self.world_size} processes and now runs on {distributed.world_size()}: "
                "build it after torch.distributed is initialised"
            )
        self.check_ids(ids)

    @property
    def device(self) -> torch.device:
        return self._table.device

    def check_ids(self, ids: Tensor) -> None:
        """Raise IndexError where an id [n] lies outside the data set; on a GPU the device itself ends the process."""
        if ids.device.type != "cpu":  # a look would cost a synchronisation a step
            within = ((ids >= 0) & (ids < self.num_samples)).all()
            torch._assert_async(within, f"sample ids must lie in [0, {self.num_samples})")
        elif ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_samples:
            raise IndexError(
                f"sample ids must lie in [0, {self.num_samples}), got {int(ids.min())} to {int(ids.max())}: "
                "num_samples is the size of the data set, not of the batch"
            )

    def get_extra_state(self) -> dict[str, int]:
        return {"num_samples": self.num_samples, "world_size": self.world_size, "rank": self.rank}

    def set_extra_state(self, state: dict[str, int]) -> None:
        mine = self.get_extra_state()
        if state["num_samples"] != self.num_samples:
            raise RuntimeError(
                f"the state holds {state['num_samples']} samples, this loss has {self.num_samples}: another data set"
            )
        if state != mine:
            raise RuntimeError(
                f"the state was written by rank {state['rank']} of {state['world_size']} and this is rank "
                f"{self.rank} of {self.world_size}: collect all ranks' shards and call `redeal`"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SampleState:
        super()._apply(fn, recurse)
        moved = fn(self._table)
        # .half() and .bfloat16() are for parameters: at log u = 60 bf16 tells values apart by a quarter of a nat
        self._table = moved if moved.dtype in (torch.float32, torch.float64) else self._table.to(moved.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for column in self.columns:
            destination[prefix + column] = self.local(column).contiguous()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        incoming = {column: state_dict.pop(prefix + column, None) for column in self.columns}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for column, values in incoming.items():
            expected = self.local(column).shape
            if values is None:
                missing_keys.append(prefix + column)
            elif values.shape != expected:
                error_msgs.append(f"{prefix}{column}: shape {tuple(values.shape)}, expected {tuple(expected)}")
            else:
                self._table = self._table.to(values.dtype)
                self.local(column).copy_(values)


def follow(old: Tensor, log_g: Tensor, gamma: float) -> Tensor:
    """log((1−γ) u + γ g) from log u and log g of one shape.

    log g at the first visit (log u = −inf), and log u where the batch had nothing to say (log g = −inf).
    """
    kept = math.log1p(-gamma) if gamma < 1 else -math.inf
    blended = torch.logaddexp(old + kept, log_g + math.log(gamma))
    new = torch.where(old == NEVER, log_g, blended)
    return torch.where(log_g == -math.inf, old, new)


def redealt_from(old: int, rank: int, world_size: int) -> range:
    """The old ranks, of `old`, that hold samples which `rank` of `world_size` is to own: those of its residue."""
    common = math.gcd(old, world_size)
    return range(rank % common, old, common)


def redeal(shards: Mapping[int, Tensor], old: int, num_samples: int, rank: int, world_size: int) -> Tensor:
    """A column's shard of `rank` among `world_size` from those of `old` ranks.

    id = slot · K + rank on both sides; needs no table of all N samples. Slots behind the last sample hold −inf.

    Args:
        shards: old rank → its shard [2, ceil(N / old)], of all that `redealt_from` names.
    """
    slots = -(-num_samples // world_size)
    mine = next(iter(shards.values())).new_full((2, slots), NEVER)
    for old_rank in redealt_from(old, rank, world_size):
        ids = torch.arange(old_rank, max(num_samples, old_rank), old)  # empty where there are more ranks than samples
        take = ids[ids % world_size == rank]
        mine[:, take // world_size] = shards[old_rank][:, take // old]
    return mine


def _groups(ids: Tensor) -> Tensor:
    """A number in [0, B) for every row [B], equal where ids are.

    Fixed shapes only (sort, scatter): the host never waits for the device.
    """
    order = ids.argsort(stable=True)
    ordered = ids[order]
    starts = torch.ones_like(ordered)
    starts[1:] = (ordered[1:] != ordered[:-1]).long()
    group = torch.empty_like(ids)
    group[order] = starts.cumsum(0) - 1
    return group


def multiplicity(ids: Tensor) -> Tensor:
    """How often the id of every row comes in the batch, int64 [B]."""
    groups = _groups(ids)
    return torch.zeros_like(ids).scatter_add_(0, groups, torch.ones_like(ids))[groups]


def log_mean_over_equal_ids(ids: Tensor, log_g: Tensor) -> Tensor:
    """log of the mean of g over rows of equal id, for every row: ids [B], log_g [2, B] → [2, B]."""
    index = _groups(ids).expand_as(log_g)
    count = torch.zeros_like(log_g).scatter_add_(1, index, torch.ones_like(log_g))
    largest = torch.full_like(log_g, -torch.inf).scatter_reduce_(1, index, log_g, "amax")
    finite = torch.where(largest == -torch.inf, 0.0, largest)
    shifted = (log_g - finite.gather(1, index)).exp()
    total = torch.zeros_like(log_g).scatter_add_(1, index, shifted)
    return (finite + total.log() - count.log()).gather(1, index)


def mean_over_equal_ids(ids: Tensor, values: Tensor) -> Tensor:
    """The mean over rows of equal id, for every row: ids [B], values [2, B] → [2, B]."""
    index = _groups(ids).expand_as(values)
    count = torch.zeros_like(values).scatter_add_(1, index, torch.ones_like(values))
    return (torch.zeros_like(values).scatter_add_(1, index, values) / count).gather(1, index)
