"""The epoch plan: every sample once, the same batches for every world size, from every step, with bounded reach."""

import tracemalloc
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disttempnet.data import EpochPlan, PlanSampler, ShardIndex
from disttempnet.data.shards.index import Shard
from disttempnet.errors import UserError

quick = settings(deadline=None, max_examples=60)  # a shared machine may pause


def index_of(statuses: list[list[int]]) -> ShardIndex:
    """An index without shards behind it: one status code a sample, a list a shard."""
    shards = tuple(Shard(f"{n}.tar", 0, len(codes), "") for n, codes in enumerate(statuses))
    status = np.array([code for codes in statuses for code in codes], dtype=np.uint8)
    columns = {
        "start": np.zeros(len(status), np.int64),
        "spans": np.zeros((len(status), 3, 2), np.uint32),
        "status": status,
    }
    return ShardIndex(Path("index"), Path("folder"), shards, columns)


@st.composite
def plans(draw: st.DrawFn, tail: Literal["wrap", "drop"] | None = None) -> EpochPlan:
    statuses = draw(st.lists(st.lists(st.sampled_from([0, 0, 0, 1, 3]), max_size=30), min_size=1, max_size=8))
    if not any(0 in codes for codes in statuses):
        statuses.append([0])
    index = index_of(statuses)
    n = len(index.usable)
    limit = draw(st.integers(0, n + 2))
    n = min(n, limit or n)
    lanes = draw(st.sampled_from([lanes for lanes in (1, 2, 4, 8) if lanes <= n]))
    batch = lanes * draw(st.integers(1, max(1, min(5, n // lanes))))
    tail = tail or draw(st.sampled_from(["wrap", "drop"]))
    window = draw(st.integers(1, 40))
    return EpochPlan(index, batch, lanes, draw(st.integers(-5, 2**40)), tail, window, limit)


def epoch_of(plan: EpochPlan, epoch: int) -> np.ndarray:
    return np.stack([plan.batch(epoch, step) for step in range(plan.steps)])


def fresh(plan: EpochPlan, tail: Literal["wrap", "drop"]) -> EpochPlan:
    """The same plan, with nothing in its caches."""
    window = plan._window_samples
    return EpochPlan(plan.source, plan.global_batch, plan.lanes, plan.seed, tail, window, plan.samples)


@quick
@given(plans(tail="wrap"), st.integers(0, 3))
def test_every_usable_sample_comes_once_and_the_tail_wraps(plan: EpochPlan, epoch: int) -> None:
    batches = epoch_of(plan, epoch)
    usable = plan.source.usable[: plan.samples]
    assert batches.shape == (-(-len(usable) // plan.global_batch), plan.global_batch)
    ids, times = np.unique(batches, return_counts=True)
    assert ids.tolist() == usable.tolist()
    assert times.max() <= 2
    assert (times == 2).sum() == batches.size - len(usable)


@quick
@given(plans(tail="drop"), st.integers(0, 3))
def test_a_dropped_tail_repeats_nothing(plan: EpochPlan, epoch: int) -> None:
    batches = epoch_of(plan, epoch)
    assert len(batches) == plan.samples // plan.global_batch
    assert len(np.unique(batches)) == batches.size
    assert set(batches.ravel()) <= set(plan.source.usable[: plan.samples].tolist())


@quick
@given(plans(), st.integers(0, 3))
def test_no_batch_holds_a_sample_twice(plan: EpochPlan, epoch: int) -> None:
    for batch in epoch_of(plan, epoch):
        assert len(np.unique(batch)) == len(batch)


@quick
@given(plans(), st.integers(0, 2))
def test_world_sizes_share_the_same_batches(plan: EpochPlan, epoch: int) -> None:
    batches = epoch_of(plan, epoch)
    for world_size in (k for k in (1, 2, 4, 8) if plan.lanes % k == 0):
        parts = [
            [plan.local_batch(epoch, step, rank, world_size) for rank in range(world_size)]
            for step in range(plan.steps)
        ]
        assert {len(part) for step in parts for part in step} == {plan.global_batch // world_size}
        assert np.array_equal([np.concatenate(step) for step in parts], batches)


@quick
@given(plans(tail="wrap"), st.data())
def test_a_batch_depends_on_seed_epoch_and_step_only(plan: EpochPlan, data: st.DataObject) -> None:
    """Whatever was asked before, and by however fresh a plan."""
    calls = data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, plan.steps - 1)), max_size=8))
    for epoch, step in calls:
        assert np.array_equal(plan.batch(epoch, step), fresh(plan, "wrap").batch(epoch, step))


@quick
@given(plans(), st.integers(0, 2))
def test_stand_ins_are_others_and_none_is_asked_for_twice(plan: EpochPlan, epoch: int) -> None:
    """The first candidates of an epoch's full batches are its samples, each once, and none of the own batch."""
    batches, full = epoch_of(plan, epoch), plan.samples // plan.global_batch
    candidates = [
        [list(islice(plan.stand_ins(epoch, step, slot), full)) for slot in range(plan.global_batch)]
        for step in range(plan.steps)
    ]
    firsts = [one[0] for step in candidates[:full] for one in step]
    assert sorted(firsts) == sorted(batches[:full].ravel().tolist())
    for step, of_slots in enumerate(candidates):
        others = [sample for one in of_slots for sample in one[: full - 1]]
        assert not set(others) & set(batches[step].tolist())
        if step < full:
            assert len(set(others)) == len(others), "no two slots of a batch share one of another batch"


def test_stand_ins_of_the_last_batch_are_others_even_where_it_holds_most() -> None:
    """B = 8: the batch of what is left over holds 8 of 9 samples; all its slots have the 9th as first candidate."""
    for seed in range(20):
        plan = EpochPlan(index_of([[0] * 9]), 8, 1, seed)
        other = {*range(9)} - {*plan.batch(0, 1).tolist()}
        for slot in range(8):
            candidates = list(islice(plan.stand_ins(0, 1, slot), 3))
            assert {candidates[0]} == other
            assert len({*candidates[1:]}) == 2, "then, as it may be lost, its own: there is an end of the search"


@quick
@given(plans(), st.data())
def test_stand_ins_depend_on_seed_epoch_and_place_only(plan: EpochPlan, data: st.DataObject) -> None:
    places = st.tuples(st.integers(0, 2), st.integers(0, plan.steps - 1), st.integers(0, plan.global_batch - 1))
    tail: Literal["wrap", "drop"] = "wrap" if plan.steps > plan.samples // plan.global_batch else "drop"
    for place in data.draw(st.lists(places, max_size=4)):
        expected = list(islice(fresh(plan, tail).stand_ins(*place), 5))
        assert list(islice(plan.stand_ins(*place), 5)) == expected


@quick
@given(plans(), st.data())
def test_resuming_continues_the_straight_order(plan: EpochPlan, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, plan.steps))
    sampler = PlanSampler(plan, 0, 1)
    sampler.seek(1)
    straight = list(sampler)
    assert len(sampler) == len(straight) == plan.steps
    sampler.seek(1, start)
    assert len(sampler) == plan.steps - start
    assert list(sampler) == straight[start:]
    assert straight == [
        [(1, sample, step, slot) for slot, sample in enumerate(batch)]
        for step, batch in enumerate(epoch_of(plan, 1).tolist())
    ]


@quick
@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 3))
def test_a_lane_reads_few_shards_within_a_window(window: int, epoch: int, rank: int) -> None:
    """30 shards of 10: a window of w samples reaches over at most ⌈w / 10⌉ + 1 of them."""
    index = index_of([[0] * 10] * 30)
    plan = EpochPlan(index, 16, 4, 7, "drop", window)
    lane = np.concatenate([plan.local_batch(epoch, step, rank, 4) for step in range(plan.steps)])
    size = plan._window_samples
    assert size <= window
    for begin in range(0, len(lane), size):
        assert len(np.unique(lane[begin : begin + size] // 10)) <= -(-size // 10) + 1


def test_epochs_and_seeds_shuffle_shards_and_samples() -> None:
    index = index_of([[0] * 50] * 20)
    plan = EpochPlan(index, 100, 4, 0, "wrap", 200)
    first, second = epoch_of(plan, 0), epoch_of(plan, 1)
    other = epoch_of(EpochPlan(index, 100, 4, 1, "wrap", 200), 0)
    for batches in (second, other):
        assert (batches == first).mean() < 0.02
        assert len(np.unique(batches)) == 1000
    for batch in first:  # 4 lanes, each with two windows of 125 samples, from 3 or 4 shards
        assert len(np.unique(batch // 50)) >= 10
    assert abs(np.corrcoef(first.ravel(), np.arange(1000))[0, 1]) < 0.5
    neighbours = np.diff(first.ravel()) == 1
    assert neighbours.mean() < 0.05  # samples of a shard do not follow each other as in the shard


def test_the_order_is_recorded() -> None:
    """Checkpoints resume in the same order in every version of this library and of numpy."""
    plan = EpochPlan(index_of([[0] * 7, [0, 1, 0], [0] * 5]), 4, 2, 2024, "wrap", 5)
    assert epoch_of(plan, 3).tolist() == [[2, 1, 10, 11], [0, 4, 6, 13], [3, 5, 14, 12], [9, 7, 0, 1]]


def test_a_plan_grows_with_shards_and_windows_not_with_samples() -> None:
    index = index_of([[0]])
    index.shards = tuple(Shard(f"{n}.tar", 0, 10_000, "") for n in range(1200))
    index.first = np.arange(1201, dtype=np.int64) * 10_000
    index.status = np.zeros(12_000_000, np.uint8)
    tracemalloc.start()
    plan = EpochPlan(index, 4096, 8, 0, "wrap", 16384)
    for step in (0, 1, 1500, plan.steps - 1):
        assert len(np.unique(plan.batch(2, step))) == 4096
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6  # bytes; the ids alone would be 96e6


@pytest.mark.parametrize("tail", ["wrap", "drop"])
def test_too_few_samples_for_a_batch(tail: Literal["wrap", "drop"]) -> None:
    index = index_of([[0, 1, 0], [0]])
    with pytest.raises(UserError, match=r"data.global_batch = 4 is more than the 3 usable samples of folder"):
        EpochPlan(index, 4, 2, 0, tail)
    with pytest.raises(UserError, match=r"the 1 usable samples of folder within data.limit = 1"):
        EpochPlan(index, 2, 2, 0, tail, limit=1)
    assert EpochPlan(index, 3, 1, 0, tail).steps == 1


def test_world_sizes_that_lanes_do_not_allow() -> None:
    plan = EpochPlan(index_of([[0] * 64]), 16, 8, 0)
    with pytest.raises(UserError, match=r"3 processes cannot share data.lanes = 8 .*multiple of 3"):
        plan.local_batch(0, 0, 0, 3)
    with pytest.raises(UserError, match="global_batch 10 is not a multiple of lanes 4"):
        EpochPlan(plan.source, 10, 4, 0)
    for step in (-1, plan.steps):
        with pytest.raises(IndexError):
            plan.batch(0, step)
