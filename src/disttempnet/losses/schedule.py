"""Schedules of the inner learning rate γ: the share of a sample's tracked normaliser that a visit replaces."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Shares(NamedTuple):
    """Logarithms of the shares of the old u and of the batch's g in the new u: numbers, or [2, B].

    Attributes:
        old: log (1 − γ).
        new: log γ.
    """

    old: float | Tensor
    new: float | Tensor

    @classmethod
    def of(cls, gamma: float) -> Shares:
        """Take γ in (0, 1]."""
        return cls(math.log1p(-gamma) if gamma < 1 else -math.inf, math.log(gamma))


class _Scheduled:
    """Part of schedules whose γ is the same for all samples."""

    def __call__(self, epoch: float) -> float:
        raise NotImplementedError

    def shares(self, epoch: float, log_u: Tensor) -> Shares:
        """Return the shares of an epoch; `log_u` [2, B] is not used."""
        return Shares.of(self(epoch))


@dataclass(frozen=True)
class ConstantGamma(_Scheduled):
    """Constant γ(e) = gamma (SogCLR, arXiv 2202.12387); γ = 1 forgets the past: the mini-batch objective.

    Example:
        >>> ConstantGamma(0.8)(epoch=3)
        0.8
    """

    gamma: float = 0.8

    @property
    def changes(self) -> bool:
        """True where γ depends on the epoch."""
        return False

    @property
    def remembers(self) -> bool:
        """True where γ is ever below 1."""
        return self.gamma < 1

    def __post_init__(self) -> None:
        _check("gamma", self.gamma)

    def __call__(self, epoch: float) -> float:
        return self.gamma


@dataclass(frozen=True)
class CosineGamma(_Scheduled):
    """Cosine decay from 1 to γ_min over E epochs (FastCLIP, arXiv 2407.01445, eq. 6).

    γ(e) = ½ (1 + cos(π e / E)) (1 − γ_min) + γ_min for e < E, then γ_min

    Args:
        gamma_min: γ_min, in (0, 1].
        gamma_decay_epochs: E.

    Example:
        >>> gamma = CosineGamma(gamma_min=0.2, gamma_decay_epochs=10)
        >>> [round(gamma(epoch), 2) for epoch in (0, 5, 10, 20)]
        [1.0, 0.6, 0.2, 0.2]
    """

    gamma_min: float = 0.8
    gamma_decay_epochs: float = 20.0

    @property
    def changes(self) -> bool:
        """True where γ depends on the epoch."""
        return self.gamma_min < 1

    @property
    def remembers(self) -> bool:
        """True where γ is ever below 1: there it changes."""
        return self.changes

    def __post_init__(self) -> None:
        _check("gamma_min", self.gamma_min)
        if not self.gamma_decay_epochs > 0:
            raise ValueError(f"gamma_decay_epochs must be positive, got {self.gamma_decay_epochs}")

    def __call__(self, epoch: float) -> float:
        if epoch >= self.gamma_decay_epochs:
            return self.gamma_min
        return 0.5 * (1 + math.cos(math.pi * epoch / self.gamma_decay_epochs)) * (1 - self.gamma_min) + self.gamma_min


@dataclass(frozen=True)
class NoMemory(_Scheduled):
    """γ = 1 without a table: every normaliser is the batch's own, and nothing is kept.

    Example:
        >>> NoMemory()(epoch=3)
        1.0
    """

    changes = False
    remembers = False

    def __call__(self, epoch: float) -> float:
        return 1.0


@dataclass(frozen=True)
class ScentGamma:
    """γ of each sample from its own normaliser: γ_i = σ(log (ε + u_i) + log a) (SCENT, arXiv 2602.02877).

    A sample with a large u forgets it, one with a small u keeps it.

    Args:
        scent_log_a: log a.

    Example:
        >>> gamma = ScentGamma(scent_log_a=10.0)
        >>> gamma.shares(epoch=3, log_u=torch.tensor([-20.0, -10.0, 0.0])).new.exp()
        tensor([4.5398e-05, 5.0000e-01, 9.9995e-01])
    """

    scent_log_a: float = 10.0

    changes = False
    remembers = True

    def shares(self, epoch: float, log_u: Tensor) -> Shares:
        """Return the shares of every row from its log (ε + u) before the visit [2, B]; −inf: never visited, γ = 1."""
        logit = torch.where(log_u == -math.inf, math.inf, log_u + self.scent_log_a)
        return Shares(F.logsigmoid(-logit), F.logsigmoid(logit))


Gamma = ConstantGamma | CosineGamma | NoMemory | ScentGamma


def _check(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {value}")
