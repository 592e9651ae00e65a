"""Batches, and the one loop that runs a loss over them: in this process, or on every rank of a pool."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disttempnet import OBJECTIVES, Features, build_loss, distributed
from disttempnet.losses.sample_state import SampleState

N, D, B = 19, 6, 8  # samples, width, rows of the global batch; N is no multiple of 2 or 4: the last shard is short

# log(B − 1) = 1.95: a ρ below it has an optimal τ inside the bounds and gives no warning
CONSTANT = {"name": "sogclr", "temperature": 0.05, "gamma": 0.8}
NETWORK = {
    "name": "tempnet",
    "rho": 1.2,
    "gamma": 0.8,
    "tau_min": 0.02,
    "tau_max": 0.3,
    "network": "icml24",
    "feature_scale": 1.0,
    "prototypes": 5,
    "dropout": 0.0,
}

SMALL = {  # values for eight rows; each objective takes those that it has
    "temperature": 0.06,
    "rho": 1.2,
    "tau_min": 0.02,
    "tau_max": 0.3,
    "tau_lr": 0.01,
    "tau_initial": 0.0,
    "tau_start": "epoch",
    "gamma_decay_epochs": 2.0,
    "prototypes": 13,  # the first batch starts eight of them
    "dropout": 0.5,
    "normaliser_restart": 3,
    "scent_log_a": 2.0,
    "margin": 0.6,
    "rho_flip_epoch": 1,
    "partition_share_epochs": 2.0,
    "partition_steps": 1,
    "zeta_lr": 0.02,
    "zeta_start_epoch": 1,
}
EVERY = {
    name: {"name": name, **{key: value for key, value in SMALL.items() if key in row.arguments}}
    for name, row in OBJECTIVES.items()
}
VARIANTS = {  # arguments that are off in every row
    "sogclr ε drift": {**EVERY["sogclr"], "eps": 1e-3, "drift": 0.3},
    "isogclr ε drift": {**EVERY["isogclr"], "eps": 1e-3, "drift": 0.3},
    "sogclr scent drift": {**EVERY["sogclr"], "scent": True, "scent_log_a": 3.0, "eps": 1e-3, "drift": 0.3},
    "disttempnet-v1 scent": {**EVERY["disttempnet-v1"], "scent": True, "scent_log_a": 2.0},
    "drrho-learnable distilled": {**EVERY["drrho-learnable"], "distillation": 0.7, "eps": 1e-3},
    "disttempnet-v1 ahead": {**EVERY["disttempnet-v1"], "tau_start": "ahead"},
}
every_objective = pytest.mark.parametrize(
    "recipe", [*EVERY.values(), *VARIANTS.values()], ids=[*EVERY.keys(), *VARIANTS.keys()]
)


@dataclass(frozen=True)
class GlobalBatch:
    """Unit features x, y [B, D], ids [B], and the epoch in which the step happens."""

    x: Tensor
    y: Tensor
    ids: Tensor
    epoch: int = 0

    def first(self, rows: int) -> GlobalBatch:
        return GlobalBatch(self.x[:rows], self.y[:rows], self.ids[:rows], self.epoch)

    def to(self, dtype: torch.dtype) -> GlobalBatch:
        return GlobalBatch(self.x.to(dtype), self.y.to(dtype), self.ids, self.epoch)


def pairs(rows: int, seed: int = 0, width: int = D, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    """Unit rows x, y [rows, width] in float64, where y_i lies near x_i."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    y = x + noise * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return F.normalize(x, dim=1), F.normalize(y, dim=1)


def leaves(batch: GlobalBatch) -> tuple[Tensor, Tensor]:
    """Copies of x and y that require gradients."""
    return batch.x.clone().requires_grad_(), batch.y.clone().requires_grad_()


def unique_batch(seed: int = 0, epoch: int = 0, rows: int = B) -> GlobalBatch:
    generator = torch.Generator().manual_seed(1000 + seed)
    return GlobalBatch(*pairs(rows, seed), torch.randperm(max(N, rows), generator=generator)[:rows], epoch)


def stream(steps: int, seed: int = 0) -> list[GlobalBatch]:
    """Batches with repeated ids in which samples never seen meet samples seen before; a new epoch every other step.

    8 of 19 ids drawn with replacement: a batch has about 1.3 repeated ids, half of its samples are new in step 2.
    """
    generator = torch.Generator().manual_seed(2000 + seed)
    batches = []
    for step in range(steps):
        ids = torch.randint(0, N, (B,), generator=generator)
        ids[-1] = ids[0]  # rank 0 and the last rank meet the same sample in every step
        batches.append(GlobalBatch(*pairs(B, seed=100 * seed + step), ids, epoch=step // 2))
    return batches


@dataclass
class StepResult:
    """One step on one rank. grad_x, grad_y: of the local rows, divided by K: the global objective's gradient.

    parameters: mean over ranks of every parameter's gradient. kept: what the loss remembers after the step: buffers,
    and of each per-sample table the rows of the global batch, [2C, B].
    """

    total: Tensor
    grad_x: Tensor
    grad_y: Tensor
    parameters: dict[str, Tensor]
    kept: dict[str, Tensor]
    metrics: dict[str, Tensor]

    @property
    def log_u(self) -> Tensor:
        return self.kept["state"]


def kept(loss: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    tables = {name: module for name, module in loss.named_modules() if isinstance(module, SampleState)}
    return {name: table.read(ids).clone() for name, table in tables.items()} | {
        name: buffer.clone() for name, buffer in loss.named_buffers()
    }


def local_rows(rows: Tensor) -> Tensor:
    share = len(rows) // distributed.world_size()
    return rows[distributed.rank() * share : (distributed.rank() + 1) * share]


def make(recipe: dict, num_samples: int = N, embed_dim: int = D, **changes: object) -> nn.Module:
    """An objective; one that needs a reference model is given `reference_of` its own features."""
    arguments = {**recipe, **changes}
    loss = build_loss(arguments.pop("name"), num_samples=num_samples, embed_dim=embed_dim, **arguments).double()
    if getattr(loss, "referenced", False):
        loss.register_forward_pre_hook(_with_reference)
    return loss


def reference_of(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Features of a reference model [n, 5], which sees the pairs a little differently: linear maps of both sides."""
    maps = torch.randn(2, x.shape[1], 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    maps[1] = 0.7 * maps[0] + 0.3 * maps[1]
    image, text = (side.detach().to(torch.promote_types(side.dtype, torch.float32)) for side in (x, y))
    maps = maps.to(image.device).to(image.dtype)
    with torch.autocast("cpu", enabled=False) if image.device.type == "cpu" else contextlib.nullcontext():
        return F.normalize(image @ maps[0], dim=1), F.normalize(text @ maps[1], dim=1)


def _with_reference(loss: nn.Module, arguments: tuple) -> tuple:
    features, *rest = arguments
    image, text = reference_of(features.image, features.text)
    return (features._replace(reference_image=image, reference_text=text), *rest)


def step(loss: nn.Module, batch: GlobalBatch, autocast: bool = False) -> StepResult:
    """Forward and backward of this rank's rows; the loss's parameters are left with the mean gradient.

    autocast: to bf16, around the forward pass as in training.
    """
    x, y = (local_rows(rows).detach().clone().requires_grad_() for rows in (batch.x, batch.y))
    loss.zero_grad()
    loss.set_epoch(batch.epoch)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = loss(Features.unit(x, y), local_rows(batch.ids))
    out.total.backward()
    K = distributed.world_size()
    for parameter in loss.parameters():
        if parameter.grad is not None:
            parameter.grad.copy_(distributed.all_sum(parameter.grad) / K)
    return StepResult(
        total=out.total.detach(),
        grad_x=x.grad / K,
        grad_y=y.grad / K,
        parameters={name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None},
        kept=kept(loss, batch.ids),
        metrics={name: value.clone() for name, value in out.metrics.items()},
    )


@contextlib.contextmanager
def as_launched() -> Iterator[None]:
    """What torchrun tells the libraries, which otherwise make a group of their own."""
    size, rank = str(distributed.world_size()), str(distributed.rank())
    told = {"WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": "0"}
    told |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "none"}
    told = told if distributed.world_size() > 1 else {}
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def values(loss: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in loss.parameters()]


def descend(loss: nn.Module, rate: float) -> None:
    with torch.no_grad():
        for parameter in loss.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad


def run(recipe: dict, batches: list[GlobalBatch], rate: float = 0.3) -> list[StepResult]:
    """Steps over the batches with plain gradient descent on the loss's own parameters in between."""
    loss, results = make(recipe), []
    for batch in batches:
        results.append(step(loss, batch))
        descend(loss, rate)
    return results


def run_saved(recipe: dict, batches: list[GlobalBatch], cut: int) -> tuple[list[StepResult], dict]:
    """Steps up to `cut`, then the rest in a new loss that loaded the state; and the saved state."""
    loss, results = make(recipe), []
    for batch in batches[:cut]:
        results.append(step(loss, batch))
        descend(loss, 0.3)
    saved = copy.deepcopy(loss.state_dict())
    loss = make(recipe)
    loss.load_state_dict(saved)
    for batch in batches[cut:]:
        results.append(step(loss, batch))
        descend(loss, 0.3)
    return results, saved


def joined(ranks: list[list[StepResult]]) -> list[StepResult]:
    """The ranks' results as one process would give them: local rows joined, what all ranks share taken from rank 0."""
    steps = []
    for results in zip(*ranks, strict=True):
        steps.append(
            StepResult(
                total=results[0].total,
                grad_x=torch.cat([r.grad_x for r in results]),
                grad_y=torch.cat([r.grad_y for r in results]),
                parameters=results[0].parameters,
                kept=results[0].kept,
                metrics=results[0].metrics,
            )
        )
        for other in results[1:]:  # the total is the global value, on every rank
            torch.testing.assert_close(other.total, results[0].total, rtol=0, atol=0)
            torch.testing.assert_close(other.kept, results[0].kept, rtol=0, atol=0)
    return steps


def assert_same_steps(actual: list[StepResult], expected: list[StepResult], tolerance: float = 1e-10) -> None:
    close = {"rtol": tolerance, "atol": tolerance}
    assert len(actual) == len(expected)
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        for what in ("total", "grad_x", "grad_y", "kept", "parameters", "metrics"):
            torch.testing.assert_close(
                getattr(a, what), getattr(e, what), **close, msg=lambda m, n=number, w=what: f"step {n}, {w}: {m}"
            )
