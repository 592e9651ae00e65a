"""NUCLR against its twin. What all objectives share: tests/losses/test_every_objective.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from disttempnet import build_loss
from disttempnet.losses.contrast import blocks
from tests.losses.scenario import B, D, GlobalBatch, N, leaves, make, step, stream, unique_batch

close = torch.testing.assert_close
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
NUCLR = {"name": "nuclr", "temperature": 0.1, "gamma": 0.6, "zeta": -0.1, "zeta_lr": 0.05, "zeta_start_epoch": 1}


@dataclass
class Twin:
    """Loops over the formulas, linear, float64. side 0: image anchors, whose negatives are texts with ζ of side 1.

    g_i = mean_j exp((d_ij − ζ_j)/τ), ε_i = exp(−ζ_partner/τ)/(N − 1), value ½ mean Σ τ log (ε + u) + ζ.
    """

    tau: float
    gamma: float
    start: float
    rate: float
    theta: float
    start_epoch: int
    u: tuple[dict[int, float], dict[int, float]] = field(default_factory=lambda: ({}, {}))
    zeta: tuple[dict[int, float], dict[int, float]] = field(default_factory=lambda: ({}, {}))  # of images, of texts
    z: tuple[dict[int, float], dict[int, float]] = field(default_factory=lambda: ({}, {}))

    def step(self, batch: GlobalBatch) -> tuple[float, Tensor, Tensor]:
        x, y, ids = batch.x, batch.y, batch.ids.tolist()
        grads, value, slopes = (torch.zeros_like(x), torch.zeros_like(y)), 0.0, []
        for side, (anchors, columns) in enumerate(((x, y), (y, x))):
            of = self.zeta[1 - side]
            zeta = [of.get(j, self.start) for j in ids]
            e = [
                [math.exp((float(anchors[i] @ (columns[j] - columns[i])) - zeta[j]) / self.tau) for j in range(B)]
                for i in range(B)
            ]
            others = [[j for j in range(B) if ids[j] != ids[i]] for i in range(B)]
            g = [sum(e[i][j] for j in others[i]) / len(others[i]) for i in range(B)]
            for sample in set(ids):
                seen = [g[i] for i in range(B) if ids[i] == sample]
                mean, u = sum(seen) / len(seen), self.u[side]
                u[sample] = (1 - self.gamma) * u[sample] + self.gamma * mean if sample in u else mean
            v = [math.exp(-zeta[i] / self.tau) / (N - 1) + self.u[side][ids[i]] for i in range(B)]
            for i in range(B):
                value += 0.5 / B * (self.tau * math.log(v[i]) + zeta[i])
                for j in others[i]:
                    pull = 0.5 / B * e[i][j] / (len(others[i]) * v[i])
                    grads[side][i] += pull * (columns[j] - columns[i])
                    grads[1 - side][j] += pull * anchors[i]
                    grads[1 - side][i] -= pull * anchors[i]
            weights = [sum(e[i][j] / v[i] for i in range(B) if ids[i] != ids[j] or i == j) / B for j in range(B)]
            slopes.append([1 - N / (N - 1) * weight for weight in weights])
        if batch.epoch >= self.start_epoch:
            for side, slope in ((1, slopes[0]), (0, slopes[1])):
                for sample in set(ids):
                    rows = [slope[i] for i in range(B) if ids[i] == sample]
                    mean, z = sum(rows) / len(rows), self.z[side]
                    z[sample] = (1 - self.theta) * z[sample] + self.theta * mean if sample in z else mean
                    self.zeta[side][sample] = self.zeta[side].get(sample, self.start) - self.rate * z[sample]
        return value, *grads


@pytest.mark.parametrize(("gamma", "theta"), [(0.6, 0.9), (1.0, 0.3)])
def test_nuclr_follows_the_twin(gamma: float, theta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value, gradients, u, ζ and z, with repeated ids over three epochs; in blocks of 5 × 3."""
    monkeypatch.setitem(blocks.BLOCKS, "cpu", (5, 3))
    loss = make({**NUCLR, "gamma": gamma, "zeta_theta": theta})
    twin = Twin(0.1, gamma, -0.1, 0.05, theta, 1)
    for batch in stream(6):
        value, grad_x, grad_y = twin.step(batch)
        actual = step(loss, batch)
        assert actual.total.item() == pytest.approx(value, rel=1e-8)  # ζ starts in float32
        close(actual.grad_x, grad_x, rtol=1e-6, atol=1e-8)
        close(actual.grad_y, grad_y, rtol=1e-6, atol=1e-8)
        everyone = torch.arange(N)
        u = loss.state.read(everyone).exp()
        zeta, z = loss.popularity.state.read(everyone).unflatten(0, (2, 2))
        for side in (0, 1):
            close(u[side], torch.tensor([twin.u[side].get(i, 0.0) for i in range(N)]).double(), rtol=1e-6, atol=1e-9)
            expected = torch.tensor([twin.zeta[side].get(i, -0.1) for i in range(N)], dtype=torch.float64)
            close(zeta[side], expected, rtol=1e-6, atol=1e-8)
            expected = torch.tensor([twin.z[side].get(i, 0.0) for i in range(N)], dtype=torch.float64)
            close(z[side], expected, rtol=1e-6, atol=1e-8)
    assert zeta.std() > 0.01, "ζ hardly moves: the case says little"


def test_at_gamma_one_it_is_autograd_of_the_objective() -> None:
    """½ mean Σ τ log (ε_i + mean_j exp((d_ij − ζ_j)/τ)) + ζ_i, with a ζ of every sample that has moved."""
    recipe = {**NUCLR, "gamma": 1.0, "zeta_start_epoch": 0}
    loss, batch = make(recipe), unique_batch(7)
    for seed in (5, 6):
        step(loss, unique_batch(seed))
    zeta = loss.popularity.state.read(batch.ids)[:2]
    assert zeta.std() > 1e-3
    x, y = leaves(batch)
    total = x.new_zeros(())
    for side, s in enumerate((x @ y.T, y @ x.T)):
        own = zeta[1 - side]
        e = ((s - s.diagonal()[:, None] - own) / 0.1).exp()[~torch.eye(B, dtype=torch.bool)].view(B, B - 1)
        total = total + 0.5 * (0.1 * ((-own / 0.1).exp() / (N - 1) + e.mean(1)).log() + own).mean()
    total.backward()
    actual = step(loss, batch)
    close(actual.total, total.detach(), **TIGHT)
    close(actual.grad_x, x.grad, **TIGHT)
    close(actual.grad_y, y.grad, **TIGHT)


def test_popularity_stands_still_with_the_weights() -> None:
    loss = make({**NUCLR, "zeta_start_epoch": 0})
    loss.set_still(True)
    step(loss, unique_batch(1))
    close(loss.popularity.state.local("zeta"), torch.full((2, N), -0.1).double(), rtol=1e-6, atol=0)
    assert loss.state.read(unique_batch(1).ids).isfinite().all()


@pytest.mark.parametrize(
    ("argument", "value"), [("zeta_lr", -1.0), ("zeta_theta", 0.0), ("zeta_start_epoch", -1), ("zeta", 100.0)]
)
def test_values_out_of_range_are_refused(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"nuclr: {argument}"):
        build_loss("nuclr", num_samples=9, embed_dim=D, **{argument: value})
