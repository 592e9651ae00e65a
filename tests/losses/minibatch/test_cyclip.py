"""CyCLIP against the loop over pairs. What all objectives share: tests/losses/test_every_objective.py."""

from __future__ import annotations

import pytest
import torch

from tests.losses.oracle import clip_objective
from tests.losses.oracle_minibatch import cyclic
from tests.losses.scenario import leaves, make, pairs, step, unique_batch

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
close = torch.testing.assert_close
CYCLIP = {"name": "cyclip"}


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
