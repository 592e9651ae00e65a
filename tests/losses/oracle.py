"""The slow, obvious twins: float64, Python loops, a dict for the state, one process, linear not log domain.

Nothing here is shared with the package. Symbols: x, y unit features [B, D] of images and texts, side 0 = image anchors,
side 1 = text anchors, τ [2, B], u the running estimate of g, γ its learning rate, c = ½.

    d_ij  = s_ij − s_ii           with s_ij = x_i·y_j for an image anchor, y_i·x_j for a text anchor
    g_i   = mean over the negatives j of i of exp(d_ij/τ_i)          negatives: every column with another sample id
    u     ← g at the first visit, (1−γ)u + γg later;  equal ids in a batch count once, with the mean of their g
    p_ij  = exp(d_ij/τ_i) / (n_i (ε + u_i))

    value = c · mean_i τ_i (log (ε + u_i) + ρ), both sides summed
    ∂x, ∂y  = (c/B) Σ_i Σ_j p_ij ∇d_ij                              (weights constant; τ_i · 1/τ_i cancels)
    ∂τ_i    = (c/B) h_i,   batch: h = ρ − KL(softmax_j d_ij/τ_i ‖ uniform)
                           fcco:  h = log (ε + u_i) + ρ − Σ_j p_ij d_ij/τ_i; with a limit, only the part that
                                  staleness of u adds to the batch's h is clamped to ± the limit

Not robust: without the leading τ_i and without ρ, so that p gets a factor 1/τ_i and τ_i h is −Σ_j p_ij d_ij/τ_i,
clamped alike. Without γ (CLIP): every column counts, also i itself, nothing is kept, and g is a sum.

Margin m: ℓ_ij = [d_ij + m]₊² stands in place of d_ij everywhere but in ∇d_ij, which is multiplied by 2 [d_ij + m]₊.

Reference model: d_ij − d^ref_ij stands in place of d_ij everywhere but in ∇d_ij.

Drift: M of a side ← the mean of log g over the batch at first, then M + drift (mean − M). A u that was kept at M_old is
u exp(M − M_old) when it is read.

Linear sums are safe: |d/τ| ≤ 2/.005 = 400 and float64 holds e^±700.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

C = 0.5


@dataclass
class Step:
    """What one step of the objective should give; sample-wise tensors are [2, B], NaN log u = never visited."""

    value: float
    grad_x: Tensor
    grad_y: Tensor
    grad_tau: Tensor
    log_u: Tensor
    h: Tensor


@dataclass
class Twin:
    """The objective's per-sample state, `u[side][id]`, and the step that reads and writes it."""

    rho: float = 0.0
    tau_gradient: str = "fcco"
    robust: bool = True
    limit: float = math.inf
    eps: float = 0.0
    drift: float = 0.0
    margin: float | None = None
    u: tuple[dict[int, float], dict[int, float]] = field(default_factory=lambda: ({}, {}))
    means: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))  # M after every step
    mean_at: tuple[dict[int, float], dict[int, float]] = field(default_factory=lambda: ({}, {}))  # M at the last visit

    def log_u(self, ids: list[int]) -> Tensor:
        """[2, len(ids)], −inf where never visited; with drift as u was at the visit, relative to the first M."""
        rows = [
            [math.log(side[i]) - (at[i] - means[0] if self.drift else 0.0) if i in side else -math.inf for i in ids]
            for side, at, means in zip(self.u, self.mean_at, self.means, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def step(
        self,
        x: Tensor,
        y: Tensor,
        ids: Tensor,
        tau: Tensor,
        gamma: float | Callable[[float], float] | None,
        reference: tuple[Tensor, Tensor] | None = None,
    ) -> Step:
        """Update u and return value and gradients of the estimator.

        tau: [2, B], a constant is repeated. gamma: a number, or a function of a sample's ε + u before the visit.
        reference: features of another model on the same pairs.
        """
        x, y, tau = x.detach().double(), y.detach().double(), tau.detach().double()
        ids = [int(i) for i in ids]
        B = len(ids)
        value, h = 0.0, torch.zeros(2, B, dtype=torch.float64)
        grads = [torch.zeros_like(x), torch.zeros_like(y)]
        for side, (anchors, columns) in enumerate(((x, y), (y, x))):
            u = self.u[side]
            negatives = [[j for j in range(B) if ids[j] != ids[i] or gamma is None] for i in range(B)]
            d = [[float(anchors[i] @ (columns[j] - columns[i])) for j in range(B)] for i in range(B)]
            if reference is not None:
                theirs, others = reference[side].double(), reference[1 - side].double()
                d = [[d[i][j] - float(theirs[i] @ (others[j] - others[i])) for j in range(B)] for i in range(B)]
            slope = [[1.0] * B for _ in range(B)]
            if self.margin is not None:
                slope = [[2 * max(0.0, one + self.margin) for one in row] for row in d]
                d = [[max(0.0, one + self.margin) ** 2 for one in row] for row in d]
            e = [[math.exp(d[i][j] / float(tau[side, i])) for j in range(B)] for i in range(B)]
            g = [sum(e[i][j] for j in negatives[i]) / len(negatives[i]) if negatives[i] else None for i in range(B)]
            if self.drift and gamma is not None:
                self.follow(side, ids, g)
            for sample in set(ids) if gamma is not None else ():
                seen = [g[i] for i in range(B) if ids[i] == sample and g[i] is not None]
                if seen:
                    mean = sum(seen) / len(seen)
                    if self.drift and sample in u:
                        u[sample] *= math.exp(self.means[side][-1] - self.mean_at[side][sample])
                    if self.drift:
                        self.mean_at[side][sample] = self.means[side][-1]
                    rate = gamma(self.eps + u.get(sample, mean)) if callable(gamma) else gamma
                    u[sample] = (1 - rate) * u[sample] + rate * mean if sample in u else mean
            for i in range(B):
                n, t = len(negatives[i]), float(tau[side, i])
                if n == 0:
                    continue
                u_i = u[ids[i]] if gamma is not None else g[i]
                weight = t if self.robust else 1.0
                log_v = math.log(self.eps + u_i)
                value += C / B * (weight * (log_v + self.rho) + (math.log(B) if gamma is None else 0.0))
                mean_d, batch_d, kl = 0.0, 0.0, 0.0
                for j in negatives[i]:
                    p, q = e[i][j] / (n * (self.eps + u_i)), e[i][j] / (n * g[i])
                    mean_d += p * d[i][j] / t
                    batch_d += e[i][j] / (n * (self.eps + g[i])) * d[i][j] / t
                    kl += q * math.log(q * n) if q > 0 else 0.0
                    # d_ij = a_i·(z_j − z_i): the anchor a_i, its negative z_j, its positive z_i
                    pull = C / B * p * weight / t * slope[i][j]
                    grads[side][i] += pull * (columns[j] - columns[i])
                    grads[1 - side][j] += pull * anchors[i]
                    grads[1 - side][i] -= pull * anchors[i]
                fresh, full = -batch_d, -mean_d
                if self.robust:
                    fresh = self.rho + math.log(self.eps + g[i]) - batch_d if self.eps else self.rho - kl
                    full = self.rho + log_v - mean_d
                h[side, i] = fresh
                if self.tau_gradient == "fcco":
                    h[side, i] += min(self.limit, max(-self.limit, float(full - fresh)))
                if not self.robust:
                    h[side, i] /= t
        return Step(value, grads[0], grads[1], C / B * h, self.log_u(ids), h)

    def follow(self, side: int, ids: list[int], g: list[float | None]) -> None:
        """Move M of a side; equal ids each count with the mean of their g."""
        logs = []
        for i, own in enumerate(ids):
            seen = [g[j] for j in range(len(ids)) if ids[j] == own and g[j] is not None]
            logs += [math.log(sum(seen) / len(seen))] if g[i] is not None else []
        if logs:
            mean, means = sum(logs) / len(logs), self.means[side]
            means.append(means[-1] + self.drift * (mean - means[-1]) if means else mean)


@dataclass
class PerSampleTau:
    """τ of every sample and side, its own optimizer's memory, and how one gradient moves it."""

    start: float
    bounds: tuple[float, float]
    rate: float
    optimizer: str
    beta: float
    beta2: float = 0.0
    tau: tuple[dict[int, float], dict[int, float]] = field(default_factory=lambda: ({}, {}))
    memory: tuple[dict[int, list[float]], dict[int, list[float]]] = field(default_factory=lambda: ({}, {}))

    def read(self, ids: list[int]) -> Tensor:
        """[2, len(ids)]."""
        return torch.tensor([[side.get(i, self.start) for i in ids] for side in self.tau], dtype=torch.float64)

    def learn(self, ids: list[int], h: Tensor, has_negatives: bool = True) -> None:
        """h [2, B]; equal ids move once, with the mean of theirs."""
        for side in (0, 1):
            for sample in set(ids) if has_negatives else ():
                rows = [float(h[side, i]) for i in range(len(ids)) if ids[i] == sample]
                slope = sum(rows) / len(rows)
                m, v, visits = self.memory[side].get(sample, [0.0, 0.0, 0.0])
                if self.optimizer == "momentum":
                    m = (1 - self.beta) * m + self.beta * slope
                    move = m
                else:
                    visits += 1
                    m = self.beta * m + (1 - self.beta) * slope
                    v = self.beta2 * v + (1 - self.beta2) * slope**2
                    move = m / (1 - self.beta**visits) / (math.sqrt(v / (1 - self.beta2**visits)) + 1e-8)
                self.memory[side][sample] = [m, v, visits]
                moved = self.tau[side].get(sample, self.start) - self.rate * move
                self.tau[side][sample] = min(self.bounds[1], max(self.bounds[0], moved))


def written_objective(x: Tensor, y: Tensor, tau: Tensor, rho: float, robust: bool = True, eps: float = 0.0) -> Tensor:
    """c · mean_i [τ1 (log (ε + mean_j exp(d1_ij/τ1)) + ρ) + τ2 (…)], for autograd; ids differ, γ = 1, first visits.

    Not robust: c · mean_i [log (ε + mean_j exp(d1_ij/τ1)) + …].
    """
    B = len(x)
    total = x.new_zeros(())
    for side, (anchors, columns) in enumerate(((x, y), (y, x))):
        for i in range(B):
            others = [j for j in range(B) if j != i]
            d = torch.stack([anchors[i] @ columns[j] - anchors[i] @ columns[i] for j in others])
            log_g = (eps + (d / tau[side, i]).exp().mean()).log()
            total = total + (tau[side, i] * (log_g + rho) if robust else log_g)
    return C * total / B


def written_objective_repeated(x: Tensor, y: Tensor, ids: Tensor, tau: float) -> Tensor:
    """As above for one constant τ without ρ and with repeated ids: equal ids share the mean of their g."""
    B, ids = len(x), [int(i) for i in ids]
    total = x.new_zeros(())
    for anchors, columns in ((x, y), (y, x)):
        g = [
            torch.stack(
                [(anchors[i] @ (columns[j] - columns[i]) / tau).exp() for j in range(B) if ids[j] != ids[i]]
            ).mean()
            for i in range(B)
        ]
        for i in range(B):
            same = [g[j] for j in range(B) if ids[j] == ids[i]]
            total = total + tau * (sum(same) / len(same)).log()
    return C * total / B


def tempnet(weights: dict[str, Tensor], feature: Tensor, tau_min: float, tau_max: float, mask: Tensor) -> Tensor:
    """The ICML'24 temperature of every row of `feature` [n, D]; mask [n, D]: 0 or 1/(1 − dropout), ones in eval mode.

    f = mask·σ(W x + b);  q_m = f·P_m/‖P_m‖;  w = softmax(q / e^scaler);  o = Σ_m v_m (w_m − 1/M) σ(q_m) + v_0;
    τ = (τ_max − τ_min) σ(o) + τ_min.   weights: W, b, P, scaler, v, v0.
    """
    M = len(weights["P"])
    rows = []
    for row, kept in zip(feature.detach(), mask, strict=True):
        f = kept * torch.sigmoid(weights["W"] @ row + weights["b"])
        q = torch.stack([f @ prototype / prototype.norm() for prototype in weights["P"]])
        w = (q / weights["scaler"].exp()).exp()
        w = w / w.sum()
        o = sum(weights["v"][m] * (w[m] - 1 / M) * torch.sigmoid(q[m]) for m in range(M)) + weights["v0"]
        rows.append((tau_max - tau_min) * torch.sigmoid(o) + tau_min)
    return torch.stack(rows)


def mlp_temperature(
    weights: dict[str, Tensor], feature: Tensor, tau_min: float, tau_max: float, mask: Tensor
) -> Tensor:
    """The plain network's temperature of every row of `feature` [n, D]; mask as above, here on the input.

    o = Σ_k v_k z_k Φ(z_k) + v_0 with z = W (mask·x) + b, and Φ the normal distribution function (gelu);
    τ = (τ_max − τ_min) σ(o) + τ_min.   weights: W, b, v, v0.
    """
    rows = []
    for row, kept in zip(feature.detach(), mask, strict=True):
        z = weights["W"] @ (kept * row) + weights["b"]
        o = (weights["v"] * z * (1 + torch.erf(z / math.sqrt(2))) / 2).sum() + weights["v0"]
        rows.append(tau_min + (tau_max - tau_min) / (1 + (-o).exp()))
    return torch.stack(rows)


def clip_objective(x: Tensor, y: Tensor, scale: Tensor | float) -> Tensor:
    """½ (mean_i −log softmax_j(scale x_i·y_j)_i + the same with the sides exchanged), the scale held in [1, 100]."""
    scale = torch.as_tensor(scale, dtype=x.dtype).clamp(1, 100)
    total = x.new_zeros(())
    for anchors, columns in ((x, y), (y, x)):
        for i in range(len(x)):
            logits = scale * torch.stack([anchors[i] @ z for z in columns])
            total = total + torch.logsumexp(logits, 0) - logits[i]
    return total / (2 * len(x))


def inner_rate(epoch: int, gamma_min: float, epochs: int) -> float:
    """γ(e) = ½(1 + cos(πe/E))(1 − γ_min) + γ_min for e < E, then γ_min."""
    if epoch >= epochs:
        return gamma_min
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs)) * (1 - gamma_min) + gamma_min
