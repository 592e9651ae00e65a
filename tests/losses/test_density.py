"""τ by density: its formula, neighbours, references, and what it means for the objective."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from disttempnet import Features, build_loss
from disttempnet.losses.density import DensityTemperature
from disttempnet.losses.temperature import Batch
from losses.oracle import Twin
from losses.scenario import (
    B,
    D,
    GlobalBatch,
    N,
    assert_same_steps,
    joined,
    make,
    pairs,
    run,
    step,
    stream,
    unique_batch,
)

close = torch.testing.assert_close
RECIPE = {"name": "disttempnet-density", "temperature": 0.1, "density_power": 0.3, "density_tau": 0.2, "gamma_min": 0.8}


def log_density(x: Tensor, y: Tensor, ids: list[int], t: float, i: int) -> float:
    """k_i but for the constant 1/t, from its definition, one pair after another."""
    k = 0.0
    for rows in (x, y):
        near = [math.exp(float(rows[i] @ rows[j]) / t) for j in range(len(rows)) if ids[j] != ids[i]]
        k += math.log(sum(near) / len(near)) / 2
    return k


def twin_tau(batch: GlobalBatch, tau0: float = 0.1, power: float = 0.3, t: float = 0.2) -> Tensor:
    ids = [int(i) for i in batch.ids]
    k = [log_density(batch.x, batch.y, ids, t, i) for i in range(len(ids))]
    mean = sum(k) / len(k)
    return torch.tensor([tau0 * math.exp(power * (value - mean)) for value in k], dtype=torch.float64)


def asked(batch: GlobalBatch, number: int = 0) -> Batch:
    return Batch(batch.x, batch.y, batch.x, batch.y, batch.ids, number)


def test_temperatures_and_objective_follow_the_twin() -> None:
    """With repeated ids, which are no neighbours of each other; value and gradients are the estimator's at those τ."""
    loss, twin = make(RECIPE, gamma_decay_epochs=1), Twin()
    for number, batch in enumerate(stream(4, seed=2)):
        tau = twin_tau(batch)
        close(torch.stack(loss.temperature(asked(batch))), tau.expand(2, -1), rtol=1e-12, atol=0)
        result = step(loss, batch)
        expected = twin.step(batch.x, batch.y, batch.ids, tau.expand(2, -1), 1.0 if number < 2 else 0.8)
        close(float(result.total), expected.value, rtol=1e-10, atol=1e-12)
        close(result.grad_x, expected.grad_x, rtol=1e-9, atol=1e-12)
        close(result.grad_y, expected.grad_y, rtol=1e-9, atol=1e-12)


def test_power_nought_is_one_temperature_for_all() -> None:
    batches = stream(3)
    gamma = {"gamma_min": 0.8, "gamma_decay_epochs": 2}
    one = run({"name": "fastclip-v1", "temperature": 0.1, **gamma}, batches)
    for flat, constant in zip(run({**RECIPE, **gamma, "density_power": 0.0}, batches), one, strict=True):
        close(flat.total, constant.total, rtol=0, atol=0)
        close(flat.grad_x, constant.grad_x, rtol=0, atol=0)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), rows=st.integers(3, 12), who=st.integers(0, 11))
def test_a_look_alike_raises_the_temperature_above_that_of_all_others(seed: int, rows: int, who: int) -> None:
    """Another pair at the same place: the two have the most crowded place where all others are further apart."""
    x, y = pairs(rows, seed, width=64)
    copied = who % rows
    x, y = torch.cat([x, x[copied : copied + 1]]), torch.cat([y, y[copied : copied + 1]])
    batch = GlobalBatch(x, y, torch.arange(rows + 1))
    loss = make(RECIPE, num_samples=rows + 1, embed_dim=64, density_tau=0.05, tau_min=1e-9, tau_max=1e9)
    tau, _ = loss.temperature(asked(batch))
    assert set(tau.topk(2).indices.tolist()) == {copied, rows}
    geometric = tau.log().mean().exp()
    close(geometric, torch.tensor(0.1, dtype=torch.float64), rtol=1e-10, atol=0)


def test_bounds_hold() -> None:
    batch = unique_batch(3)
    tau, _ = make(RECIPE, density_power=20.0, tau_min=0.05, tau_max=0.2).temperature(asked(batch))
    assert (tau.min(), tau.max()) == (0.05, 0.2)


def test_without_neighbours_it_is_the_temperature_itself() -> None:
    """All of one id; a single row; and one such row less makes no difference to the mean of the others."""
    ten = torch.full((4,), 0.1, dtype=torch.float64)
    loss = make(RECIPE)
    close(loss.temperature(asked(GlobalBatch(*pairs(4), torch.tensor([7, 7, 7, 7]))))[0], ten)
    close(loss.temperature(asked(unique_batch(1, rows=1)))[0], ten[:1])
    assert loss.temperatures(*pairs(5)).isfinite().all()


def test_pairs_outside_training_are_told_by_the_references() -> None:
    """Before the first step τ0; then by the density among references of another id, measured as among themselves."""
    loss, (first, second) = make(RECIPE, references=12), (unique_batch(1), unique_batch(2))
    x, y = pairs(5, seed=9)
    close(loss.temperatures(x, y), torch.full((2, 5), 0.1, dtype=torch.float64))
    for batch in (first, second):
        step(loss, batch)
    kept = loss.temperature.ids.tolist()
    assert kept == [*first.ids[-4:].tolist(), *second.ids.tolist()]
    kept_x, kept_y = (torch.cat([a[-4:], b]) for a, b in ((first.x, second.x), (first.y, second.y)))
    mean = sum(log_density(kept_x, kept_y, kept, 0.2, i) for i in range(12)) / 12
    for ids in (None, torch.tensor([kept[0], kept[5], 18, kept[11], kept[2]])):
        expected = []
        for i in range(5):
            with_it = torch.cat([kept_x, x[i : i + 1]]), torch.cat([kept_y, y[i : i + 1]])
            k = log_density(*with_it, [*kept, -1 if ids is None else int(ids[i])], 0.2, 12)
            expected.append(0.1 * math.exp(0.3 * (k - mean)))
        close(loss.temperatures(x, y, ids)[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0)


def test_what_is_told_later_is_on_the_scale_of_training() -> None:
    """The batch itself as references: the same τ; half of it, evenly: a geometric mean near τ0 all the same."""
    batch = unique_batch(4, rows=64)
    for references, tolerance in ((64, 1e-10), (32, 0.1)):
        loss = make(RECIPE, num_samples=64, references=references)
        own = loss.temperature(asked(batch))[0]
        assert loss.temperature.ids.tolist() == batch.ids[:: 64 // references].tolist()
        later = loss.temperatures(batch.x, batch.y, batch.ids)[0]
        close(later.log().mean().exp(), own.log().mean().exp(), rtol=tolerance, atol=0)
        if references == 64:
            close(later, own, rtol=1e-10, atol=0)


def test_references_are_kept_in_training_only() -> None:
    loss = make(RECIPE).eval()
    batch = unique_batch(1)
    loss(Features.unit(batch.x, batch.y), batch.ids)
    assert set(loss.temperature.ids.tolist()) == {-1}


def test_shuffle_gives_every_pair_the_temperature_of_another_in_training_only() -> None:
    batch = unique_batch(1)
    plain, shuffled = make(RECIPE), make(RECIPE, shuffle=True)
    own, others = plain.temperature(asked(batch))[0], shuffled.temperature(asked(batch))[0]
    assert (own != others).sum() > B // 2
    close(own.sort().values, others.sort().values, rtol=0, atol=0)
    again = shuffled.temperature(asked(batch, number=1))[0]
    assert (again != others).sum() > B // 2
    close(shuffled.eval().temperature(asked(batch))[0], own, rtol=0, atol=0)


@pytest.mark.parametrize("world_size", [2, 4])
def test_shuffle_crosses_ranks(gloo, world_size: int) -> None:
    recipe, batches = {**RECIPE, "shuffle": True}, stream(3, seed=3)
    assert_same_steps(joined(gloo(world_size, run, recipe, batches)), run(recipe, batches))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("temperature", 0.0),
        ("temperature", 2.0),
        ("density_tau", 0.0),
        ("density_power", -0.5),
        ("tau_min", 0.0),
        ("tau_max", 0.005),
        ("references", 0),
    ],
)
def test_values_out_of_range_are_named(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"disttempnet-density.*{argument}.*{value}"):
        build_loss("disttempnet-density", num_samples=N, embed_dim=D, **{argument: value})


def test_it_has_nothing_to_learn() -> None:
    loss = make(RECIPE)
    assert isinstance(loss.temperature, DensityTemperature)
    assert not list(loss.parameters())
