"""What of the towers is trained: locked layers, and where BatchNorm takes its statistics from.

World size must not change the loss, but BatchNorm makes a row's feature depend on the other rows that it is normalised
with: a rank's own would be others at another world size. Two ways keep the rule. `global`, the default, takes the
statistics of the global batch: in one process that is what BatchNorm does anyway, with several the ranks exchange
means and variances in every layer, forward and backward. (torch's SyncBatchNorm does the same on GPUs only; this one
also runs, and is tested, on CPUs.) `frozen` keeps the statistics that the weights came with: no exchange, but towers
that are trained far from where they began may want them to follow. Locked layers keep theirs in any case.
"""

from __future__ import annotations

from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from disttempnet import distributed
from disttempnet.config import ModelConfig
from disttempnet.errors import UserError
from disttempnet.losses.objective import compute_dtype


def prepare_towers(module: open_clip.CLIP, config: ModelConfig, chunks: int = 1) -> None:
    """Lock what `[model]` locks, in place, and settle the statistics of every BatchNorm.

    Raises:
        UserError: a kind of BatchNorm that cannot take the statistics of all ranks, or of a batch in several chunks.
    """
    if config.lock_image:
        lock_image_tower(module, config.unlocked_image_groups)
    if config.lock_text:
        lock_text_tower(module, config.unlocked_text_layers)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, _BatchNorm):
                continue
            if config.batch_norm == "frozen" or not any(p.requires_grad for p in child.parameters()):
                child.register_forward_pre_hook(_hold)
            elif chunks > 1:
                raise UserError(
                    f"train.accumulate = {chunks}, but {config.name} has BatchNorm, and a chunk's statistics are not "
                    "those of the batch: model.batch_norm=frozen, or train.accumulate=1"
                )
            elif distributed.world_size() > 1:
                setattr(parent, name, GlobalBatchNorm(child))


def lock_image_tower(module: open_clip.CLIP, unlocked_groups: int = 0) -> None:
    """Train no parameter of the image tower but those of its last layer groups (LiT, arXiv 2111.07991).

    A projection that was laid on a timm tower is trained in any case. The groups are timm's and open_clip's.
    """
    if not isinstance(module.visual, TimmModel):
        module.lock_image_tower(unlocked_groups=unlocked_groups)
        return
    trunk = module.visual.trunk
    groups = group_parameters(trunk, trunk.group_matcher())
    for group in sorted(groups)[: max(0, len(groups) - unlocked_groups)]:
        for name in groups[group]:
            trunk.get_parameter(name).requires_grad_(False)


def lock_text_tower(module: open_clip.CLIP, unlocked_layers: int = 0) -> None:
    """Train no parameter of the text tower but those of its last layers; a projection on an encoder of Hugging Face
    is trained in any case."""
    text = getattr(module, "text", None)
    if not isinstance(text, HFTextEncoder):
        module.lock_text_tower(unlocked_layers=unlocked_layers)
        return
    text.transformer.requires_grad_(False)
    layers = max((m for m in text.transformer.modules() if isinstance(m, nn.ModuleList)), key=len)
    for layer in list(layers)[max(0, len(layers) - unlocked_layers) :]:
        layer.requires_grad_(True)


def _hold(module: nn.Module, _: Any) -> None:
    """Statistics stay as they are, whichever mode the towers are put in."""
    module.training = False


class GlobalBatchNorm(nn.Module):
    """A BatchNorm of images that normalises with the statistics of the global batch, of all ranks, in training.

    Takes over the parameters and statistics of the one that it replaces, and its place in the state_dict. timm's
    BatchNormAct2d, which applies an activation afterwards, is taken too.
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
    """(x − mean) / √(variance + ε) · weight + bias, with mean and variance [C] over all ranks' rows and places.

    Every rank holds as many rows. The gradient of a parameter is this rank's share: DDP takes the mean over ranks.
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
