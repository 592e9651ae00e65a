"""CLIP's loss against a loop, against open_clip's, and over gloo ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.losses.oracle import clip_objective
from tests.losses.scenario import (
    B,
    D,
    GlobalBatch,
    assert_same_steps,
    joined,
    make,
    pairs,
    run,
    step,
    stream,
    unique_batch,
)

CLIP = {"name": "clip", "temperature": 0.07}
FIXED = {"name": "clip-constant", "temperature": 0.07}
TIGHT = {"rtol": 1e-9, "atol": 1e-11}
close = torch.testing.assert_close


def only_parameter(loss: torch.nn.Module) -> torch.nn.Parameter:
    (parameter,) = loss.parameters()
    return parameter


@pytest.mark.parametrize("temperature", [0.07, 0.5, 0.011])
@pytest.mark.parametrize("learnable", [True, False])
def test_value_and_gradients_are_those_of_the_loop(temperature: float, learnable: bool) -> None:
    loss, batch = make(CLIP if learnable else FIXED, temperature=temperature), unique_batch(1)
    actual = step(loss, batch)
    x, y = batch.x.clone().requires_grad_(), batch.y.clone().requires_grad_()
    # the start is kept in float32: take the scale that the loss really has
    scale = (
        torch.tensor(-math.log(temperature), dtype=torch.float64) if not learnable else only_parameter(loss).detach()
    )
    log_scale = scale.double().clone().requires_grad_()
    assert log_scale.item() == pytest.approx(-math.log(temperature), rel=1e-6)
    value = clip_objective(x, y, log_scale.exp())
    value.backward()
    close(actual.total, value.detach(), **TIGHT)
    close(actual.grad_x, x.grad, **TIGHT)
    close(actual.grad_y, y.grad, **TIGHT)
    assert len(actual.parameters) == learnable
    for gradient in actual.parameters.values():
        close(gradient, log_scale.grad, **TIGHT)
    close(loss.temperatures(batch.x, batch.y), torch.full((2, B), 1 / log_scale.exp().item()).double())


def test_equal_ids_stay_negatives() -> None:
    batch = unique_batch(2)
    plain = step(make(CLIP), batch)
    repeated = step(make(CLIP), GlobalBatch(batch.x, batch.y, torch.full((B,), 3)))
    assert_same_steps([repeated], [plain], tolerance=0)


@pytest.mark.parametrize(("temperature", "held"), [(0.005, 100.0), (2.5, 1.0)])
def test_learnable_scale_is_held_within_1_and_100(temperature: float, held: float) -> None:
    """A start outside is brought back, and so is a parameter that an optimizer pushed outside."""
    loss, batch = make(CLIP, temperature=temperature), unique_batch(3)
    expected = clip_objective(batch.x, batch.y, held)
    close(step(loss, batch).total, expected, rtol=1e-6, atol=0)
    with torch.no_grad():
        only_parameter(loss).copy_(torch.tensor(math.log(held * (3 if held > 1 else 1 / 3))))
    close(step(loss, batch).total, expected, rtol=1e-6, atol=0)
    close(loss.temperatures(batch.x, batch.y)[0, 0].item(), 1 / held, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [1, 2])
def test_smallest_batches(rows: int) -> None:
    batch = unique_batch(1, rows=rows)
    x, y = batch.x.clone().requires_grad_(), batch.y.clone().requires_grad_()
    actual = step(make(FIXED), batch)
    value = clip_objective(x, y, 1 / 0.07)
    value.backward()
    close(actual.total, value.detach(), **TIGHT)
    close(actual.grad_x, x.grad, **TIGHT)
    close(actual.grad_y, y.grad, **TIGHT)


@pytest.mark.parametrize("world_size", [2, 4])
def test_world_size_is_invisible_at_the_bound(gloo, world_size: int) -> None:
    recipe, batches = {**CLIP, "temperature": 0.0101}, stream(4)
    assert_same_steps(joined(gloo(world_size, run, recipe, batches, 3.0)), run(recipe, batches, 3.0))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_agrees_with_open_clip(gloo, world_size: int) -> None:
    """Value and gradients of the features and of the log-parametrised scale are open_clip's of the whole batch."""
    import disttempnet.models  # noqa: F401  # first: it makes torchvision importable beside any torch

    from open_clip.loss import ClipLoss as PeerLoss  # isort: skip

    batch = unique_batch(4)
    x, y = batch.x.clone().requires_grad_(), batch.y.clone().requires_grad_()
    log_scale = only_parameter(make(CLIP)).detach().clone().requires_grad_()
    value = PeerLoss()(x, y, log_scale.exp())
    value.backward()
    actual = run(CLIP, [batch]) if world_size == 1 else joined(gloo(world_size, run, CLIP, [batch]))
    close(actual[0].total, value.detach(), **TIGHT)
    close(actual[0].grad_x, x.grad, **TIGHT)
    close(actual[0].grad_y, y.grad, **TIGHT)
    (gradient,) = actual[0].parameters.values()
    close(gradient, log_scale.grad, **TIGHT)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(rows=st.integers(1, 9), seed=st.integers(0, 10_000), temperature=st.floats(0.02, 0.9))
def test_properties(rows: int, seed: int, temperature: float) -> None:
    """Follows the loop; order does not matter; 0 ≤ loss ≤ log B + 2/τ; the scale's own bounds do not."""
    x, y = pairs(rows, seed)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    loss = make(CLIP, temperature=temperature)
    plain = step(loss, GlobalBatch(x, y, torch.arange(rows)))
    mixed = step(loss, GlobalBatch(x[order], y[order], order))
    close(plain.total, clip_objective(x, y, only_parameter(loss).detach().exp()), **TIGHT)
    close(mixed.total, plain.total, **TIGHT)
    close(mixed.grad_x, plain.grad_x[order], **TIGHT)
    assert -1e-12 <= plain.total.item() <= math.log(rows) + 2 / temperature + 1e-6
    assert plain.grad_x.shape == (rows, D)
