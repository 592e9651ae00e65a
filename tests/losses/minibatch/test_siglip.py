"""SigLIP against the loop over pairs. What all objectives share: tests/losses/test_every_objective.py."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.losses.oracle_minibatch import siglip
from tests.losses.scenario import GlobalBatch, leaves, make, pairs, step

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
close = torch.testing.assert_close
quick = settings(max_examples=10, deadline=None, derandomize=True)
SIGLIP = {"name": "siglip"}


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
