"""Epoch plan: the samples of each batch as a pure function of (source, seed, epoch).

n usable samples, global batch B, L lanes. An epoch shuffles the shards and concatenates their usable samples. The first
⌊n/B⌋·B of them are divided into L equal lanes. Each batch takes B/L samples from each lane, from a window of
consecutive samples that is shuffled as a whole. The n mod B samples at the end make one more batch, filled from the
beginning of the epoch (tail = wrap), or are dropped for this epoch (tail = drop).

So every sample comes once an epoch (wrapped ones twice), and no batch has a sample twice. A lane reads the shards of
one window at a time. Rank r of K takes the lanes [r·L/K, (r+1)·L/K): batches are the same for every K that divides L.
Work and memory grow with shards and windows, not with n.

Mixture: a source of weight w has all its shards ⌊w⌋ times in an epoch. The rest, (w − ⌊w⌋) of its samples, is the next
part of a fixed shuffled order of its shards, in a circle from epoch to epoch. So every epoch reads another part, no
part comes again before all others, and all epochs have one length. With w > 1 a batch can have a sample twice. n counts
the reads of an epoch.

Replacement: an unreadable sample is replaced by a sample of another batch of the epoch. The k-th candidate for a slot
of batch t is in the k-th full batch after t, at the slot given by a shuffle of all slots. So no two slots of a batch
share a candidate before all batches are through, and no sample is the first candidate twice in an epoch. The next turn
through the batches takes each slot's neighbour: B turns reach all samples of full batches. The replacement depends on
(seed, epoch, step, slot) and on which samples are readable, not on rank, world size or worker. It comes from windows
that are open anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from disttempnet.data.source import Source
from disttempnet.errors import UserError

IdArray = NDArray[np.int64]
SHARDS, WINDOW, TAIL, PART, STAND_IN = range(5)  # purposes of random permutations: each has its own random stream


class EpochPlan:
    """Random access to the batches of every epoch.

    Args:
        source: the samples.
        global_batch: B, samples of a step over all ranks; a multiple of lanes.
        lanes: L; world sizes that divide it see the same batches.
        seed: of every shuffle.
        tail: `wrap` fills the last n mod B samples of an epoch to a batch, `drop` leaves them out.
        shuffle_window: largest number of samples of a lane that are shuffled together. Windows of a lane have one
            size, as a short last one would mix badly.
        limit: use only the first this many usable samples; 0 = all.

    Raises:
        UserError: fewer usable samples than a batch, or lanes that do not divide the batch.
    """

    def __init__(
        self,
        source: Source,
        global_batch: int,
        lanes: int,
        seed: int,
        tail: Literal["wrap", "drop"] = "wrap",
        shuffle_window: int = 16384,
        limit: int = 0,
    ) -> None:
        if global_batch % lanes:
            raise UserError(f"global_batch {global_batch} is not a multiple of lanes {lanes}")
        self.source, self.global_batch, self.lanes = source, global_batch, lanes
        self.seed = seed
        ends = np.cumsum(source.usable_counts)
        if limit:
            ends = np.minimum(ends, limit)
        self._counts: IdArray = np.diff(ends, prepend=0)
        self._whole, self._parts = self._divide()
        self.samples = int(self._counts[self._whole].sum()) + sum(part for _, part in self._parts)
        self._full_steps = self.samples // global_batch
        if not self._full_steps:
            raise UserError(
                f"data.global_batch = {global_batch} is more than the {self.samples} usable samples of "
                f"{source.where}" + (f" within data.limit = {limit}" if limit else "")
            )
        self._lane_samples = self._full_steps * (global_batch // lanes)
        windows = -(-self._lane_samples // shuffle_window)
        self._window_samples = -(-self._lane_samples // windows)
        ragged = self.samples % global_batch
        self.steps = self._full_steps + (1 if ragged and tail == "wrap" else 0)
        self._epoch = -1  # epoch of the five fields below
        self._shards: IdArray = np.empty(0, np.int64)  # shards of the epoch, in order
        self._begins: IdArray = np.empty(0, np.int64)  # first usable sample of each shard that the epoch reads
        self._starts: IdArray = np.empty(0, np.int64)  # position of that sample in the epoch, then n
        self._windows: dict[int, tuple[int, IdArray]] = {}  # lane → (number, ids) of its current window
        self._stand_in_slots: dict[int, IdArray] = {}  # k - 1 → the slot of each slot's k-th stand-in, k ≤ full steps

    def batch(self, epoch: int, step: int) -> IdArray:
        """Return the ids of a global batch, int64 [B], in lane order."""
        return self.local_batch(epoch, step, 0, 1)

    def local_batch(self, epoch: int, step: int, rank: int, world_size: int) -> IdArray:
        """Return the ids of a rank's part of a global batch, int64 [B / world_size].

        Raises:
            UserError: lanes are not a multiple of world_size.
        """
        if self.lanes % world_size:
            raise UserError(
                f"{world_size} processes cannot share data.lanes = {self.lanes} evenly; "
                f"set data.lanes to a multiple of {world_size} that divides global_batch {self.global_batch}"
            )
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is not in [0, {self.steps})")
        self._turn_to(epoch)
        share = self.lanes // world_size
        if step == self._full_steps:
            local = self.global_batch // world_size
            return self._tail()[rank * local : (rank + 1) * local]
        return np.concatenate([self._lane(lane, step) for lane in range(rank * share, (rank + 1) * share)])

    def stand_ins(self, epoch: int, step: int, slot: int) -> Iterator[int]:
        """Yield candidates for the replacement of an unreadable sample, first choice first, without end.

        Args:
            epoch, step: of the batch.
            slot: position of the unreadable sample in the global batch, from 0.
        """
        self._turn_to(epoch)
        # a wrapped last batch has samples of the first batches
        avoided = frozenset(self._tail().tolist()) if step == self._full_steps else frozenset()
        share = self.global_batch // self.lanes
        for k in count():
            turn, batch = divmod(k, self._full_steps)  # each turn takes the next slot: B turns reach every sample
            if batch not in self._stand_in_slots:
                self._stand_in_slots[batch] = self._permutation(self.global_batch, STAND_IN, epoch, batch + 1)
            place = (int(self._stand_in_slots[batch][slot]) + turn) % self.global_batch
            lane, offset = divmod(place, share)
            sample = int(self._lane(lane, (step + batch + 1) % self._full_steps)[offset])
            if sample not in avoided or turn >= self.global_batch:
                yield sample

    def _turn_to(self, epoch: int) -> None:
        if epoch != self._epoch:
            pieces = [(self._whole, np.zeros_like(self._whole), self._counts[self._whole])]
            pieces += [piece for shards, part in self._parts for piece in self._circle(shards, part, epoch)]
            shards, begins, counts = (np.concatenate(column) for column in zip(*pieces, strict=True))
            order = self._permutation(len(shards), SHARDS, epoch)
            self._shards, self._begins = shards[order], begins[order]
            self._starts = np.cumsum([0, *counts[order]], dtype=np.int64)
            self._windows.clear()
            self._stand_in_slots.clear()
            self._epoch = epoch

    def _divide(self) -> tuple[IdArray, list[tuple[IdArray, int]]]:
        """Return the shards that every epoch reads completely, each ⌊w⌋ times; and for each source with a fraction of w
        left (its shards in a fixed shuffled order, number of samples that an epoch reads of them)."""
        whole, parts, first = [np.empty(0, np.int64)], [], 0
        for number, (groups, weight) in enumerate(self.source.shares):
            shards = np.arange(first, first + groups)
            samples = int(self._counts[shards].sum())
            part = round((weight - int(weight)) * samples)
            if samples and not int(weight) and not part:
                raise UserError(f"data.train: a weight of {weight:g} reads none of the {samples} samples of its source")
            whole += [shards] * int(weight)
            if part:
                parts.append((shards[self._permutation(groups, PART, number)], part))
            first += groups
        return np.concatenate(whole), parts

    def _circle(self, shards: IdArray, part: int, epoch: int) -> Iterator[tuple[IdArray, IdArray, IdArray]]:
        """Yield (shards, first sample of each, samples of each) of this epoch's `part` samples of a circle."""
        ends = np.cumsum(self._counts[shards])
        starts, samples = ends - self._counts[shards], int(ends[-1])
        begin = epoch * part % samples
        for first, last in ((begin, min(begin + part, samples)), (0, begin + part - samples)):
            low, high = np.maximum(starts, first), np.minimum(ends, last)
            touched = high > low
            yield shards[touched], (low - starts)[touched], (high - low)[touched]

    def _permutation(self, n: int, *stream: int) -> IdArray:
        """Return a permutation of range(n) that depends on (seed, stream) alone, not on the version of numpy."""
        bits = np.random.PCG64(np.random.SeedSequence([self.seed % 2**64, *stream]))
        return np.argsort(bits.random_raw(n), kind="stable")

    def _ids(self, begin: int, end: int) -> IdArray:
        """Return the ids at positions [begin, end) of the epoch."""
        first = int(np.searchsorted(self._starts, begin, side="right")) - 1
        last = int(np.searchsorted(self._starts, end, side="left"))
        parts = []
        for place in range(first, last):
            start, stop = int(self._starts[place]), int(self._starts[place + 1])
            skip = int(self._begins[place]) - start
            usable = self.source.usable_in(int(self._shards[place]))
            parts.append(usable[max(start, begin) + skip : min(stop, end) + skip])
        return np.concatenate(parts)

    def _lane(self, lane: int, step: int) -> IdArray:
        """Return the ids of a lane in a full batch, int64 [B / L]."""
        share = self.global_batch // self.lanes
        position, end = step * share, (step + 1) * share
        parts = []
        while position < end:
            number, offset = divmod(position, self._window_samples)
            window = self._window(lane, number)
            parts.append(window[offset : offset + end - position])
            position += len(parts[-1])
        return np.concatenate(parts)

    def _window(self, lane: int, number: int) -> IdArray:
        """Return the ids of a window of a lane, shuffled."""
        cached = self._windows.get(lane)
        if cached is None or cached[0] != number:
            begin = number * self._window_samples
            end = min(begin + self._window_samples, self._lane_samples)
            ids = self._ids(lane * self._lane_samples + begin, lane * self._lane_samples + end)
            shuffled = ids[self._permutation(len(ids), WINDOW, self._epoch, lane, number)]
            cached = self._windows[lane] = (number, shuffled)
        return cached[1]

    def _tail(self) -> IdArray:
        """Return the last, ragged batch, filled from the beginning of the epoch, int64 [B]."""
        begin = self._full_steps * self.global_batch
        missing = self.global_batch - (self.samples - begin)
        ids = np.concatenate([self._ids(begin, self.samples), self._ids(0, missing)])
        return ids[self._permutation(len(ids), TAIL, self._epoch)]


class Draw(NamedTuple):
    """Position of a sample in an epoch: `slot` of the global batch of `step`."""

    epoch: int
    sample: int
    step: int
    slot: int


class PlanSampler(Sampler[list[Draw]]):
    """Batches of a rank in an epoch, from a step on, as lists of draws for torch's DataLoader.

    `seek` sets epoch and step of the next iteration, so that worker processes persist over epochs.
    """

    def __init__(self, plan: EpochPlan, rank: int = 0, world_size: int = 1) -> None:
        self.plan, self.rank, self.world_size = plan, rank, world_size
        self.epoch = self.start_step = 0

    def seek(self, epoch: int, start_step: int = 0) -> None:
        self.epoch, self.start_step = epoch, start_step

    def __len__(self) -> int:
        return max(0, self.plan.steps - self.start_step)

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch = self.epoch
        for step in range(self.start_step, self.plan.steps):
            ids = self.plan.local_batch(epoch, step, self.rank, self.world_size)
            first = self.rank * len(ids)
            yield [Draw(epoch, sample, step, first + place) for place, sample in enumerate(ids.tolist())]
