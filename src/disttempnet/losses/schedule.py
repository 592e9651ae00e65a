"""The inner learning rate γ: how much of a sample's tracked normaliser is replaced at each visit."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ConstantGamma:
    """γ(e) = gamma. γ = 1 forgets the past: the mini-batch objective (SogCLR, arXiv 2202.12387)."""

    gamma: float = 0.8

    @property
    def changes(self) -> bool:
        """Whether the epoch matters."""
        return False

    def __post_init__(self) -> None:
        _check("gamma", self.gamma)

    def __call__(self, epoch: float) -> float:
        return self.gamma


@dataclass(frozen=True)
class CosineGamma:
    """γ(e) = ½ (1 + cos(π e / E)) (1 − γ_min) + γ_min for e < E, then γ_min (FastCLIP, arXiv 2407.01445, eq. 6)."""

    gamma_min: float = 0.8
    gamma_decay_epochs: float = 20.0

    @property
    def changes(self) -> bool:
        """Whether the epoch matters."""
        return self.gamma_min < 1

    def __post_init__(self) -> None:
        _check("gamma_min", self.gamma_min)
        if not self.gamma_decay_epochs > 0:
            raise ValueError(f"gamma_decay_epochs must be positive, got {self.gamma_decay_epochs}")

    def __call__(self, epoch: float) -> float:
        if epoch >= self.gamma_decay_epochs:
            return self.gamma_min
        return 0.5 * (1 + math.cos(math.pi * epoch / self.gamma_decay_epochs)) * (1 - self.gamma_min) + self.gamma_min


Gamma = ConstantGamma | CosineGamma


def _check(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {value}")
