"""The per-sample table: who owns what, reading and writing over ranks, saving, refusing, re-dealing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from disttempnet import Features, build_loss, distributed
from disttempnet.losses.sample_state import NEVER, SampleState, reshard, reshard_sources
from tests.losses.scenario import (
    CONSTANT,
    NETWORK,
    D,
    GlobalBatch,
    N,
    make,
    pairs,
    run_saved,
    step,
    stream,
)

DROPOUT = {**NETWORK, "dropout": 0.5, "prototypes": 13}
close = torch.testing.assert_close


def table(num_samples: int) -> Tensor:
    """A value of its own for every sample and side: id + side/2."""
    return torch.arange(num_samples) + torch.tensor([[0.0], [0.5]])


def shard(num_samples: int, rank: int, world_size: int) -> Tensor:
    """The definition, as a loop: owner = id mod K, slot = id div K; places without a sample hold −inf."""
    result = torch.full((2, math.ceil(num_samples / world_size)), -math.inf)
    for i in range(num_samples):
        if i % world_size == rank:
            result[:, i // world_size] = table(num_samples)[:, i]
    return result


def test_starts_without_visits() -> None:
    state = SampleState(N, {"log_u": NEVER})
    assert state.local("log_u").shape == (2, N)
    assert state.local("log_u").dtype == torch.float32
    assert (state.read(torch.arange(N)) == -math.inf).all()


def write_and_read(num_samples: int, write: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    """Write table values of ids `write` in two batches; this rank's buffer, and what `read` gives."""
    state = SampleState(num_samples, {"log_u": NEVER}, sharded=True)
    for ids in write.chunk(2):
        state.write(ids, table(num_samples)[:, ids])
    return state.local("log_u").clone(), state.read(read)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("num_samples", [19, 20, 3])
def test_every_rank_keeps_what_it_owns_and_reads_all(gloo, num_samples: int, world_size: int) -> None:
    everyone = torch.arange(num_samples)
    write = torch.cat([everyone.flip(0), everyone[:2], everyone[-2:]])  # with repetitions
    run_on = gloo if world_size > 1 else lambda _, function, *args: [function(*args)]
    for rank, (buffer, read) in enumerate(run_on(world_size, write_and_read, num_samples, write, everyone)):
        close(buffer, shard(num_samples, rank, world_size), rtol=0, atol=0)
        close(read, table(num_samples), rtol=0, atol=0)


@pytest.mark.parametrize("world_size", [1, 4])
def test_samples_that_were_not_written_stay_as_they_are(gloo, world_size: int) -> None:
    """Ids of one slot on different ranks (0..3 at K = 4) must not touch each other."""
    run_on = gloo if world_size > 1 else lambda _, function, *args: [function(*args)]
    expected = torch.full((2, 8), -math.inf)
    expected[:, [1, 6]] = table(8)[:, [1, 6]]
    for _, read in run_on(world_size, write_and_read, 8, torch.tensor([1, 6]), torch.arange(8)):
        close(read, expected, rtol=0, atol=0)


@pytest.mark.parametrize("ids", [[0, N], [-1, 2]])
def test_ids_outside_the_data_set_are_refused(ids: list[int]) -> None:
    loss = make(CONSTANT)
    with pytest.raises(IndexError, match=rf"\[0, {N}\)"):
        step(loss, GlobalBatch(*pairs(2), torch.tensor(ids)))
    assert loss.state.local("log_u").isinf().all()


def test_a_loss_built_for_another_world_size_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Built before torch.distributed was initialised, it would silently own all samples on every rank."""
    state = SampleState(N, {"log_u": NEVER}, sharded=True)
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    with pytest.raises(RuntimeError, match=r"1 .*4"):
        state.read(torch.arange(3))


# ---- saving ----


def test_the_epoch_is_part_of_the_state() -> None:
    """A resumed loss uses the γ it was saved at, before anyone calls set_epoch."""
    recipe = {key: value for key, value in NETWORK.items() if key != "gamma"} | {
        "name": "disttempnet-v1",
        "tau_initial": 0,
    }
    loss, other = (make(recipe, gamma_min=0.2, gamma_decay_epochs=4) for _ in range(2))
    loss.set_epoch(3)
    other.load_state_dict(loss.state_dict())
    batch = stream(1)[0]
    gamma = [one(Features.unit(batch.x, batch.y), batch.ids).metrics["gamma"].item() for one in (loss, other)]
    assert gamma[0] == gamma[1] < 1


SHARDED = {**CONSTANT, "shard_state": True}


def test_a_shard_alone_is_refused(gloo) -> None:
    """Ranks hold different samples then; the message names both sizes, and what to do."""
    states = [saved for _, saved in gloo(2, run_saved, SHARDED, stream(2), 1)]
    with pytest.raises(RuntimeError, match=r"rank 0 of 2, and rank 0 of 1 needs that of rank 1 of 2.*gather_state"):
        make(CONSTANT).load_state_dict(states[0])
    # two samples or one, on one rank or two: the shapes agree and do not help
    single = make(CONSTANT, num_samples=1)
    states = [saved for _, saved in gloo(2, saved_state, 1)]
    with pytest.raises(RuntimeError, match=r"rank 1 of 2, and rank 0 of 1"):
        single.load_state_dict(states[1])


def saved_state(num_samples: int) -> tuple[None, dict]:
    return None, make(SHARDED, num_samples=num_samples).state_dict()


def load_from_other_rank(states: list[dict]) -> str:
    try:
        make(SHARDED).load_state_dict(states[1 - distributed.rank()])
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_shard_of_another_rank_is_refused(gloo) -> None:
    states = [saved for _, saved in gloo(2, run_saved, SHARDED, stream(2), 1)]
    for rank, message in enumerate(gloo(2, load_from_other_rank, states)):
        assert (
            f"holds only the shard of rank {1 - rank} of 2, and rank {rank} of 2 needs that of rank {rank}" in message
        )


def test_state_of_another_data_set_is_refused() -> None:
    with pytest.raises(RuntimeError, match=rf"{N + 1}.*{N}"):
        make(CONSTANT).load_state_dict(make(CONSTANT, num_samples=N + 1).state_dict())


class Tower(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.weight, self.loss = nn.Parameter(torch.eye(D, dtype=torch.float64)), loss

    def forward(self, batch: GlobalBatch) -> Tensor:
        return self.loss(Features.unit(batch.x @ self.weight, batch.y), batch.ids).total


def wrap_visited_state() -> tuple[Tensor, Tensor]:
    """This rank's buffer before and after DDP's constructor, which synchronises parameters."""
    model = Tower(make(SHARDED))
    model.loss.state.write(torch.arange(N), table(N).double())
    before = model.loss.state.local("log_u").clone()
    distributed.data_parallel(model, torch.device("cpu"))
    return before, model.loss.state.local("log_u").clone()


def test_data_parallel_does_not_broadcast_the_table(gloo) -> None:
    for rank, (before, after) in enumerate(gloo(2, wrap_visited_state)):
        close(before, shard(N, rank, 2).double(), rtol=0, atol=0)
        close(after, before, rtol=0, atol=0)


# ---- another world size ----


@settings(max_examples=60, deadline=None, derandomize=True)
@given(num_samples=st.integers(1, 40), old=st.integers(1, 7), new=st.integers(1, 7))
def test_reshard_gives_every_rank_what_it_owns(num_samples: int, old: int, new: int) -> None:
    for rank in range(new):
        read = {old_rank: shard(num_samples, old_rank, old) for old_rank in reshard_sources(old, rank, new)}
        close(reshard(read, old, num_samples, rank, new), shard(num_samples, rank, new), rtol=0, atol=0)


def test_a_rank_reads_only_the_old_shards_that_hold_its_samples() -> None:
    assert [*reshard_sources(1024, 5, 512)] == [5, 517]
    assert [*reshard_sources(512, 700, 1024)] == [188]
    assert [*reshard_sources(4, 1, 3)] == [0, 1, 2, 3]


def test_half_precision_parameters_leave_the_table_alone() -> None:
    loss = build_loss("disttempnet", num_samples=4, embed_dim=2)
    assert loss.bfloat16().state.local("log_u").dtype == torch.float32
    assert next(loss.parameters()).dtype == torch.bfloat16
