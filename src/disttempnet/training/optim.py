"""Optimizers and learning rates: AdamW, or one of timm's, for the towers; Adam for a temperature with its own rate."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import nn

from disttempnet.config import OptimConfig
from disttempnet.errors import UserError, unknown_name
from disttempnet.losses import Objective
from disttempnet.models.depth import Depth, depths

DEFAULT = "adamw"  # torch's own, fused
# Optimizers of timm that a run cannot resume exactly, or cannot use, and why.
REFUSED = {
    "adahessian": "it differentiates the gradient again, which the losses' formula does not allow",
    "kron": "it draws random numbers that a checkpoint does not hold",
    "madgrad": "it moves weights at a rate of 0",
}
# Those that step sharded parameters as whole ones (tests/training/test_optim.py); others compute norms, signs
# or factors over a tensor in ways that DTensor refuses.
SHARDED = {
    "adabelief", "adadelta", "adagrad", "adam", "adamax", "adamw", "adan", "adanw", "adopt", "adoptw", "laprop",
    "lars", "lion", "momentum", "muon", "nadam", "nadamw", "radam", "radamw", "rmsprop", "sgd", "sgdw",
}  # fmt: skip


def refuse_unusable(config: OptimConfig, shard: bool = False) -> None:
    """Refuse an optimizer that is unknown or cannot be used here, and a key that it has no parameter for.

    Args:
        config: `[optim]`.
        shard: whether the towers are sharded (train.shard).

    Raises:
        UserError: which, and why.
    """
    name, known = config.name, [one for one in list_optimizers() if _why_refused(one) is None]
    if name not in list_optimizers():
        raise UserError(f"[optim] {unknown_name('name', name, known)}")
    if why := _why_refused(name):
        raise UserError(f"optim.name = '{name}' cannot be used: {why}; others are {', '.join(sorted(SHARDED))}, …")
    if shard and name not in SHARDED:
        raise UserError(
            f"optim.name = '{name}' cannot step sharded parameters: leave train.shard out, or take one of "
            f"{', '.join(sorted(SHARDED))}"
        )
    takes = optimizer_parameters(name)
    unused = {"eps": "eps" not in takes, "beta2": "betas" not in takes, "beta1": not takes & {"betas", "momentum"}}
    for key, missing in unused.items():
        default = OptimConfig.model_fields[key].default
        if missing and getattr(config, key) != default:
            raise UserError(
                f"optim.{key} has no effect on {name}, which has no such parameter: leave it out, or set "
                f"optim.{key}={default}, its default, where a config sets another"
            )


def _why_refused(name: str) -> str | None:
    """Return why an optimizer of timm cannot be used; None if it can."""
    of = get_optimizer_info(name).opt_class
    if isinstance(of, str):
        return f"it belongs to {of.partition('.')[0]}, which is not supported"
    return next((why for start, why in REFUSED.items() if name.startswith(start)), None)


def optimizer_parameters(name: str) -> set[str]:
    """Return which of eps, betas and momentum an optimizer takes; one with three betas has its own defaults."""
    info = get_optimizer_info(name)
    has = {"eps": info.has_eps, "betas": info.has_betas and info.num_betas == 2, "momentum": info.has_momentum}
    return {key for key, there in has.items() if there}


def build_optimizers(towers: nn.Module, loss: Objective, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """Return [optimizer of the towers] or [optimizer of the towers, Adam of the temperature].

    Weight decay acts on matrices only: gains, biases and scalars (also a learnable logit scale) have none. A
    temperature with its own rate has its own optimizer, without weight decay (arXiv 2404.04575). The objective tells
    which parameters those are, and changes the rate over the epochs (losses/own_parameters.py).

    Args:
        towers: the module, prepared and on its device.
        loss: the objective.
        config: `[optim]`.
    """
    own = own_groups(loss)
    groups = _groups(towers, loss, config)
    betas = (config.beta1, config.beta2)
    towers_optimizer: torch.optim.Optimizer
    if config.name == DEFAULT:
        towers_optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    else:
        given = {"eps": config.eps, "betas": betas, "momentum": config.beta1}
        taken = {key: given[key] for key in optimizer_parameters(config.name)}
        towers_optimizer = create_optimizer_v2(groups, config.name, lr=config.lr, **taken)
    return [towers_optimizer, *([torch.optim.Adam(own, fused=True)] if own else [])]


def _groups(towers: nn.Module, loss: Objective, config: OptimConfig) -> list[dict[str, Any]]:
    """Return the parameter groups of the towers' optimizer: each trained parameter is in one.

    `lr_scale` is the factor of layer-wise decay. Muon leaves what has `use_fallback` to AdamW: embeddings, heads and
    the objective's parameters, as only the matrices between are maps of hidden features.
    """
    place = depths(towers) if config.layer_decay < 1 or "muon" in config.name else {}
    shared = [p for group in loss.parameter_groups() if "lr" not in group for p in group["params"]]
    groups: list[dict[str, Any]] = []
    for matrices in (True, False):
        # separate groups: the towers' may be sharded
        for named in (towers.named_parameters(), (("", p) for p in shared)):
            members = defaultdict[Depth, list[nn.Parameter]](list)
            for name, p in named:
                if (p.ndim >= 2) == matrices and p.requires_grad:
                    members[place.get(name, Depth(0, 0))].append(p)
            for depth, params in sorted(members.items()) or [(Depth(0, 0), [])]:
                group = {"params": params, "weight_decay": config.weight_decay if matrices else 0.0}
                if config.layer_decay < 1:
                    group["lr_scale"] = config.layer_decay**depth.above
                if "muon" in config.name:
                    group["use_fallback"] = 0 in depth
                groups.append(group)
    return groups


def own_groups(loss: Objective) -> list[dict[str, Any]]:
    """Return the parameter groups of the temperature that have their own rate; often none."""
    return [group for group in loss.parameter_groups() if "lr" in group]


def settings_line(optimizer: torch.optim.Optimizer, config: OptimConfig) -> str:
    """Return the towers' optimizer in one line, with the settings that timm chooses; empty for AdamW."""
    if config.name == DEFAULT:
        return ""
    shown = {key: value for key, value in optimizer.defaults.items() if key not in ("lr", "weight_decay")}
    return f"optim.name = {config.name}: " + ", ".join(f"{key} {value}" for key, value in shown.items())


def with_warmup_steps(config: OptimConfig, total_steps: int) -> OptimConfig:
    """Return the config with the steps of its warm-up: of `warmup_share`, or shorter than the run.

    A longer one would keep the rate far below `lr`, and a small data set would not be learned. It becomes a tenth of
    the run.
    """
    steps = config.warmup_steps
    if config.warmup_share:
        steps = max(1, round(config.warmup_share * total_steps))
    elif steps >= total_steps:
        steps = min(steps, max(1, total_steps // 10))
    return config.model_copy(update={"warmup_steps": steps})


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Return the towers' rate: linear warm-up over `warmup_steps`, then `schedule` from lr to lr_end at `total_steps`.

    `wsd` stays at lr until the last `decay_share` of all steps, and falls on a line there (arXiv 2404.06395).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    begin = config.warmup_steps
    if config.schedule == "wsd":
        begin = max(begin, total_steps - round(config.decay_share * total_steps))
    progress = min(1.0, max(0, step - begin) / max(1, total_steps - begin))
    if config.schedule == "wsd":
        return config.lr_end + (1 - progress) * (config.lr - config.lr_end)
    return config.lr_end + 0.5 * (config.lr - config.lr_end) * (1 + math.cos(math.pi * progress))


def temperature_learning_rate(config: OptimConfig, step: int, rate: float) -> float:
    """Return the temperature's own rate, with the same linear warm-up.

    Before the towers have moved, all similarities are alike and every τ is pushed down: a fast start ends at the lower
    bound.
    """
    warm_up = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return rate * warm_up


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of all groups, lower ones of layer-wise decay by their factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
