"""SigLIP, CyCLIP, VICReg, onlineCLR against loops over pairs. What all objectives share: test_every_objective.py."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from disttempnet import Features
from tests.losses.oracle import clip_objective
from tests.losses.oracle_minibatch import OnlineClr, cyclic, online_objective, siglip, vicreg
from tests.losses.scenario import B, D, GlobalBatch, make, pairs, step, stream, unique_batch

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
close = torch.testing.assert_close
quick = settings(max_examples=10, deadline=None, derandomize=True)
SIGLIP, CYCLIP, VICREG, ONLINE = ({"name": name} for name in ("siglip", "cyclip", "vicreg", "onlineclr"))


def leaves(batch: GlobalBatch) -> tuple[Tensor, Tensor]:
    return batch.x.clone().requires_grad_(), batch.y.clone().requires_grad_()


# ---- SigLIP ----


@quick
@given(rows=st.integers(1, 9), seed=st.integers(0, 1000), tau=st.floats(0.01, 1.0), bias=st.floats(-30, 5))
def test_siglip_is_the_loop(rows: int, seed: int, tau: float, bias: float) -> None:
    """Value, features, t' and b; equal ids count for nothing."""
    loss = make(SIGLIP, temperature=tau, bias=bias)
    batch = GlobalBatch(*pairs(rows, seed), torch.zeros(rows, dtype=torch.int64))
    t, b = (p.detach().clone().requires_grad_() for p in (loss.logit_scale, loss.logit_bias))
    assert t.item() == pytest.approx(-math.log(tau), rel=1e-6, abs=1e-6)
    assert b.item() == pytest.approx(bias, rel=1e-6)
    x, y = leaves(batch)
    value = siglip(x, y, t, b)
    value.backward()
    actual = step(loss, batch)
    loop = {"rtol": 1e-7, "atol": 1e-9}  # the loop's log σ is not the stable one
    close(actual.total, value.detach(), **loop)
    close(actual.grad_x, x.grad, **loop)
    close(actual.grad_y, y.grad, **loop)
    close(actual.parameters["logit_scale"], t.grad, **loop)
    close(actual.parameters["logit_bias"], b.grad, **loop)
    close(loss.temperatures(batch.x, batch.y), (-t.detach()).exp().expand(2, rows))


def test_siglip_is_finite_where_sigmoids_end() -> None:
    """Logits of ±1,000 in float32: losses grow linearly, gradients end at 0 and 1."""
    x = torch.eye(2)
    loss = make(SIGLIP, temperature=0.001, bias=0.0).float()
    right = step(loss, GlobalBatch(x, x, torch.arange(2)))
    assert right.total.item() == pytest.approx(math.log(2), rel=1e-6)  # the two zeros
    wrong = step(loss, GlobalBatch(x, -x, torch.arange(2)))
    assert wrong.total.item() == pytest.approx(1000 + math.log(2), rel=1e-5)
    close(wrong.grad_x.diagonal(), torch.full((2,), 500.0), rtol=1e-5, atol=0)


# ---- CyCLIP ----


@pytest.mark.parametrize(("in_modal", "cross_modal"), [(0.25, 0.25), (1.0, 0.0), (0.0, 1.0)])
def test_cyclip_is_the_loop(in_modal: float, cross_modal: float) -> None:
    loss, batch = make(CYCLIP, in_modal=in_modal, cross_modal=cross_modal), unique_batch(1)
    (log_scale,) = (p.detach().clone().requires_grad_() for p in loss.parameters())
    x, y = leaves(batch)
    terms = cyclic(x, y)
    value = clip_objective(x, y, log_scale.exp()) + in_modal * terms[0] + cross_modal * terms[1]
    value.backward()
    actual = step(loss, batch)
    close(actual.total, value.detach(), **TIGHT)
    close(actual.metrics["loss"], value.detach(), **TIGHT)
    close(actual.metrics["in_modal"], terms[0].detach(), **TIGHT)
    close(actual.metrics["cross_modal"], terms[1].detach(), **TIGHT)
    close(actual.grad_x, x.grad, **TIGHT)
    close(actual.grad_y, y.grad, **TIGHT)
    (gradient,) = actual.parameters.values()
    close(gradient, log_scale.grad, **TIGHT)


def test_cyclip_cancels_nothing_in_float32() -> None:
    """Pairs that agree to 1e-3: the terms are 1e-6 of B, which the difference of Gram matrices loses in float32."""
    rows, width = 512, 64
    x, y = pairs(rows, 3, width, noise=1e-3)
    x, y = x.float(), y.float()  # the same numbers for both
    X, Y = (z.double().requires_grad_() for z in (x, y))
    exact = [((X @ X.T - Y @ Y.T) ** 2).sum() / rows, ((X @ Y.T - Y @ X.T) ** 2).sum() / rows]
    (exact[0] + exact[1]).backward()
    cyclic_only = [z.clone().requires_grad_() for z in (x, y)]
    value, in_modal, cross_modal = make(CYCLIP, in_modal=1.0, cross_modal=1.0)._cyclic(*cyclic_only)
    value.backward()
    close(in_modal.double(), exact[0].detach(), rtol=1e-4, atol=0)
    close(cross_modal.double(), exact[1].detach(), rtol=1e-4, atol=0)
    for actual, expected in zip(cyclic_only, (X, Y), strict=True):
        error = (actual.grad.double() - expected.grad).norm() / expected.grad.norm()
        assert error < 1e-4
    naive = ((x.T @ x).square().sum() - 2 * (x.T @ y).square().sum() + (y.T @ y).square().sum()) / rows
    assert abs(naive - exact[0]) > 1e-3 * exact[0], "the plain form would do: the case says little"


# ---- VICReg ----


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_vicreg_is_the_loop(scale: float) -> None:
    """Rows of any norm; below, around and above the hinge at a standard deviation of 1."""
    batch = unique_batch(2)
    offset = torch.linspace(-2, 3, D, dtype=torch.float64)
    factors = torch.linspace(0.5, 5, D, dtype=torch.float64)
    batch = GlobalBatch(scale * batch.x * factors + offset, scale * batch.y * factors, batch.ids)
    x, y = leaves(batch)
    value = vicreg(x, y)
    value.backward()
    actual = step(make(VICREG), batch)
    close(actual.total, value.detach(), **TIGHT)
    close(actual.grad_x, x.grad, **TIGHT)
    close(actual.grad_y, y.grad, **TIGHT)
    if scale == 1.0:
        std = batch.x.std(0)
        assert std.min() < 1 < std.max(), "the case should lie on both sides of the hinge"


def test_vicreg_weights_its_terms() -> None:
    x, y = leaves(unique_batch(3))
    terms = step(make(VICREG), GlobalBatch(x.detach(), y.detach(), torch.arange(B))).metrics
    for weights in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
        loss = make(VICREG, **dict(zip(("invariance", "variance", "covariance"), weights, strict=True)))
        actual = step(loss, GlobalBatch(x.detach(), y.detach(), torch.arange(B)))
        x.grad = y.grad = None
        value = vicreg(x, y, weights)
        value.backward()
        close(actual.total, value.detach(), **TIGHT)
        close(actual.grad_x, x.grad, **TIGHT)
        (term,) = (
            name for name, weight in zip(("invariance", "variance", "covariance"), weights, strict=True) if weight
        )
        close(terms[term], value.detach(), **TIGHT)


def test_vicreg_reads_the_embeddings_before_normalising() -> None:
    x, y = leaves(unique_batch(4))
    value = vicreg(3 * x, 5 * y)
    out = make(VICREG)(Features.of(3 * x, 5 * y), torch.arange(B))
    close(out.total, value, **TIGHT)
    close(torch.autograd.grad(out.total, (x, y)), torch.autograd.grad(value, (x, y)), **TIGHT)
    assert make(VICREG).temperatures(x, y) is None


def test_vicreg_of_one_row_pulls_the_pair_together_and_no_more() -> None:
    batch = unique_batch(5, rows=1)
    actual = step(make(VICREG), batch)
    gap = batch.x - batch.y
    close(actual.total, 25 * gap.square().mean() + torch.tensor(25 * (1 - 1e-2)).double(), **TIGHT)
    close(actual.grad_x, 50 * gap / D, **TIGHT)
    close(actual.grad_y, -50 * gap / D, **TIGHT)


def test_vicreg_far_from_the_origin_in_float32() -> None:
    """Second moments are taken after centring: an offset of 100 costs nothing."""
    batch = unique_batch(6)
    near = step(make(VICREG), batch)
    far = step(make(VICREG), GlobalBatch((batch.x + 128).float(), (batch.y + 128).float(), batch.ids))
    close(far.total.double(), near.total, rtol=1e-3, atol=0)
    close(far.grad_x.double(), near.grad_x, rtol=5e-3, atol=1e-4)


# ---- onlineCLR ----


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
