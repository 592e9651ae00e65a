"""AmorLIP against its twin, and its networks. What all objectives share: tests/losses/test_every_objective.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from disttempnet import Features, build_loss
from disttempnet.losses.normaliser import amortised
from disttempnet.losses.normaliser.amortised import AmortisedPartition
from disttempnet.losses.objective import ObjectiveContext
from tests.losses.scenario import B, D, GlobalBatch, assert_same_steps, descend, joined, make, pairs, run, step, stream

close = torch.testing.assert_close
AMORLIP = {
    "name": "amorlip", "temperature": 0.1, "rho": 1.5, "rho_flip_epoch": 2, "partition_share_epochs": 2.0,
    "partition_lr": 0.02,
}  # fmt: skip


class Network(nn.Module):
    """The network of one side as modules."""

    def __init__(self, numbers: Tensor) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 1)
        self.norms = nn.ModuleList([nn.LayerNorm(D), nn.LayerNorm(D)])
        self.double()
        parts = iter(numbers.detach().split([D * D, D, D, D, D * D, D, D, D, D, 1]))
        with torch.no_grad():
            for layer, norm in ((self.first, self.norms[0]), (self.second, self.norms[1])):
                layer.weight.copy_(next(parts).view(D, D))
                layer.bias.copy_(next(parts))
                norm.weight.copy_(next(parts))
                norm.bias.copy_(next(parts))
            self.last.weight.copy_(next(parts)[None])
            self.last.bias.copy_(next(parts))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](torch.relu(self.first(x)))
        h = self.norms[1](torch.relu(self.second(h)))
        return self.last(torch.relu(h + x))[:, 0]

    def numbers(self) -> Tensor:
        layers = [(self.first, self.norms[0]), (self.second, self.norms[1])]
        parts = [p for layer, norm in layers for p in (layer.weight, layer.bias, norm.weight, norm.bias)]
        return torch.cat([p.detach().reshape(-1) for p in (*parts, self.last.weight, self.last.bias)])


class Twin:
    """Autograd of the written objective, torch's Adam; averages are lists of numbers."""

    def __init__(self, start: Tensor) -> None:
        self.before = [numbers.clone() for numbers in start]
        self.begin(start)

    def begin(self, start: Tensor) -> None:
        self.networks = [Network(numbers) for numbers in start]
        self.average = [numbers.clone() for numbers in start]
        self.adams = [torch.optim.Adam(network.parameters(), lr=0.02) for network in self.networks]
        self.batches = 0

    def begin_epoch(self, start: Tensor) -> None:
        self.before = self.average
        self.begin(start)

    def step(self, batch: GlobalBatch, tau: float, rho: float, beta: float) -> tuple[float, Tensor, Tensor, float]:
        """Value, gradients of features, and the derivative with respect to τ.

        L = [−2t mean s_ii + Σ_sides mean_i Σ_j w_ij exp(t s_ij)/Z̃_i] / sg(t) + ρ/t with t = 1/τ, of which this is half.
        """
        x, y = (side.clone().requires_grad_() for side in (batch.x, batch.y))
        at, ids = torch.tensor(tau, dtype=torch.float64, requires_grad=True), batch.ids
        t = 1 / at
        total = 0.5 * rho / t
        for side, (anchors, columns) in enumerate(((x, y), (y, x))):
            terms, own = [], []
            for i in range(B):
                weights = [1e-3 if i == j else float(ids[i] != ids[j]) for j in range(B)]
                terms.append(sum(w * (t * (anchors[i] @ columns[j])).exp() for j, w in enumerate(weights)))
                own.append(anchors[i] @ columns[i])
            z = torch.stack(terms)
            target = z.detach()
            if beta:
                target = beta * Network(self.before[side])(anchors.detach()).exp().detach() + (1 - beta) * z.detach()
            for i in range(B):
                total = total + 0.5 / B * (z[i] / target[i] - t * own[i]) / t.detach()
            for _ in range(3):
                self.adams[side].zero_grad()
                error = self.networks[side](anchors.detach()) - target.detach().log()
                error.square().mean().backward()
                self.adams[side].step()
        self.batches += 1
        if self.batches % 2 == 0:
            now = [network.numbers() for network in self.networks]
            self.average = [0.92 * old + 0.08 * new for old, new in zip(self.average, now, strict=True)]
        total.backward()
        return total.item(), x.grad, y.grad, at.grad.item()


def test_amorlip_follows_the_twin() -> None:
    """Value, gradients of features and τ, networks and averages, over four epochs with repeated ids; ρ changes sign."""
    loss = make(AMORLIP)
    twin = Twin(loss.partition.networks)
    for number, batch in enumerate(stream(8)):
        if number % 2 == 0 and number:
            twin.begin_epoch(AmortisedPartition(ObjectiveContext(1, D))._fresh(batch.epoch).double())
        one = math.exp(-loss.temperature.logit_scale.item())
        beta = 0.4 * (1 - math.cos(math.pi * min(1, batch.epoch / 2)))
        value, grad_x, grad_y, grad_tau = twin.step(batch, one, 1.5 if batch.epoch < 2 else -1.5, beta)
        actual = step(loss, batch)
        assert actual.total.item() == pytest.approx(value, rel=1e-10)
        close(actual.grad_x, grad_x, rtol=1e-9, atol=1e-11)
        close(actual.grad_y, grad_y, rtol=1e-9, atol=1e-11)
        assert actual.parameters["temperature.logit_scale"].item() == pytest.approx(-one * grad_tau, rel=1e-8)
        networks = torch.stack([network.numbers() for network in twin.networks])
        close(loss.partition.networks, networks, rtol=1e-8, atol=1e-10)
        close(loss.partition.average, torch.stack(twin.average), rtol=1e-8, atol=1e-10)
        descend(loss, 0.01)
    assert actual.metrics["normaliser_excess/image_mean"].abs() > 1e-3, "Z̃ is the batch's own: the case says little"


def test_the_networks_learn_the_partition_functions() -> None:
    """Of the same batch again and again they come near, and λ of the epoch before stands in for Z."""
    part = AmortisedPartition(ObjectiveContext(1, D), partition_lr=0.01, partition_share_epochs=1.0).double()
    x = torch.stack(pairs(32, 1))
    log_z = 3 + x[..., 0]
    for _ in range(400):
        part.fit(x, log_z)
    part.begin_epoch(1)
    assert part.beta(0) == 0
    assert part.beta(1) == part.beta(5) == pytest.approx(0.8)
    target = part.target(x, log_z + 1, epoch=1)
    mixed = (0.8 * log_z.exp() + 0.2 * (log_z + 1).exp()).log()
    assert (target - mixed).abs().mean() < 0.1


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = (AmortisedPartition(ObjectiveContext(1, D), partition_share_epochs=1.0).double() for _ in range(2))
    x = torch.stack(pairs(20, 1))
    log_z = 3 + x[..., 0]
    whole.fit(x, log_z)
    monkeypatch.setattr(amortised, "FITTED_ROWS", 7)
    parts.fit(x, log_z)
    close(parts.networks, whole.networks, rtol=1e-9, atol=1e-11)
    close(parts.target(x, log_z, 1), whole.target(x, log_z, 1), rtol=1e-11, atol=0)


def test_a_row_that_is_not_finite_moves_no_network() -> None:
    part = AmortisedPartition(ObjectiveContext(1, D)).double()
    start = part.networks.clone()
    x = torch.stack(pairs(4, 1))
    log_z = torch.zeros(2, 4, dtype=torch.float64)
    x[0, 1], log_z[1, 2] = torch.nan, torch.inf
    part.fit(x, log_z)
    assert part.networks.isfinite().all()
    assert not torch.equal(part.networks, start)


def test_a_new_epoch_begins_new_networks_once() -> None:
    loss = make(AMORLIP)
    first = loss.partition.networks.clone()
    loss.set_epoch(0)
    assert torch.equal(loss.partition.networks, first)
    step(loss, stream(1)[0])
    moved = loss.partition.average.clone()
    loss.set_epoch(1)
    assert torch.equal(loss.partition.before, moved)
    fresh = loss.partition.networks.clone()
    assert not torch.equal(fresh, first)
    loss.set_epoch(1)
    assert torch.equal(loss.partition.before, moved)
    assert torch.equal(loss.partition.networks, fresh)


def test_the_loop_may_count_its_steps() -> None:
    told = build_loss("amorlip", num_samples=16, embed_dim=D, steps_per_epoch=2, temperature=0.1).double()
    for batch in stream(3):
        told(Features.unit(batch.x, batch.y), batch.ids)
    assert told.epoch == 1


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_hold_the_same_networks(gloo, ranks: int) -> None:
    batches = stream(6, seed=2)
    assert_same_steps(joined(gloo(ranks, run, AMORLIP, batches)), run(AMORLIP, batches))


@pytest.mark.parametrize(
    ("argument", "value"),
    [("partition_lr", 0.0), ("partition_steps", -1), ("partition_average", 1.0), ("partition_share", 1.0),
     ("partition_share_epochs", 0.0), ("rho_flip_epoch", -1), ("rho", 0.0)],
)  # fmt: skip
def test_values_out_of_range_are_refused(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"amorlip: {argument}"):
        build_loss("amorlip", num_samples=9, embed_dim=D, **{argument: value})
