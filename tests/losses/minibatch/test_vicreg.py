"""VICReg against sums over rows. What all objectives share: tests/losses/test_every_objective.py."""

from __future__ import annotations

import pytest
import torch

from disttempnet import Features
from tests.losses.oracle_minibatch import vicreg
from tests.losses.scenario import B, D, GlobalBatch, leaves, make, step, unique_batch

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
close = torch.testing.assert_close
VICREG = {"name": "vicreg"}


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
