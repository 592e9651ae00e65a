"""Tables with a few numbers for every sample and side: complete on every rank, or sharded over the ranks.

Shapes: N samples, K ranks that a table is sharded over (1: every rank holds all of it), B rows of the global batch,
C columns. Sharded: owner = id mod K, slot = id div K. 8 bytes · C · N / K a rank.

Complete tables stay equal without communication: every rank computes the numbers of the global batch anyway. They cost
memory and are right in every framework: `state_dict()` is the same on all ranks, whichever of them saves it.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from disttempnet import distributed
from disttempnet.distributed import fsdp
from disttempnet.errors import UserNotice
from disttempnet.losses.schedule import Shares

NEVER = float("-inf")  # log u of a sample that was never visited; also fills slots behind the last sample
LARGE = 2 << 30  # bytes of a complete table on every rank, from which on a warning suggests sharding
GATHER_BYTES = 64 << 20  # bytes that a rank receives at a time while a sharded table is gathered
_SHARD_NAME = re.compile(r"(.+):(\d+)-of-(\d+)")  # column, rank, K


class SampleState(nn.Module):
    """Columns of numbers for every sample, image and text side: log u, or a temperature and its moments.

    Args:
        num_samples: N.
        columns: name → value that every sample starts with.
        sharded: whether each rank holds only the samples that it owns; else every rank holds all of them.

    The columns are in `state_dict()` and move with `.to()`, but are no registered buffers: DDP broadcasts those from
    rank 0, at its construction in any case and before every step by default. That would overwrite the other ranks'
    shards, and send a complete table every step.

    In `state_dict()` a complete column is called `log_u` and a rank's shard `log_u:0-of-2`, so that a tool that writes
    one file for all ranks cannot mix shards up. `load_state_dict` takes a complete column at any world size, and shards
    of any world size if all that are needed are there.

    Writing is in place and in fixed shapes, so that the host never waits for the device. Rows whose new values are not
    finite keep their old values and are counted.

    Attributes:
        rows_not_finite: 0-d int64, rows of either side that kept their old values for that reason, since the process
            began; the same on every rank.

    Example:
        >>> state = SampleState(num_samples=5, columns={"log_u": NEVER})
        >>> state.write(torch.tensor([3, 0]), torch.tensor([[0.5, 1.0], [2.0, 3.0]]))
        >>> state.read(torch.tensor([0, 1, 3]))  # image side, text side
        tensor([[1.0000,   -inf, 0.5000],
                [3.0000,   -inf, 2.0000]])
    """

    def __init__(self, num_samples: int, columns: Mapping[str, float], sharded: bool = False) -> None:
        super().__init__()
        if num_samples < 1:
            raise ValueError(f"num_samples must be positive, got {num_samples}")
        self.num_samples = num_samples
        self.columns = dict(columns)
        self.sharded = sharded
        self.ranks, self.rank = (distributed.world_size(), distributed.rank()) if sharded else (1, 0)
        self.rows_not_finite = torch.zeros((), dtype=torch.int64)
        for column, start in columns.items():  # each in memory of its own: safetensors saves no views
            setattr(self, self._key(column), torch.full((2, -(-num_samples // self.ranks)), start))
        if not sharded and self.bytes_a_sample * num_samples >= LARGE and distributed.world_size() > 1:
            self._suggest_sharding()

    def _suggest_sharding(self) -> None:
        if distributed.is_main():
            size = self.bytes_a_sample * self.num_samples / 1e9
            warnings.warn(
                f"the state of {self.num_samples:,} samples takes {size:.1f} GB on every rank; build_loss(…, "
                f"shard_state=True) makes it {size / distributed.world_size():.1f} GB, to be saved with gather_state",
                UserNotice,
                stacklevel=2,
            )

    @property
    def bytes_a_sample(self) -> int:
        """Bytes of a sample in float32, over all ranks that share the table."""
        return 8 * len(self.columns)

    def _key(self, column: str) -> str:
        """Return the name of this rank's part of a column, as an attribute and in `state_dict()`."""
        return column if self.ranks == 1 else f"{column}:{self.rank}-of-{self.ranks}"

    def local(self, column: str) -> Tensor:
        """Return this rank's part of a column [2, ceil(N / K)]: float32, or float64 after the first float64 write."""
        part: Tensor = getattr(self, self._key(column))
        return part

    def read(self, ids: Tensor, checked: bool = False) -> Tensor:
        """Return the rows of ids int64 [B] as [2C, B], the same on every rank.

        Image and text side of the first column, then of the second … One all-reduce where the table is sharded.

        Args:
            checked: the ids are known to lie in the data set.

        Raises:
            IndexError: an id outside the data set.
            RuntimeError: the table is sharded over another number of processes.
        """
        self._check_world_size()
        if not checked:
            self.check_ids(ids)
        if self.ranks == 1:
            return self._rows(ids)
        rows = self._rows(ids // self.ranks)
        return distributed.all_sum(torch.where(ids % self.ranks == self.rank, rows, torch.zeros_like(rows)))

    def _rows(self, slots: Tensor) -> Tensor:
        return torch.cat([self.local(column)[:, slots] for column in self.columns])

    def write(self, ids: Tensor, values: Tensor) -> None:
        """Store values [2C, B] of ids int64 [B], the global batch; every rank keeps those that it owns.

        A side of a row keeps its old values where one of the new ones is not finite (−inf is a value of columns that
        start with it). Equal ids must come with equal values, so that the order of writing does not matter.
        """
        if values.dtype == torch.float64 and self.local(next(iter(self.columns))).dtype != torch.float64:
            self._map(Tensor.double)

        # usable [2, B]: every new value of that side of the row is finite
        checks = [
            new < math.inf if start == NEVER else new.isfinite()
            for new, start in zip(values.split(2), self.columns.values(), strict=True)
        ]
        usable = checks[0] if len(checks) == 1 else torch.stack(checks).all(0)
        broken = ~usable
        self.rows_not_finite += broken.sum()

        # old values [2C, B] where a row is broken, or another rank's
        keep = broken if len(checks) == 1 else broken.repeat(len(checks), 1)
        slots = ids if self.ranks == 1 else ids // self.ranks
        if self.ranks > 1:
            owned = ids % self.ranks == self.rank
            keep = keep | ~owned
        values = torch.where(keep, self._rows(slots), values)

        # rows of other ranks may have the slot of an owned one: they repeat the first owned row, where there is one,
        # and else the first row, which is written as it was
        if self.ranks > 1:
            row = torch.where(owned, torch.arange(len(ids), device=ids.device), owned.long().argmax())
            slots, values = slots[row], values[:, row]
        for column, new in zip(self.columns, values.split(2), strict=True):
            self.local(column)[:, slots] = new.to(self.local(column).dtype)

    def _check_world_size(self) -> None:
        if self.sharded and distributed.world_size() != self.ranks:
            raise RuntimeError(
                f"the loss was built for {self.ranks} processes and now runs on {distributed.world_size()}: "
                "build it after torch.distributed is initialised"
            )

    @property
    def device(self) -> torch.device:
        return self.local(next(iter(self.columns))).device

    def check_ids(self, ids: Tensor) -> None:
        """Raise IndexError where an id [n] lies outside the data set; on a GPU an assertion ends the process."""
        if ids.device.type != "cpu":  # reading them would cost a synchronisation a step
            within = ((ids >= 0) & (ids < self.num_samples)).all()
            torch._assert_async(within, f"sample ids must lie in [0, {self.num_samples})")
        elif ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_samples:
            raise IndexError(
                f"sample ids must lie in [0, {self.num_samples}), got {int(ids.min())} to {int(ids.max())}: "
                "num_samples is the size of the data set, not of the batch"
            )

    def checksum(self) -> int:
        """Return a checksum of this rank's table and its order; the same on every rank if the table is complete."""
        checksum = 0
        for column in self.columns:
            bits = self.local(column).reshape(-1).view(torch.int32)
            for start in range(0, len(bits), GATHER_BYTES // 8):
                piece = bits[start : start + GATHER_BYTES // 8].long()
                position = torch.arange(start + 1, start + 1 + len(piece), device=piece.device)
                checksum = (31 * checksum + int((piece * position).sum())) % (1 << 64)  # int64 sums may wrap
        return checksum

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        for column in self.columns:
            setattr(self, self._key(column), fn(self.local(column)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SampleState:
        super()._apply(fn, recurse)

        def moved(part: Tensor) -> Tensor:
            result = fn(part)
            # .half() and .bfloat16() are for parameters: at log u = 60 a step of bf16 is a quarter of a nat
            return result if result.dtype in (torch.float32, torch.float64) else part.to(result.device)

        self._map(moved)
        self.rows_not_finite = self.rows_not_finite.to(self.device)
        return self

    # ---- saving and loading ----

    def _entries(self) -> dict[str, Tensor]:
        parts = {self._key(column): self.local(column) for column in self.columns}
        return parts if self.ranks == 1 else parts | {"num_samples": torch.tensor(self.num_samples)}

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the columns if this module itself is asked, as torch.distributed.checkpoint does and DDP does not."""
        for name, value in self._entries().items():
            yield f"{prefix}.{name}" if prefix else name, value

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in self._entries().items():
            destination[prefix + name] = value

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
        inside = {key.removeprefix(prefix): state_dict[key] for key in state_dict if key.startswith(prefix)}
        inside = named_by_rank(inside)
        for key in [key for key in state_dict if key.startswith(prefix)]:
            del state_dict[key]
        count = inside.pop("num_samples", None)
        samples: set[int] = set()
        for column in self.columns:
            shards = _shards_of(column, inside)
            if not shards:
                missing_keys.append(prefix + self._key(column))
                continue
            try:
                samples.add(self._load(column, shards, count))
            except ValueError as error:
                error_msgs.append(f"{prefix}{column}: {error}")
        state_dict.update({prefix + name: value for name, value in inside.items()})  # nothing that is known here
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if samples and min(samples) < self.num_samples:
            warnings.warn(
                f"the state holds {min(samples):,} of {self.num_samples:,} samples: the others start as never visited",
                UserNotice,
                stacklevel=2,
            )

    def _load(self, column: str, shards: dict[tuple[int, int], Tensor], count: Tensor | None) -> int:
        """Load this rank's samples of a column from shards by (rank, K); return the number of samples saved.

        A complete column has the key (0, 1).

        Raises:
            ValueError: a shard that is needed is missing, or the state is of another data set.
        """
        # shards of one world size, all that this rank needs of them
        sizes = {old for _, old in shards}
        if len(sizes) > 1:
            raise ValueError(f"shards of {' and of '.join(map(str, sorted(sizes)))} processes are mixed")
        old = sizes.pop()
        by_rank = {rank: values for (rank, _), values in shards.items()}
        missing = [rank for rank in reshard_sources(old, self.rank, self.ranks) if rank not in by_rank]
        if missing:
            there, absent = ", ".join(map(str, sorted(by_rank))), ", ".join(map(str, missing))
            raise ValueError(
                f"holds only the shard of rank {there} of {old}, and rank {self.rank} of {self.ranks} needs that of "
                f"rank {absent} of {old}: save gather_state(loss) in place of loss.state_dict(), or load the files of "
                "all ranks as one dict {**state_0, **state_1, …}"
            )

        # the number of samples saved, and shapes that fit it: [2, ceil(N / K)] each
        samples = self.num_samples
        if old > 1:
            if count is None:
                raise ValueError("num_samples is missing beside it")
            samples = int(count)
        elif by_rank[0].ndim == 2:
            samples = by_rank[0].shape[1]
        expected = (2, -(-samples // old))
        for values in by_rank.values():
            if values.shape != expected:
                raise ValueError(f"shape {tuple(values.shape)}, expected {expected}")
        if samples > self.num_samples:
            raise ValueError(
                f"the state holds {samples} samples, this loss has {self.num_samples}: another data set? To drop the "
                f"last ones, cut each column of a complete state to [:, :{self.num_samples}]"
            )

        # this rank's values; those that are not finite, and slots without a sample, start again
        values = reshard(by_rank, old, samples, self.rank, self.ranks)
        wanted = torch.float64 if values.dtype == torch.float64 else torch.float32
        start = self.columns[column]
        usable = values < math.inf if start == NEVER else values.isfinite()
        part = self.local(column).to(wanted)
        part.fill_(start)
        part[:, : values.shape[1]] = torch.where(usable, values, start)
        setattr(self, self._key(column), part)
        broken = int((values.isnan() | (values == math.inf)).sum())
        if broken:
            warnings.warn(f"{column}: {broken} saved values are not finite: they start again", UserNotice, stacklevel=3)
        return samples


def gather_state(module: nn.Module, everywhere: bool = False) -> dict[str, Tensor] | None:
    """Gather the `state_dict()` of an objective, or of a module with one, as one process would have it.

    Save this where the per-sample state is sharded (`build_loss(..., shard_state=True)`). `load_state_dict` takes it at
    any world size. Where nothing is sharded it is a copy of `state_dict()`. All ranks call this.

    Args:
        module: the objective, or a module that contains it.
        everywhere: return the state on all ranks; else on rank 0 only, and None on the others.

    Returns:
        Copies on the CPU. Memory: all of the state, 8 bytes · columns · N for its tables, on each rank that gets it; on
        a device 64 MiB at a time.

    Example:
        >>> from disttempnet import build_loss
        >>> loss = build_loss("sogclr", num_samples=1000, embed_dim=8)
        >>> {name: list(value.shape) for name, value in gather_state(loss).items()}
        {'_extra_state': [2], 'state.log_u': [2, 1000]}
    """
    keep = everywhere or distributed.is_main()
    tables = {
        f"{name}." if name else "": part for name, part in module.named_modules() if isinstance(part, SampleState)
    }
    state: dict[str, Tensor] = {}
    for key, value in module.state_dict().items():
        if not any(key.startswith(prefix) for prefix in tables):
            value = fsdp.full_tensor(value)  # a collective, also on ranks that do not keep it
            if keep:
                state[key] = value.detach().cpu().clone()
    for prefix, table in tables.items():
        for column in table.columns:
            gathered = _gathered(table, column, keep)
            if gathered is not None:
                state[prefix + column] = gathered
    return state if keep else None


def _gathered(table: SampleState, column: str, keep: bool) -> Tensor | None:
    """Return a complete column [2, N] on the CPU of the ranks that keep it, sent in pieces; None on the others."""
    local, ranks = table.local(column), table.ranks
    result = torch.empty(2, table.num_samples, dtype=local.dtype) if keep else None
    step = max(1, GATHER_BYTES // (2 * local.element_size() * ranks))
    for left in range(0, local.shape[1], step):
        piece = local[:, left : left + step]
        gathered = distributed.all_gather(piece[None]) if ranks > 1 else piece[None]  # [K, 2, slots]
        if result is not None:
            ids = slice(left * ranks, min((left + piece.shape[1]) * ranks, table.num_samples))
            result[:, ids] = gathered.permute(1, 2, 0).flatten(1)[:, : ids.stop - ids.start]
    return result


def named_by_rank(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `state_dict()` with the current names of shards.

    Older versions gave a shard the name of a complete column, beside a dict of N, the rank, and K.
    """
    named = dict(state)
    for key, numbers in state.items():
        if not (key.endswith("_extra_state") and isinstance(numbers, Mapping) and "world_size" in numbers):
            continue
        del named[key]
        if numbers["world_size"] > 1:
            prefix = key.removesuffix("_extra_state")
            for column in [other for other in state if other.startswith(prefix) and other != key]:
                named[f"{column}:{numbers['rank']}-of-{numbers['world_size']}"] = named.pop(column)
            named[prefix + "num_samples"] = torch.tensor(numbers["num_samples"])
    return named


def _shards_of(column: str, state: dict[str, Any]) -> dict[tuple[int, int], Tensor]:
    """Take a column's shards out of a table's saved state: (rank, K) → values. A complete column is (0, 1)."""
    found: dict[tuple[int, int], Tensor] = {}
    if column in state:
        found[0, 1] = state.pop(column)
    for name in list(state):
        match = _SHARD_NAME.fullmatch(name)
        if match and match[1] == column:
            found[int(match[2]), int(match[3])] = state.pop(name)
    return found


def log_moving_average(log_u: Tensor, log_g: Tensor, shares: Shares) -> Tensor:
    """Return log((1−γ) u + γ g) from log u and log g of one shape, and the shares of both.

    log g at the first visit (log u = −inf), and log u where the batch had no negatives (log g = −inf).
    """
    blended = torch.logaddexp(log_u + shares.old, log_g + shares.new)
    new = torch.where(log_u.isfinite(), blended, log_g)  # the average of two −inf is NaN, and no visit either
    return torch.where(log_g == -math.inf, log_u, new)


def reshard_sources(old: int, rank: int, world_size: int) -> range:
    """Return the old ranks, of `old`, that hold samples of `rank` of `world_size`."""
    common = math.gcd(old, world_size)
    return range(rank % common, old, common)


def reshard(shards: Mapping[int, Tensor], old: int, num_samples: int, rank: int, world_size: int) -> Tensor:
    """Return a column's shard of `rank` of `world_size` from the shards of `old` ranks.

    id = slot · K + rank before and after; needs no table of all N samples. Slots behind the last sample hold −inf.

    Args:
        shards: old rank → its shard [2, ceil(N / old)], of all that `reshard_sources` names.
    """
    shard = next(iter(shards.values())).new_full((2, -(-num_samples // world_size)), NEVER)
    for old_rank, source, target in _shared_slots(old, num_samples, rank, world_size):
        shard[:, target] = shards[old_rank][:, source]
    return shard


def _shared_slots(old: int, num_samples: int, rank: int, world_size: int) -> Iterator[tuple[int, slice, slice]]:
    """Yield old rank, the slots of its shard that hold samples of `rank` of `world_size`, and their new slots."""
    stride = math.lcm(old, world_size)  # from an id to the next that has both ranks
    for old_rank in reshard_sources(old, rank, world_size):
        first = next(id for id in range(old_rank, stride, old) if id % world_size == rank)
        last = num_samples - 1 - (num_samples - 1 - first) % stride
        if first < num_samples:  # else there are more ranks than samples
            source, target = (slice(first // k, last // k + 1, stride // k) for k in (old, world_size))
            yield old_rank, source, target


def _groups(ids: Tensor) -> Tensor:
    """Return a number in [0, B) for every row [B], equal where ids are equal.

    Fixed shapes only (sort, scatter), so that the host never waits for the device.
    """
    order = ids.argsort(stable=True)
    ordered = ids[order]
    starts = torch.ones_like(ordered)
    starts[1:] = (ordered[1:] != ordered[:-1]).long()
    group = torch.empty_like(ids)
    group[order] = starts.cumsum(0) - 1
    return group


def multiplicity(ids: Tensor) -> Tensor:
    """Return how often the id of every row occurs in the batch, int64 [B]."""
    groups = _groups(ids)
    return torch.zeros_like(ids).scatter_add_(0, groups, torch.ones_like(ids))[groups]


def log_mean_over_equal_ids(ids: Tensor, log_g: Tensor) -> Tensor:
    """Return the log of the mean of g over rows of equal id, for every row: ids [B], log_g [2, B] → [2, B]."""
    index = _groups(ids).expand_as(log_g)
    count = torch.zeros_like(log_g).scatter_add_(1, index, torch.ones_like(log_g))
    largest = torch.full_like(log_g, -torch.inf).scatter_reduce_(1, index, log_g, "amax")
    finite = torch.where(largest == -torch.inf, 0.0, largest)
    shifted = (log_g - finite.gather(1, index)).exp()
    total = torch.zeros_like(log_g).scatter_add_(1, index, shifted)
    return (finite + total.log() - count.log()).gather(1, index)


def mean_over_equal_ids(ids: Tensor, values: Tensor) -> Tensor:
    """Return the mean over rows of equal id, for every row: ids [B], values [2, B] → [2, B]."""
    index = _groups(ids).expand_as(values)
    count = torch.zeros_like(values).scatter_add_(1, index, torch.ones_like(values))
    return (torch.zeros_like(values).scatter_add_(1, index, values) / count).gather(1, index)
