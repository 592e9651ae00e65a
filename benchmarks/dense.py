"""The dense peers of benchmarks/loss.py: the first code's way of computing the objective, and open_clip's ClipLoss.

Written from a description of what that code does, not from it: every rank forms the full B × B similarities and, for
each side, one B × B tensor a step of the formula: differences, exponents, a copy of the running maximum for every
column, the elementwise maximum with it, shifted exponents, weights, products; a maximum a sample that only grows; a
linear u with a floor of 1e-14. Autograd does the rest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RHO, FLOOR = 7.0, 1e-14


class DenseObjective(nn.Module):
    """SogCLR (constant τ) or DistTempNet (a network's τ) of a global batch of unit features [B, D]; ids [B].

    Returns the towers' loss plus that of the temperature, as one scalar to call backward on.
    """

    def __init__(self, samples: int, tau: float | None, width: int, prototypes: int, gamma: float = 0.8) -> None:
        super().__init__()
        self.gamma, self.tau = gamma, tau
        self.register_buffer("u", torch.zeros(2, samples))
        self.register_buffer("largest", torch.zeros(2, samples))
        self.others: Tensor | None = None  # 1 off the diagonal
        self.networks = nn.ModuleList(DenseNetwork(width, prototypes) for _ in range(2 if tau is None else 0))

    def forward(self, image: Tensor, text: Tensor, ids: Tensor) -> Tensor:
        s = image @ text.T
        if self.others is None or len(self.others) != len(s):
            self.others = 1 - torch.eye(len(s), device=s.device)
        diagonal, n, total = s.diagonal(), len(s) - 1, 0.0
        taus = [
            self.networks[side](features.detach()) if self.networks else s.new_full((len(s),), self.tau)
            for side, features in enumerate((image, text))
        ]
        # one list a step of the formula, a side each, all alive until the end of the pass: as one function's variables
        d = [s - diagonal[:, None], s.T - diagonal[:, None]]
        exponent = [(d[i] / taus[i].detach()[:, None]).clone().detach() for i in (0, 1)]
        before = [self.largest[i, ids] for i in (0, 1)]
        running = [torch.maximum(exponent[i], before[i][:, None].tile(1, len(s))) for i in (0, 1)]
        largest = [running[i].amax(1) for i in (0, 1)]
        exponential = [torch.exp(exponent[i] - largest[i][:, None]) * self.others for i in (0, 1)]
        u = [self.follow(i, ids, exponential[i].sum(1) / n, before[i], largest[i]) for i in (0, 1)]
        weight = [exponential[i] / u[i][:, None] for i in (0, 1)]
        for i in (0, 1):
            total = total + (weight[i] * d[i]).sum(1).mean() / n
        for i in (0, 1) if self.networks else ():
            h = u[i].log() + largest[i] + RHO - (weight[i] * exponent[i]).sum(1) / n
            total = total + (h.clamp(-5, 5) * taus[i]).mean()
        return total

    def follow(self, side: int, ids: Tensor, g: Tensor, before: Tensor, largest: Tensor) -> Tensor:
        self.largest[side, ids] = largest
        old = self.u[side, ids] * torch.exp(before - largest)
        u = torch.where(self.u[side, ids] == 0, g, (1 - self.gamma) * old + self.gamma * g).clamp(min=FLOOR)
        self.u[side, ids] = u
        return u


class DenseNetwork(nn.Module):
    """The first code's temperature: τ = (Linear_1(w ⊙ σ(q)) − Linear_2(σ(q) / M)) / ρ, clamped at .001; dropout ½."""

    def __init__(self, width: int, prototypes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.prototypes = nn.Parameter(torch.randn(prototypes, width))
        self.scaler = nn.Parameter(torch.tensor(0.01).log())
        self.first, self.second = nn.Linear(prototypes, 1), nn.Linear(prototypes, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(torch.sigmoid(self.linear(x)), 0.5)
        q = hidden @ F.normalize(self.prototypes, dim=1).T
        w, gate = torch.softmax(q / self.scaler.exp(), dim=1), torch.sigmoid(q)
        tau = (self.first(w * gate) - self.second(gate / len(self.prototypes))).squeeze(1) / RHO
        return tau.clamp(min=0.001)
