"""The slow twin of NeuCLIP (arXiv 2511.08417): float64, autograd of the written objectives, linear not log domain.

    F(x, y, τ)  = c · mean_i Σ_sides τ_i (e^−α_i (ε + g_i) + α_i − 1 + ρ),     c = ½, α constant
    α_i(W)      = log (ε + mean_j exp((cos(x_i, W_j) − s_ii)/τ_i))
    W           ← AdaGrad on mean_i τ_i (e^−α_i(W) (ε + g_i) + α_i(W) − 1), features, τ and g constant, before F

Until there are prototypes α_i = log (ε + g_i). After the first step, and after every R-th, all prototypes wait for the
features of the other modality; a batch of B fills B of them, from rows spread evenly. A row without negatives counts 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

C = 0.5


@dataclass
class NeuClipStep:
    value: float
    grad_x: Tensor
    grad_y: Tensor
    grad_tau: Tensor
    alpha: Tensor
    excess: Tensor


@dataclass
class NeuClip:
    """Prototypes [m][D] and AdaGrad's sums of each side, and how a batch moves them."""

    prototypes: tuple[Tensor, Tensor]
    steps: int
    rate: float
    restart: int
    eps: float = 0.0
    rho: float = 0.0
    count: int = 0
    filled: int = 0
    waiting: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prototypes = tuple(part.double().clone() for part in self.prototypes)
        self.squares = tuple(torch.zeros_like(part) for part in self.prototypes)

    def normalisers(self, anchors: Tensor, columns: Tensor, ids: list[int], tau: Tensor) -> list[Tensor | None]:
        """ε + g_i of every anchor; None without negatives."""
        found = []
        for i in range(len(ids)):
            negatives = [j for j in range(len(ids)) if ids[j] != ids[i]]
            d = [anchors[i] @ (columns[j] - columns[i]) for j in negatives]
            found.append(self.eps + (torch.stack(d) / tau[i]).exp().mean() if d else None)
        return found

    def alpha(self, w: Tensor, anchor: Tensor, positive: Tensor, tau: Tensor) -> Tensor:
        cosines = torch.stack([torch.cosine_similarity(anchor, one, dim=0) for one in w[: self.filled]])
        return (self.eps + ((cosines - positive) / tau).exp().mean()).log()

    def descend(self, side: int, anchors: Tensor, columns: Tensor, g: list[Tensor | None], tau: Tensor) -> None:
        w, squares = self.prototypes[side], self.squares[side]
        for _ in range(self.steps if self.filled else 0):
            at = w.clone().requires_grad_()
            total = 0.0 * at.sum()
            for i, row in enumerate(anchors):
                if g[i] is not None:
                    alpha = self.alpha(at, row, row @ columns[i], tau[i])
                    total = total + tau[i] * ((-alpha).exp() * g[i] + alpha - 1) / len(anchors)
            total.backward()
            squares += at.grad**2
            w -= self.rate * at.grad / (squares.sqrt() + 1e-10)

    def step(self, x: Tensor, y: Tensor, ids: Tensor, tau: Tensor) -> NeuClipStep:
        """tau: [2, B]."""
        ids = [int(i) for i in ids]
        x, y, tau = (part.detach().double().clone().requires_grad_() for part in (x, y, tau))
        total, alphas, excess = 0.0 * x.sum(), torch.full((2, len(ids)), -torch.inf).double(), torch.zeros(2).double()
        for side, (anchors, columns) in enumerate(((x, y), (y, x))):
            g = self.normalisers(anchors, columns, ids, tau[side])
            fixed = [None if one is None else one.detach() for one in g]
            self.descend(side, anchors.detach(), columns.detach(), fixed, tau[side].detach())
            for i, own in enumerate(g):
                if own is None:
                    continue
                alpha = own.log().detach()
                if self.filled:
                    row = anchors[i].detach()
                    alpha = self.alpha(self.prototypes[side], row, row @ columns[i].detach(), tau[side, i].detach())
                alphas[side, i] = alpha
                excess[side] += (own.detach() / alpha.exp() - 1) / sum(one is not None for one in g)
                total = total + C * tau[side, i] * ((-alpha).exp() * own + alpha - 1 + self.rho) / len(ids)
        total.backward()
        self.refill(x.detach(), y.detach())
        return NeuClipStep(total.item(), x.grad, y.grad, tau.grad, alphas, excess)

    def refill(self, x: Tensor, y: Tensor) -> None:
        self.count += 1
        if self.count == 1 or self.count % self.restart == 0:
            self.waiting = list(range(len(self.prototypes[0])))
        now, self.waiting = self.waiting[: len(x)], self.waiting[len(x) :]
        for k, place in enumerate(now):
            row = k * len(x) // len(now)
            for side, other in enumerate((y, x)):
                self.prototypes[side][place] = other[row]
                self.squares[side][place] = 0.0
            self.filled = max(self.filled, place + 1)
