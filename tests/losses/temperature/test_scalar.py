"""The members of the family with learnable or per-sample temperatures, and CLIP per sample, against their twins."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from disttempnet import build_loss
from tests.losses.oracle import PerSampleTau, Twin, inner_rate, written_objective
from tests.losses.scenario import EVERY, B, D, GlobalBatch, N, descend, make, pairs, step, stream, unique_batch

TIGHT = {"rtol": 1e-9, "atol": 1e-11}
close = torch.testing.assert_close

LEARNABLE = {  # robust, γ of an epoch
    "fastclip-v0": (False, lambda epoch: inner_rate(epoch, 0.2, 2)),
    "fastclip-v3": (True, lambda epoch: inner_rate(epoch, 0.2, 2)),
    "fastclip-v3-constant-gamma": (True, lambda epoch: 0.2),
}
PER_SAMPLE = {  # robust, γ of an epoch, optimizer, its β; those with γ limit what staleness adds to ±5
    "clip-per-sample": (False, lambda epoch: None, "adam", 0.9),
    "isogclr": (True, lambda epoch: 0.8, "momentum", 0.5),
    "fastclip-v2": (True, lambda epoch: inner_rate(epoch, 0.2, 2), "adam", 0.9),
}
MODES = ("fcco", "batch")


def modes(name: str) -> tuple[str, ...]:
    return MODES if name != "clip-per-sample" else MODES[:1]


def log_scale(loss: nn.Module) -> nn.Parameter:
    (parameter,) = loss.parameters()
    return parameter


def constant(tau: float) -> Tensor:
    return torch.full((2, B), tau, dtype=torch.float64)


def test_fastclip_v1_follows_the_twin() -> None:
    loss, twin = make(EVERY["fastclip-v1"]), Twin()
    for batch in stream(6):
        actual = step(loss, batch)
        expected = twin.step(batch.x, batch.y, batch.ids, constant(0.06), inner_rate(batch.epoch, 0.2, 2))
        assert actual.total.item() == pytest.approx(expected.value, rel=1e-11)
        close(actual.grad_x, expected.grad_x, **TIGHT)
        close(actual.grad_y, expected.grad_y, **TIGHT)
        close(actual.log_u, expected.log_u, **TIGHT)


# ---- one learnable τ ----


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name in LEARNABLE for mode in MODES])
def test_learnable_temperature_follows_the_twin(name: str, mode: str) -> None:
    """∂ log scale = −τ Σ ∂τ_i over all anchors of both sides, at γ = 1 and below."""
    robust, gamma = LEARNABLE[name]
    loss = make(EVERY[name], tau_gradient=mode)
    twin = Twin(rho=1.2 if robust else 0.0, tau_gradient=mode, robust=robust)
    taus = set()
    for batch in stream(6):
        tau = math.exp(-log_scale(loss).item())
        actual = step(loss, batch)
        expected = twin.step(batch.x, batch.y, batch.ids, constant(tau), gamma(batch.epoch))
        assert actual.total.item() == pytest.approx(expected.value, rel=1e-11)
        close(actual.grad_x, expected.grad_x, **TIGHT)
        close(actual.grad_y, expected.grad_y, **TIGHT)
        close(actual.log_u, expected.log_u, **TIGHT)
        (gradient,) = actual.parameters.values()
        close(gradient, -tau * expected.grad_tau.sum(), **TIGHT)
        assert gradient.abs() > 1e-4
        taus.add(tau)
        descend(loss, 0.1 if robust else 0.01)
    assert len(taus) == 6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LEARNABLE)
def test_gamma_one_is_autograd_of_the_objective(name: str, mode: str) -> None:
    robust, _ = LEARNABLE[name]
    recipe = {**EVERY[name], "tau_gradient": mode, "temperature": 0.1}
    recipe |= {"gamma": 1.0} if name.endswith("gamma") else {"gamma_min": 1.0}
    loss, batch = make(recipe), unique_batch(9)
    step(loss, unique_batch(10))
    actual = step(loss, batch)
    x, y = batch.x.clone().requires_grad_(), batch.y.clone().requires_grad_()
    scale = log_scale(loss).detach().clone().requires_grad_()
    value = written_objective(x, y, (-scale).exp().expand(2, B), 1.2 if robust else 0.0, robust)
    value.backward()
    close(actual.total, value.detach(), **TIGHT)
    close(actual.grad_x, x.grad, **TIGHT)
    close(actual.grad_y, y.grad, **TIGHT)
    (gradient,) = actual.parameters.values()
    close(gradient, scale.grad, **TIGHT)


@pytest.mark.parametrize("limit", [5.0, 0.0])
@pytest.mark.parametrize("name", LEARNABLE)
def test_only_what_staleness_adds_is_limited(name: str, limit: float) -> None:
    """At τ = .02 a state of other batches is far from this one: the limit is reached, by the twin as well."""
    robust, _ = LEARNABLE[name]
    loss = make(EVERY[name], temperature=0.02, tau_min=0.005, tau_gradient_limit=limit)
    loss.set_epoch(5)
    twins = [Twin(1.2 if robust else 0.0, mode, robust, limit or math.inf) for mode in MODES]
    for seed in (3, 4, 5):
        batch = GlobalBatch(*pairs(B, seed), torch.arange(B), epoch=5)
        tau = math.exp(-log_scale(loss).item())
        (gradient,) = step(loss, batch).parameters.values()
        limited, fresh = (twin.step(batch.x, batch.y, batch.ids, constant(tau), 0.2) for twin in twins)
        close(gradient, -tau * limited.grad_tau.sum(), rtol=1e-8, atol=1e-11)
    moved = (limited.h - fresh.h).abs().max().item() * (1 if robust else tau)
    assert moved == pytest.approx(5.0) if limit else moved > 10, "this case should reach the limit"


def test_v3_slows_down_below_the_threshold() -> None:
    """lr_τ is a third in epochs that begin with τ < .03, and comes back."""
    loss = build_loss("fastclip-v3", num_samples=N, embed_dim=D, temperature=0.05)
    rates = []
    for epoch, tau in enumerate((0.05, 0.029, 0.031), start=1):
        with torch.no_grad():
            log_scale(loss).fill_(-math.log(tau))
        loss.set_epoch(epoch)
        loss.set_epoch(epoch)
        rates.append(loss.temperature.learning_rate(epoch))
    assert rates == pytest.approx([2e-4, 2e-4 / 3, 2e-4])


def test_v3_keeps_its_rate_within_an_epoch_also_when_resumed() -> None:
    loss, resumed = (build_loss("fastclip-v3", num_samples=N, embed_dim=D, temperature=0.05) for _ in range(2))
    loss.set_epoch(1)
    with torch.no_grad():
        log_scale(loss).fill_(-math.log(0.02))
    resumed.load_state_dict(loss.state_dict())
    for one in (loss, resumed):
        one.set_epoch(1)
        assert one.temperature.learning_rate(1) == pytest.approx(2e-4)
        one.set_epoch(2)
        assert one.temperature.learning_rate(2) == pytest.approx(2e-4 / 3)


def test_evaluation_leaves_a_scale_outside_its_bounds_alone() -> None:
    loss = make(EVERY["fastclip-v3"]).eval()
    with torch.no_grad():
        log_scale(loss).fill_(9.0)
    step(loss, unique_batch(1))
    assert log_scale(loss).item() == 9.0


# ---- τ per sample ----


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name in PER_SAMPLE for mode in modes(name)])
def test_per_sample_temperature_follows_the_twin(name: str, mode: str) -> None:
    """Value, gradients, τ and every momentum after each step; repeated ids move once, by the mean of their h."""
    robust, gamma, optimizer, beta = PER_SAMPLE[name]
    loss = make(EVERY[name]) if name == "clip-per-sample" else make(EVERY[name], tau_gradient=mode)
    twin = Twin(1.2 if robust else 0.0, mode, robust, 5.0)
    start = torch.tensor(0.06).item()  # the table starts in float32
    table = PerSampleTau(start, (0.02, 0.3), 0.01, optimizer, beta, 0.999)
    for batch in stream(6):
        ids = batch.ids.tolist()
        assert len(set(ids)) < B
        actual = step(loss, batch)
        expected = twin.step(batch.x, batch.y, batch.ids, table.read(ids), gamma(batch.epoch))
        assert actual.total.item() == pytest.approx(expected.value, rel=1e-10)
        close(actual.grad_x, expected.grad_x, **TIGHT)
        close(actual.grad_y, expected.grad_y, **TIGHT)
        table.learn(ids, expected.h)
        tau, *memory = actual.kept["temperature.state"].unflatten(0, (-1, 2))
        close(tau, table.read(ids), **TIGHT)
        for number, column in enumerate(memory):
            wanted = [[side[i][number] for i in ids] for side in table.memory]
            close(column, torch.tensor(wanted, dtype=torch.float64), **TIGHT)
    assert len(memory) == (1 if optimizer == "momentum" else 3)
    everyone = torch.arange(N)
    close(loss.temperatures(*pairs(N), everyone), table.read(everyone.tolist()), **TIGHT)
    seen = sorted({int(i) for batch in stream(6) for i in batch.ids})
    assert len(seen) < N, "the stream should leave a sample unseen"
    close(loss.tracked_temperatures(), table.read(seen), **TIGHT)
    assert loss.temperatures(*pairs(N)) is None
    assert not list(loss.parameters())
    assert table.read(everyone.tolist()).std() > 1e-3


def test_per_sample_temperature_stays_within_its_bounds() -> None:
    for name in PER_SAMPLE:
        loss = make(EVERY[name], tau_lr=1.0)
        for batch in stream(3):
            step(loss, batch)
        tau = loss.tracked_temperatures()
        assert tau.min().item() >= 0.02
        assert tau.max().item() <= 0.3
        assert (tau == 0.02).any() or (tau == 0.3).any()


@pytest.mark.parametrize("visited", [False, True])
@pytest.mark.parametrize("name", ["isogclr", "fastclip-v2", "fastclip-v3", "fastclip-v0", "fastclip-v1"])
def test_without_negatives_nothing_happens(name: str, visited: bool) -> None:
    loss = make(EVERY[name])
    if visited:
        step(loss, GlobalBatch(*pairs(B, 2), torch.arange(B)))
    before = {key: value.clone() for key, value in loss.state_dict().items() if not key.endswith("_extra_state")}
    actual = step(loss, GlobalBatch(*pairs(B, 1), torch.full((B,), 3)))
    assert actual.total.item() == 0
    for gradient in (actual.grad_x, actual.grad_y, *actual.parameters.values()):
        close(gradient, torch.zeros_like(gradient), rtol=0, atol=0)
    after = loss.state_dict()
    for key, value in before.items():
        close(after[key], value, rtol=0, atol=0)


def test_clip_per_sample_counts_equal_ids_as_negatives() -> None:
    batch = unique_batch(2)
    plain = step(make(EVERY["clip-per-sample"]), batch)
    repeated = step(make(EVERY["clip-per-sample"]), GlobalBatch(batch.x, batch.y, torch.full((B,), 3)))
    close(repeated.total, plain.total, rtol=0, atol=0)
    close(repeated.grad_x, plain.grad_x, rtol=0, atol=0)


def test_per_sample_temperatures_are_tracked_once_seen() -> None:
    loss = make(EVERY["isogclr"])
    assert loss.tracked_temperatures().shape == (2, 0)
    step(loss, unique_batch(2))
    assert loss.tracked_temperatures().shape == (2, B)
