"""onlineCLR against its twin. What all objectives share: tests/losses/test_every_objective.py."""

from __future__ import annotations

import pytest
import torch

from tests.losses.oracle_minibatch import OnlineClr, online_objective
from tests.losses.scenario import B, D, GlobalBatch, leaves, make, pairs, step, stream, unique_batch

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
close = torch.testing.assert_close
ONLINE = {"name": "onlineclr"}


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("tau", [0.01, 0.2])
def test_onlineclr_follows_the_twin(gamma: float, tau: float) -> None:
    """With repeated ids, which are neither negatives nor positives of each other."""
    loss, twin = make(ONLINE, temperature=tau, gamma=gamma), OnlineClr(tau, gamma)
    for batch in stream(5):
        actual = step(loss, batch)
        value, grad_x, grad_y = twin.step(batch.x, batch.y, batch.ids)
        assert actual.total.item() == pytest.approx(value, rel=1e-11, abs=1e-12)
        close(actual.grad_x, grad_x, rtol=1e-9, atol=1e-12)
        close(actual.grad_y, grad_y, rtol=1e-9, atol=1e-12)
        close(actual.kept["log_u"], torch.tensor(twin.log_u(), dtype=torch.float64), **TIGHT)


def test_onlineclr_at_gamma_one_is_autograd_of_the_objective() -> None:
    loss = make(ONLINE, temperature=0.07, gamma=1.0)
    step(loss, unique_batch(1))
    batch = unique_batch(2)
    x, y = leaves(batch)
    value = online_objective(x, y, 0.07)
    value.backward()
    actual = step(loss, batch)
    close(actual.total, value.detach(), **TIGHT)
    close(actual.grad_x, x.grad, **TIGHT)
    close(actual.grad_y, y.grad, **TIGHT)


@pytest.mark.parametrize("visited", [False, True])
def test_onlineclr_without_negatives_has_the_positive_term_only(visited: bool) -> None:
    loss, twin = make(ONLINE), OnlineClr(0.01, 0.5)
    if visited:
        first = unique_batch(3)
        step(loss, first)
        twin.step(first.x, first.y, first.ids)
    batch = GlobalBatch(*pairs(B, 4), torch.full((B,), 3))
    before = loss.log_u.clone()
    actual = step(loss, batch)
    value, grad_x, grad_y = twin.step(batch.x, batch.y, batch.ids)
    assert actual.total.item() == pytest.approx(value, rel=1e-11)
    close(actual.grad_x, grad_x, **TIGHT)
    close(actual.grad_y, grad_y, **TIGHT)
    assert loss.log_u[0] == before[0]
    assert loss.log_u[1] != before[1]


def test_onlineclr_keeps_float32_steps_finite_when_the_state_is_stale() -> None:
    """exp(100) of negatives first, then none near: u falls by half a step, no weight overflows."""
    loss, twin = make(ONLINE).float(), OnlineClr(0.01, 0.5)
    x = torch.eye(B, D, dtype=torch.float64)
    x[D:] = x[: B - D]
    for y in (x.flip(0), x, x.flip(0)):
        actual = step(loss, GlobalBatch(x.float(), y.float(), torch.arange(B)))
        value, grad_x, _ = twin.step(x, y, torch.arange(B))
        assert actual.total.item() == pytest.approx(value, rel=1e-5)
        close(actual.grad_x.double(), grad_x, rtol=1e-4, atol=1e-6)
