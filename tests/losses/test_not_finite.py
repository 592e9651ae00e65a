"""One batch with inf or NaN: its value and gradient are not finite, and nothing of it is remembered."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from disttempnet import Features
from disttempnet.losses.sample_state import NEVER, SampleState
from tests.gloo import Pools
from tests.losses.scenario import EVERY, B, D, GlobalBatch, N, every_objective, local_rows, make, stream, unique_batch

close = torch.testing.assert_close
BAD = 5  # the row whose image overflowed
TRACKED = ["sogclr", "isogclr", "fastclip-v2", "fastclip-v3", "tempnet", "clip-per-sample"]


def overflown(batch: GlobalBatch, value: float = torch.inf) -> Tensor:
    x = batch.x.clone()
    x[BAD] = value
    return x


def train(recipe: dict, bad_steps: tuple[int, ...], value: float = torch.inf) -> tuple[torch.nn.Module, list[float]]:
    """Six steps of towers and objective under a GradScaler, which leaves out those whose gradient is not finite."""
    torch.manual_seed(0)
    tower, loss = torch.nn.Linear(D, D).double(), make(recipe)
    loss.set_epoch(0)
    optimizer = torch.optim.SGD([{"params": tower.parameters()}, *loss.parameter_groups()], lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    totals = []
    for number, batch in enumerate(stream(6)):
        image = tower(batch.x)
        if number in bad_steps:
            factor = torch.ones(B, 1, dtype=torch.float64)
            factor[BAD] = value
            image = image * factor
        total = loss(Features.of(image, batch.y), batch.ids).total
        optimizer.zero_grad()
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()
        totals.append(total.item())
    return loss, totals


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@every_objective
def test_the_steps_after_it_are_finite(recipe: dict, value: float) -> None:
    """Also where it is the first batch, from which prototypes start, and where GradScaler has to see it."""
    bad_steps = (0, 3)
    loss, totals = train(recipe, bad_steps, value)
    assert [step for step, total in enumerate(totals) if not abs(total) < torch.inf] == [*bad_steps]
    for key, state in loss.state_dict().items():
        assert (state < torch.inf).all(), key  # −inf: never visited


@pytest.mark.parametrize("name", TRACKED)
def test_rows_that_are_not_finite_keep_what_they_had_and_the_others_learn(name: str) -> None:
    """An image that overflowed: its own side, and all texts, which are contrasted with it, keep what they had. Images
    are contrasted with texts: theirs are those of the batch without the overflow."""
    recipe = {**EVERY[name], **({"dropout": 0.0} if "dropout" in EVERY[name] else {})}
    loss, batch = make(recipe), unique_batch(1)
    loss(Features.unit(*(side.flip(0) for side in (batch.x, batch.y))), batch.ids)
    clean = copy.deepcopy(loss)
    tables = {key: part for key, part in loss.named_modules() if isinstance(part, SampleState)}
    before = {key: table.read(batch.ids).clone() for key, table in tables.items()}
    out = loss(Features.unit(overflown(batch), batch.y), batch.ids)
    assert not out.total.isfinite()
    assert out.metrics["rows_not_finite"].item() == B + 1
    clean(Features.unit(batch.x, batch.y), batch.ids)
    others = torch.arange(B) != BAD
    for key, table in tables.items():
        after, expected = table.read(batch.ids), dict(clean.named_modules())[key].read(batch.ids)
        images, texts = slice(0, None, 2), slice(1, None, 2)
        close(after[texts], before[key][texts], rtol=0, atol=0)
        close(after[images, BAD], before[key][images, BAD], rtol=0, atol=0)
        close(after[images][:, others], expected[images][:, others], rtol=1e-12, atol=1e-12)
        assert (expected[images] != before[key][images]).any()


@pytest.mark.parametrize("name", TRACKED)
def test_the_count_goes_on(name: str) -> None:
    loss, batches = make(EVERY[name]), stream(3)
    loss.set_epoch(0)
    counts = []
    for number, batch in enumerate(batches):
        x = batch.x if number == 1 else overflown(batch)
        counts.append(int(loss(Features.unit(x, batch.y), batch.ids).metrics["rows_not_finite"]))
    assert 0 < counts[0] == counts[1] < counts[2]


def test_prototypes_stay_random_where_a_feature_is_not_finite() -> None:
    loss, batch = make(EVERY["tempnet"]), unique_batch(1)
    start = loss.temperature.text.prototypes.detach().clone()
    loss(Features.unit(overflown(batch), batch.y), batch.ids)
    expected = torch.cat([batch.x, start[B:]])
    expected[BAD] = start[BAD]
    close(loss.temperature.text.prototypes.detach(), expected, rtol=0, atol=0)
    close(loss.temperature.image.prototypes.detach()[:B], batch.y, rtol=0, atol=0)


def test_a_first_moment_of_minus_infinity_is_not_finite() -> None:
    """−inf is a value of log u alone."""
    state = SampleState(4, {"tau": 0.5, "momentum": 0.0})
    ids = torch.arange(4)
    state.write(ids, torch.ones(4, 4))
    new = torch.full((4, 4), 2.0)
    new[2, 1] = -torch.inf  # momentum, image side of sample 1
    state.write(ids, new)
    expected = torch.full((4, 4), 2.0)
    expected[[0, 2], 1] = 1.0
    close(state.read(ids), expected, rtol=0, atol=0)
    assert state.rows_not_finite == 1
    unseen = SampleState(4, {"log_u": NEVER})
    unseen.write(ids, torch.full((2, 4), NEVER))
    assert unseen.rows_not_finite == 0


def step_with_overflow(recipe: dict) -> tuple[int, dict[str, Tensor]]:
    loss = make(recipe)
    loss.set_epoch(0)
    for number, batch in enumerate(stream(3)):
        x = batch.x if number != 1 else overflown(batch)
        rows = Features.unit(local_rows(x), local_rows(batch.y))
        out = loss(rows, local_rows(batch.ids))
    tables = [part for part in loss.modules() if isinstance(part, SampleState)]
    return int(out.metrics["rows_not_finite"]), {str(i): t.read(torch.arange(N)) for i, t in enumerate(tables)}


@pytest.mark.parametrize("sharded", [False, True])
def test_an_overflow_on_one_rank_is_the_same_on_all(gloo: Pools, sharded: bool) -> None:
    for name in ("sogclr", "isogclr"):
        count, tables = step_with_overflow(EVERY[name])
        for other, theirs in gloo(2, step_with_overflow, {**EVERY[name], "shard_state": sharded}):
            assert other == count > B
            close(theirs, tables, rtol=1e-10, atol=1e-10)
