"""Optimizers and learning rates: AdamW for the towers, Adam for a temperature with its own rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from disttempnet.config import OptimConfig
from disttempnet.losses import Objective


def build_optimizers(towers: nn.Module, loss: Objective, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """Return [AdamW of the towers] or [AdamW of the towers, Adam of the temperature].

    Weight decay acts on matrices only: gains, biases and scalars (also a learnable logit scale) have none. A
    temperature with its own rate has its own optimizer, without weight decay (arXiv 2404.04575). The objective tells
    which parameters those are, and changes the rate over the epochs (losses/own_parameters.py).

    Args:
        towers: the module, prepared and on its device.
        loss: the objective.
        config: `[optim]`.
    """
    own = own_groups(loss)
    shared = [p for group in loss.parameter_groups() if "lr" not in group for p in group["params"]]
    groups = [
        {"params": [p for p in params if (p.ndim >= 2) == matrices and p.requires_grad]}
        | {"weight_decay": config.weight_decay if matrices else 0.0}
        for matrices in (True, False)
        for params in (towers.parameters(), shared)  # separate groups: the towers' may be sharded
    ]
    betas = (config.beta1, config.beta2)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    ]
    if own:
        optimizers.append(torch.optim.Adam(own, fused=True))
    return optimizers


def own_groups(loss: Objective) -> list[dict[str, Any]]:
    """Return the parameter groups of the temperature that have their own rate; often none."""
    return [group for group in loss.parameter_groups() if "lr" in group]


def shortened_warmup(config: OptimConfig, total_steps: int) -> OptimConfig:
    """Return the config with a warm-up shorter than the run.

    A longer one would keep the rate far below `lr`, and a small data set would not be learned. It becomes a tenth of
    the run.
    """
    if not config.warmup_steps or config.warmup_steps < total_steps:
        return config
    return config.model_copy(update={"warmup_steps": max(1, total_steps // 10)})


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Return the towers' rate: linear warm-up over `warmup_steps`, then a cosine from lr to lr_end at `total_steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    span = max(1, total_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    return config.lr_end + 0.5 * (config.lr - config.lr_end) * (1 + math.cos(math.pi * progress))


def temperature_learning_rate(config: OptimConfig, step: int, rate: float) -> float:
    """Return the temperature's own rate, with the same linear warm-up.

    Before the towers have moved, all similarities are alike and every τ is pushed down: a fast start ends at the lower
    bound.
    """
    warm_up = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return rate * warm_up


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
