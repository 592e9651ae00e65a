"""Schedules of the inner learning rate γ: the share of a sample's tracked normaliser that a visit replaces."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ConstantGamma:
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
class CosineGamma:
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
        """True where γ is ever below 1."""
        return self.gamma_min < 1

    def __post_init__(self) -> None:
        _check("gamma_min", self.gamma_min)
        if not self.gamma_decay_epochs > 0:
            raise ValueError(f"gamma_decay_epochs must be positive, got {self.gamma_decay_epochs}")

    def __call__(self, epoch: float) -> float:
        if epoch >= self.gamma_decay_epochs:
            return self.gamma_min
        return 0.5 * (1 + math.cos(math.pi * epoch / self.gamma_decay_epochs)) * (1 - self.gamma_min) + self.gamma_min


@dataclass(frozen=True)
class NoMemory:
    """γ = 1 without a table: every normaliser is the batch's own, and nothing is kept.

    Example:
        >>> NoMemory()(epoch=3)
        1.0
    """

    changes = False
    remembers = False

    def __call__(self, epoch: float) -> float:
        return 1.0


Gamma = ConstantGamma | CosineGamma | NoMemory


def _check(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {value}")
