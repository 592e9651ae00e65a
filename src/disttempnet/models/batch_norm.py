"""BatchNorm that does not depend on the world size.

BatchNorm makes a row's feature depend on the other rows that it is normalised with, and a rank holds other rows at
another world size. Two ways keep the loss the same. `global`, the default, takes the statistics of the global batch: in
one process BatchNorm does that anyway; several ranks exchange means and variances in every layer, forward and backward.
(torch's SyncBatchNorm does the same on GPUs only; this one also runs on CPUs.) `frozen` keeps the statistics of the
pretrained weights: no exchange, but they do not follow when the towers move far. Locked layers always keep theirs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from disttempnet import distributed
from disttempnet.config import ModelConfig
from disttempnet.errors import UserError
from disttempnet.losses.objective import compute_dtype


def prepare_batch_norm(module: nn.Module, config: ModelConfig, chunks: int = 1) -> None:
    """Fix which statistics every BatchNorm takes, in place; layers are locked before.

    Args:
        module: the towers.
        config: `[model]`; its `batch_norm` is `global` or `frozen`.
        chunks: of a batch (train.accumulate).

    Raises:
        UserError: a kind of BatchNorm that cannot take the statistics of all ranks, or of a batch in several chunks.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, _BatchNorm):
                continue
            if config.batch_norm == "frozen" or not any(p.requires_grad for p in child.parameters()):
                child.register_forward_pre_hook(_keep_statistics)
            elif chunks > 1:
                raise UserError(
                    f"train.accumulate = {chunks}, but {config.name} has BatchNorm, and a chunk's statistics are not "
                    "those of the batch: model.batch_norm=frozen, or train.accumulate=1"
                )
            elif distributed.world_size() > 1:
                setattr(parent, name, GlobalBatchNorm(child))


def keeps_statistics(module: nn.Module) -> bool:
    """Return whether a BatchNorm has been told to keep its statistics."""
    return _keep_statistics in module._forward_pre_hooks.values()


def _keep_statistics(module: nn.Module, _: Any) -> None:
    """Keep the statistics, whichever mode the towers are put in."""
    module.training = False


class GlobalBatchNorm(nn.Module):
    """A BatchNorm of images that normalises with the statistics of the global batch, of all ranks, in training.

    It takes over the parameters, statistics and state_dict names of the one that it replaces. timm's BatchNormAct2d,
    which applies an activation afterwards, is supported too.
    """

    def __init__(self, replaced: _BatchNorm) -> None:
        super().__init__()
        if not isinstance(replaced, nn.BatchNorm2d) or not replaced.affine or replaced.running_mean is None:
            raise UserError(
                f"{type(replaced).__name__} cannot take the statistics of all ranks: model.batch_norm=frozen"
            )
        self.weight, self.bias = replaced.weight, replaced.bias
        self.eps, self.momentum = replaced.eps, replaced.momentum
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(replaced, name))
        self.drop, self.act = getattr(replaced, "drop", nn.Identity()), getattr(replaced, "act", nn.Identity())

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x [b, C, h, w] → the same shape."""
        if not self.training:
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
            return self.act(self.drop(y))
        y, mean, variance = _Normalise.apply(x, self.weight, self.bias, self.eps)
        n = distributed.world_size() * x.numel() // x.shape[1]
        with torch.no_grad():
            self.num_batches_tracked += 1
            momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * n / (n - 1), momentum)
        return self.act(self.drop(y))


class _Normalise(torch.autograd.Function):
    """(x − mean) / √(variance + ε) · weight + bias, with mean and variance [C] over all ranks' rows and positions.

    Every rank holds the same number of rows. The gradient of a parameter is this rank's share: DDP averages it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        own_variance, own_mean = torch.var_mean(x.to(compute_dtype(x)), (0, 2, 3), correction=0)
        means, variances = distributed.all_gather(torch.stack([own_mean, own_variance])[None]).unbind(1)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        shape = (1, -1, 1, 1)
        dy = upstream.to(mean.dtype)
        normal = (x.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        own = torch.stack([dy.sum((0, 2, 3)), (dy * normal).sum((0, 2, 3))])
        shared = distributed.all_sum(own) / (distributed.world_size() * x.numel() // x.shape[1])
        dx = (dy - shared[0].view(shape) - normal * shared[1].view(shape)) * (weight.to(mean.dtype) * scale).view(shape)
        return dx.to(x.dtype), own[1].to(weight.dtype), own[0].to(weight.dtype), None
