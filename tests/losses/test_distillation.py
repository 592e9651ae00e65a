"""A reference model: the robust form with d − d^ref against its twin, and distillation against autograd."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from disttempnet import Features, build_loss
from disttempnet.losses.contrast import blocks
from disttempnet.losses.distillation import REFERENCE_TAU
from tests.losses.oracle import Twin, inner_rate
from tests.losses.scenario import EVERY, B, D, GlobalBatch, N, leaves, make, reference_of, step, stream, unique_batch

close = torch.testing.assert_close
TIGHT = {"rtol": 1e-11, "atol": 1e-12}
CONSTANT = {"name": "drrho", "temperature": 0.06, "gamma_min": 0.2, "gamma_decay_epochs": 2.0}
LEARNABLE = {"name": "drrho-learnable", "temperature": 0.06, "rho": 1.2, "gamma_min": 0.2, "gamma_decay_epochs": 2.0}


@pytest.mark.parametrize("recipe", [CONSTANT, LEARNABLE, {**CONSTANT, "eps": 0.01, "drift": 0.3}])
def test_the_estimator_with_a_reference_follows_the_twin(recipe: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value, gradients of features and τ, and table, with repeated ids over three epochs; in blocks of 5 × 3."""
    monkeypatch.setitem(blocks.BLOCKS, "cpu", (5, 3))
    loss = make(recipe)
    twin = Twin(recipe.get("rho", 0.0), eps=recipe.get("eps", 0.0), drift=recipe.get("drift", 0.0))
    plain = Twin(recipe.get("rho", 0.0))
    learns = "rho" in recipe
    one = math.exp(-loss.temperature.logit_scale.item()) if learns else recipe["temperature"]
    tau = torch.full((2, B), one, dtype=torch.float64)
    for batch in stream(6):
        gamma = inner_rate(batch.epoch, 0.2, 2)
        reference = reference_of(batch.x, batch.y)
        expected = twin.step(batch.x, batch.y, batch.ids, tau, gamma, reference)
        actual = step(loss, batch)
        assert actual.total.item() == pytest.approx(expected.value, rel=1e-11)
        close(actual.grad_x, expected.grad_x, **TIGHT)
        close(actual.grad_y, expected.grad_y, **TIGHT)
        close(actual.log_u, expected.log_u, **TIGHT)
        for gradient in actual.parameters.values():
            close(gradient, -one * expected.grad_tau.sum(), rtol=1e-9, atol=1e-11)
        other = plain.step(batch.x, batch.y, batch.ids, tau, gamma)
    assert (other.grad_x - expected.grad_x).abs().max() > 1e-3, "the reference hardly matters"


def cross_entropy(x: Tensor, y: Tensor, reference: tuple[Tensor, Tensor], tau: Tensor) -> Tensor:
    """½ Σ_sides −mean_i Σ_j softmax_j(100 s^ref_ij) log softmax_j(s_ij / τ_i)."""
    total = x.new_zeros(())
    for side, (anchors, columns) in enumerate(((x, y), (y, x))):
        for i in range(len(x)):
            target = torch.softmax(100 * torch.stack([reference[side][i] @ z for z in reference[1 - side]]), 0)
            ours = torch.log_softmax(torch.stack([anchors[i] @ z for z in columns]) / tau[side, i], 0)
            total = total - 0.5 * (target * ours).sum() / len(x)
    return total


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("recipe", [CONSTANT, LEARNABLE], ids=["constant", "learnable"])
def test_distillation_is_autograd_of_the_cross_entropy(
    recipe: dict, weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Added to the value, to the gradients of features and τ; equal ids are columns as any other."""
    monkeypatch.setitem(blocks.BLOCKS, "cpu", (5, 3))
    loss, plain = make({**recipe, "distillation": weight}), make(recipe)
    for batch in stream(3):
        actual, without = step(loss, batch), step(plain, batch)
        x, y = leaves(batch)
        scale = getattr(loss.temperature, "logit_scale", None)
        log_scale = torch.tensor(-math.log(0.06), dtype=torch.float64) if scale is None else scale.detach().clone()
        log_scale.requires_grad_()
        value = weight * cross_entropy(x, y, reference_of(x, y), (-log_scale).exp().expand(2, B))
        value.backward()
        close(actual.total, without.total + value.detach(), **TIGHT)
        close(actual.metrics["loss"], actual.total, **TIGHT)
        close(actual.metrics["distillation"], value.detach() / weight, **TIGHT)
        close(actual.grad_x, without.grad_x + x.grad, **TIGHT)
        close(actual.grad_y, without.grad_y + y.grad, **TIGHT)
        for name, gradient in actual.parameters.items():
            close(gradient, without.parameters[name] + log_scale.grad, rtol=1e-9, atol=1e-11)


def test_a_reference_that_is_the_model_leaves_nothing_to_learn() -> None:
    """δ = 0 for all: the value is 0, every negative has the same weight, and the target is met at its own τ."""
    loss = build_loss("drrho", num_samples=N, embed_dim=D, temperature=REFERENCE_TAU, distillation=1.0).double()
    loss.set_epoch(0)
    x, y = leaves(unique_batch(3))
    out = loss(Features.unit(x, y)._replace(reference_image=x.detach(), reference_text=y.detach()), unique_batch(3).ids)
    out.total.backward()
    s = x.detach() @ y.detach().T
    targets = [torch.softmax(100 * side, 1) for side in (s, s.T)]
    entropy = sum(-0.5 * (target * target.log()).sum(1).mean() for target in targets)
    close(out.total.detach(), entropy, rtol=1e-9, atol=0)
    even = 0.5 / B * 2 * (y.detach().sum(0) - B * y.detach()) / (B - 1)
    close(x.grad, even, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["drrho", "drrho-learnable"])
def test_a_reference_has_no_gradient(name: str) -> None:
    loss, batch = build_loss(name, num_samples=N, embed_dim=D, rho=1.0) if name != "drrho" else None, unique_batch(1)
    loss = loss or build_loss(name, num_samples=N, embed_dim=D)
    loss.set_epoch(0)
    theirs = [side.float().requires_grad_() for side in reference_of(batch.x, batch.y)]
    out = loss(Features.of(batch.x.float().requires_grad_(), batch.y.float(), reference=tuple(theirs)), batch.ids)
    out.total.backward()
    assert all(side.grad is None for side in theirs)
    assert out.total.dtype == torch.float32


def test_missing_features_of_the_reference_are_named() -> None:
    loss, batch = build_loss("drrho", num_samples=N, embed_dim=D), unique_batch(1)
    with pytest.raises(ValueError, match="features of a reference model are needed"):
        loss(Features.unit(batch.x, batch.y), batch.ids)
    image, text = reference_of(batch.x, batch.y)
    for wrong in ((image[:3], text[:3]), (image, text[:, :2])):
        with pytest.raises(ValueError, match=r"must both be \[8, R\]"):
            loss(Features.unit(batch.x, batch.y)._replace(reference_image=wrong[0], reference_text=wrong[1]), batch.ids)


def test_references_of_any_norm_and_width() -> None:
    batch, widths = unique_batch(2), []
    for width in (3, 11):
        loss = build_loss("drrho", num_samples=N, embed_dim=D, temperature=0.1).double()
        loss.set_epoch(0)
        theirs = [
            torch.randn(B, width, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1)
        ]
        total = loss(Features.of(batch.x, batch.y, reference=(4 * theirs[0], theirs[1])), batch.ids).total
        twin, (image, text) = Twin(), (F.normalize(side, dim=1) for side in theirs)
        tau = torch.full((2, B), 0.1, dtype=torch.float64)
        expected = twin.step(batch.x, batch.y, batch.ids, tau, 1.0, (image, text))
        assert total.item() == pytest.approx(expected.value, rel=1e-11)
        widths.append(total.item())
    assert widths[0] != widths[1]


def test_without_its_negatives_nothing_but_the_target_pulls() -> None:
    batch = GlobalBatch(unique_batch(1).x, unique_batch(1).y, torch.full((B,), 3))
    assert not step(make(EVERY["drrho"]), batch).grad_x.any()
    assert step(make({**EVERY["drrho"], "distillation": 1.0}), batch).grad_x.any()
