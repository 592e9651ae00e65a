"""Exponential moving average of the towers' weights over the steps (train.ema)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """The average of what training moves in the towers: trained weights, and statistics of BatchNorm.

    Early steps count less: the decay after n updates is at most (1 + n) / (10 + n), so that the random beginning is
    soon forgotten. The average is sharded where the weights are, and equal on all ranks where those are.

    Args:
        module: the towers, locked and on their device; the average begins with their weights.
        decay: share of the average that an update keeps, later on.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in _moving(module)}

    def update(self, module: nn.Module, updates: int) -> None:
        """Add the weights after a step; `updates` counts this one."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        current = dict(_moving(module))
        get_ema_multi_avg_fn(decay)(list(self.values.values()), [current[name].detach() for name in self.values], 0)

    @contextmanager
    def in_place(self, module: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Put the average into the towers, inside a `with` that yields their trained weights."""
        self._swap(module)
        try:
            yield self.values
        finally:
            self._swap(module)

    @torch.no_grad()
    def _swap(self, module: nn.Module) -> None:
        for name, value in _moving(module):
            held = value.detach().clone()
            value.copy_(self.values[name])
            self.values[name].copy_(held)


def _moving(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors that training moves."""
    yield from ((name, p) for name, p in module.named_parameters() if p.requires_grad)
    yield from ((name, b) for name, b in module.named_buffers() if name.endswith(("running_mean", "running_var")))
