"""SigLIP: every image × text pair of the batch is a yes-or-no question of its own (arXiv 2303.15343).

minimise   −(1/B) Σ_ij log σ(z_ij (t s_ij + b)),   s_ij = x_i·y_j,   z_ij = 1 for i = j, else −1
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disttempnet import distributed
from disttempnet.losses.contrast.blocks import block_slices
from disttempnet.losses.objective import (
    Features,
    LossOutput,
    Objective,
    ObjectiveContext,
    SampleIds,
    compute_dtype,
    exact_arithmetic,
    tau_metrics,
    with_gradient,
)
from disttempnet.losses.own_parameters import with_own_gradient
from disttempnet.losses.temperature.scalar import check_start


class SigLipLoss(Objective):
    """Sigmoid loss with a learnable scale t = exp(logit_scale) = 1/τ and bias b, both trained with the towers.

    Args:
        context: not needed.
        temperature: τ = 1/t at the start; published t = 10.
        bias: b at the start; published −10, since nearly all pairs are negative.

    Equal ids stay negatives of each other, as published: only i = j is a positive.
    """

    def __init__(self, context: ObjectiveContext, *, temperature: float = 0.1, bias: float = -10.0) -> None:
        super().__init__()
        check_start(temperature)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.logit_bias = nn.Parameter(torch.tensor(float(bias)))

    def forward(self, features: Features, ids: SampleIds | None = None) -> LossOutput:
        """This rank's rows [b, D]. Metrics: loss, logit_bias, and mean, min, max, std of τ."""
        ids = self.checked(features, ids)
        with exact_arithmetic(features.image.device):
            image, text = features.image, features.text
            dtype = compute_dtype(image)
            x, y = image.detach().to(dtype), text.detach().to(dtype)
            all_image, all_text = distributed.all_gather(image).to(dtype), distributed.all_gather(text).to(dtype)
            t, bias = self.logit_scale.to(dtype).exp(), self.logit_bias.to(dtype)

            # the image side meets every pair of the batch once over all ranks: value, t and b need no other
            whole = len(x) == len(all_image)
            image_pull, text_pull, sums = _questions(x, all_text, t.detach(), bias.detach(), both=whole)
            if not whole:
                text_pull, _, _ = _questions(y, all_image, t.detach(), bias.detach(), both=False)
            value = distributed.all_sum(sums[0]) / len(all_image)
            # mean over ranks of 1/b = sum over ranks of 1/B
            scale = t.detach() / len(x)
            total = with_gradient(value, image, text, scale * image_pull, scale * text_pull)
            if t.requires_grad or bias.requires_grad:
                total = with_own_gradient(total, (sums[1] * t + sums[2] * bias) / len(x), self)
        tau = (1 / t.detach()).expand(2, 1)
        return LossOutput(total, {"loss": value, "logit_bias": bias.detach().clone(), **tau_metrics(tau)})

    @torch.no_grad()
    def temperatures(self, image: Tensor, text: Tensor, ids: SampleIds | None = None) -> Tensor:
        return (-self.logit_scale.to(compute_dtype(image))).exp().expand(2, len(image))


def _questions(rows: Tensor, columns: Tensor, t: Tensor, bias: Tensor, both: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Local rows [b, D] of one modality against all columns [B, D] of the other.

    Returns:
        Σ_j w_ij column_j [b, D], where w_ij is the derivative of pair ij's loss by its logit; with `both`, where the
        local rows are all rows, Σ_i w_ij row_i [B, D] as well, else zeros;
        and [Σ loss_ij, Σ w_ij s_ij, Σ w_ij].
    """
    own = distributed.rank() * len(rows)  # the column of row i's pair is own + i
    row_pull, column_pull = torch.zeros_like(rows), torch.zeros_like(columns if both else rows)
    sums = rows.new_zeros(3)
    for r, c in block_slices(rows, columns):
        similarity = rows[r] @ columns[c].T
        pair = own + r.start - c.start
        wrong = similarity * t + bias  # −z times the logit: how far the answer is on the wrong side
        wrong.diagonal(pair).neg_()
        loss = -F.logsigmoid(-wrong).sum()
        weight = wrong.sigmoid_()
        weight.diagonal(pair).neg_()
        row_pull[r].addmm_(weight, columns[c])
        if both:
            column_pull[c].addmm_(weight.T, rows[r])
        sums += torch.stack([loss, similarity.mul_(weight).sum(), weight.sum()])
    return row_pull, column_pull, sums
