"""The mini-batch objectives as their papers write them: float64, loops over pairs, for autograd. x, y: [B, D]."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def siglip(x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    """−(1/B) Σ_ij log σ(z_ij (e^t' x_i·y_j + b)), z = 1 on the pair and −1 elsewhere."""
    total = x.new_zeros(())
    for i in range(len(x)):
        for j in range(len(x)):
            z = 1 if i == j else -1
            total = total - torch.log(torch.sigmoid(z * (log_scale.exp() * (x[i] @ y[j]) + bias)))
    return total / len(x)


def cyclic(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over all B² pairs of (x_i·x_j − y_i·y_j)², and of (x_i·y_j − x_j·y_i)², each times B."""
    B = len(x)
    in_modal, cross_modal = x.new_zeros(()), x.new_zeros(())
    for i in range(B):
        for j in range(B):
            in_modal = in_modal + (x[i] @ x[j] - y[i] @ y[j]) ** 2
            cross_modal = cross_modal + (x[i] @ y[j] - x[j] @ y[i]) ** 2
    return in_modal / B, cross_modal / B


def vicreg(x: Tensor, y: Tensor, weights: tuple[float, float, float] = (25.0, 25.0, 1.0)) -> Tensor:
    """Invariance, hinge on the standard deviations, squared covariances; all statistics from the rows themselves."""
    B, D = x.shape
    invariance = sum(((x[i] - y[i]) ** 2).sum() for i in range(B)) / (B * D)
    variance, covariance = x.new_zeros(()), x.new_zeros(())
    for z in (x, y):
        mean = sum(z[i] for i in range(B)) / B
        for d in range(D):
            for e in range(D):
                c = sum((z[i, d] - mean[d]) * (z[i, e] - mean[e]) for i in range(B)) / (B - 1)
                if d == e:
                    variance = variance + torch.relu(1 - torch.sqrt(c + 1e-4)) / D / 2
                else:
                    covariance = covariance + c**2 / D
    return weights[0] * invariance + weights[1] * variance + weights[2] * covariance


class OnlineClr:
    """u_neg and u_pos as plain numbers, over pairs of both directions one by one; gradients with weights held."""

    def __init__(self, tau: float, gamma: float) -> None:
        self.tau, self.gamma = (tau, 10 * tau), gamma
        self.u: list[float | None] = [None, None]

    def log_u(self) -> list[float]:
        return [-math.inf if u is None else math.log(u) for u in self.u]

    def step(self, x: Tensor, y: Tensor, ids: Tensor) -> tuple[float, Tensor, Tensor]:
        """Value and gradients."""
        B, ids = len(x), [int(i) for i in ids]
        pools: tuple[list, list] = ([], [])  # (similarity as it counts, its sign, row of x, row of y)
        for i in range(B):
            for j in range(B):
                for image, text in ((i, j), (j, i)):
                    if ids[i] != ids[j]:
                        pools[0].append((float(x[image] @ y[text]), 1, image, text))
                    elif i == j:
                        pools[1].append((-float(x[image] @ y[text]), -1, image, text))
        value, grads = 0.0, [torch.zeros_like(x), torch.zeros_like(y)]
        for kind, (pool, tau) in enumerate(zip(pools, self.tau, strict=True)):
            if not pool:
                continue
            g = sum(math.exp(s / tau) for s, *_ in pool) / len(pool)
            old = self.u[kind]
            u = self.u[kind] = g if old is None else (1 - self.gamma) * old + self.gamma * g
            value += tau * math.log(u)
            for s, sign, image, text in pool:
                p = sign * math.exp(s / tau) / (u * len(pool))
                grads[0][image] += p * y[text]
                grads[1][text] += p * x[image]
        return value, *grads


def online_objective(x: Tensor, y: Tensor, tau: float) -> Tensor:
    """τn log mean_{i≠j} exp(s_ij/τn) + τp log mean_i exp(−s_ii/τp) of one batch of different ids."""
    B = len(x)
    negative = torch.stack([(x[i] @ y[j] / tau).exp() for i in range(B) for j in range(B) if i != j]).mean()
    positive = torch.stack([(-(x[i] @ y[i]) / (10 * tau)).exp() for i in range(B)]).mean()
    return tau * negative.log() + 10 * tau * positive.log()
