"""CLIP: cross-entropy of images against texts and texts against images over the global mini-batch.

    minimise   ½ · mean_i [ log Σ_j exp((s_ij − s_ii) / τ) + log Σ_j exp((s_ji − s_ii) / τ) ]     (arXiv 2103.00020)

Shapes: b local rows, B global rows, D width. The gradient is exact at every world size without a collective in the
backward pass; it is the family's closed form with every column counted and weights that sum to one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from disttempnet import distributed
from disttempnet.losses.core import (
    LossOutput,
    Objective,
    check_features,
    compute_dtype,
    exact_arithmetic,
    only_gradient,
    with_gradient,
)
from disttempnet.losses.pairwise import Anchors, pull, row_statistics

MAX_LOGIT_SCALE = 100.0


class ClipLoss(Objective):
    """The symmetric InfoNCE loss.

    Args:
        temperature: τ, or where it starts.
        learnable: whether the logit scale 1/τ is a parameter, kept in [1, 100] (log-parametrised).
    """

    logit_scale: Tensor

    def __init__(self, temperature: float = 0.07, learnable: bool = True) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        scale = torch.tensor(-math.log(temperature))
        self.learnable = learnable
        if learnable:
            self.logit_scale = nn.Parameter(scale)
        else:
            self.register_buffer("logit_scale", scale)

    def forward(self, image_features: Tensor, text_features: Tensor, ids: Tensor) -> LossOutput:
        """Features: this rank's rows [b, D], unit norm; ids int64 [b] (equal ids stay negatives, as in CLIP)."""
        check_features(image_features, text_features, ids)
        with exact_arithmetic(image_features.device):
            return self._step(image_features, text_features)

    def _step(self, image: Tensor, text: Tensor) -> LossOutput:
        dtype, b = compute_dtype(image), len(image)
        if self.learnable:
            with torch.no_grad():
                self.logit_scale.clamp_(0, math.log(MAX_LOGIT_SCALE))
        all_image = distributed.all_gather(image).to(dtype)
        all_text = distributed.all_gather(text).to(dtype)
        x, y = image.detach().to(dtype), text.detach().to(dtype)
        scale = self.logit_scale.to(dtype).exp()
        tau = (1 / scale.detach()).expand(b)
        positive = (x * y).sum(1)
        image_side = row_statistics(x, all_text, positive, tau, None, None)
        text_side = row_statistics(y, all_image, positive, tau, None, None)

        local = torch.stack([positive, image_side.log_mean, text_side.log_mean], dim=1)
        all_positive, *log_mean = distributed.all_gather(local).T
        count = torch.full_like(all_positive, len(all_positive))
        anchors = [Anchors.of(tau[:1], all_positive, side, count) for side in log_mean]
        mine = slice(distributed.rank() * b, distributed.rank() * b + b)
        own = [Anchors(a.slope.expand(len(count))[mine], a.offset[mine]) for a in anchors]
        factor = scale.detach() / (2 * b)
        image_gradient = factor * (pull(x, all_text, own[0], anchors[1], None, None) - 2 * y)
        text_gradient = factor * (pull(y, all_image, own[1], anchors[0], None, None) - 2 * x)

        value = 0.5 * (log_mean[0] + log_mean[1]).mean() + math.log(len(count))
        total = with_gradient(value, image, text, image_gradient, text_gradient)
        if self.learnable:
            # ∂/∂scale of an anchor's term is Σ_j softmax_ij d_ij, and mean_exponent is that over τ
            slope = 0.5 * (image_side.mean_exponent + text_side.mean_exponent).mean() * tau[0]
            total = total + only_gradient(slope * scale)
        metrics = {"loss": value.detach()}
        for side in ("image", "text"):
            metrics |= {f"tau/{side}_{what}": tau[0].detach() for what in ("mean", "min", "max")}
        return LossOutput(total, metrics)

    @torch.no_grad()
    def temperatures(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """τ [2, n] of image and text anchors: one value."""
        return (1 / self.logit_scale.exp()).to(compute_dtype(image_features)).expand(2, len(image_features))
