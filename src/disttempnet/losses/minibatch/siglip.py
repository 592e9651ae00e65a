"""SigLIP: binary classification of every image × text pair of the batch (arXiv 2303.15343).

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
    IdsLike,
    LossOutput,
    Objective,
    ObjectiveContext,
    compute_dtype,
    exact_arithmetic,
    tau_metrics,
    with_gradient,
)
from disttempnet.losses.own_parameters import with_own_gradient
from disttempnet.losses.temperature.scalar import check_start


class SigLipLoss(Objective):
    """Sigmoid loss with a learnable scale t = exp(logit_scale) = 1/τ and bias b, both trained with the towers.

    −(1/B) Σ_ij log σ(z_ij (t s_ij + b)),   z_ij = 1 for i = j, else −1

    Equal ids stay negatives of each other, as published: only i = j is a positive.

    Args:
        context: not used.
        temperature: τ = 1/t at the start; published t = 10.
        bias: b at the start; published −10, because nearly all pairs are negative.

    Shape:
        features: this rank's rows [b, D], as many on every rank. ids are not needed. total: 0-d.

    Example:
        The plain form over the full batch, and this one, in blocks and across ranks:

        >>> from disttempnet import Features, build_loss
        >>> def plain(image, text, t, bias):
        ...     logits = t * image @ text.T + bias  # [B, B]
        ...     z = 2 * torch.eye(len(image)) - 1  # 1 for a pair, −1 elsewhere
        ...     return -F.logsigmoid(z * logits).sum() / len(image)
        >>> image, text = (F.normalize(torch.randn(8, 16), dim=1).requires_grad_() for _ in range(2))
        >>> loss = build_loss("siglip", num_samples=100, embed_dim=16)
        >>> total, expected = loss(Features.unit(image, text)).total, plain(image, text, t=10.0, bias=-10.0)
        >>> torch.allclose(total, expected, atol=1e-5)
        True
        >>> gradients, wanted = (torch.autograd.grad(value, (image, text)) for value in (total, expected))
        >>> all(torch.allclose(*pair, atol=1e-5) for pair in zip(gradients, wanted))
        True

    Reference:
        Sigmoid loss for language image pre-training, arXiv 2303.15343.
    """

    def __init__(self, context: ObjectiveContext, *, temperature: float = 0.1, bias: float = -10.0) -> None:
        super().__init__()
        check_start(temperature)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.logit_bias = nn.Parameter(torch.tensor(float(bias)))

    def forward(self, features: Features, ids: IdsLike | None = None) -> LossOutput:
        """Return the loss; metrics: loss, logit_bias, and mean, min, max, std of τ."""
        ids = self.checked(features, ids)
        with exact_arithmetic(features.image.device):
            # features: x, y [b, D] of this rank, all_image, all_text [B, D] of all ranks; t and b, 0-d
            image, text = features.image, features.text
            dtype = compute_dtype(image)
            x, y = image.detach().to(dtype), text.detach().to(dtype)
            all_image, all_text = distributed.all_gather(image).to(dtype), distributed.all_gather(text).to(dtype)
            t, bias = self.logit_scale.to(dtype).exp(), self.logit_bias.to(dtype)

            # feature gradients [b, D] without their factor, and sums for value, t and b. Over all ranks the image rows
            # cover every pair of the batch once, so that the sums need no text rows
            single_rank = len(x) == len(all_image)
            by_image, by_text, sums = _pair_gradients(x, all_text, t.detach(), bias.detach(), both=single_rank)
            if not single_rank:
                by_text, _, _ = _pair_gradients(y, all_image, t.detach(), bias.detach(), both=False)

            # the loss with its gradients; the mean over ranks of 1/b is the sum over ranks of 1/B
            value = distributed.all_sum(sums[0]) / len(all_image)
            scale = t.detach() / len(x)
            total = with_gradient(value, image, text, scale * by_image, scale * by_text)
            if t.requires_grad or bias.requires_grad:
                total = with_own_gradient(total, (sums[1] * t + sums[2] * bias) / len(x), self)
        tau = (1 / t.detach()).expand(2, 1)
        return LossOutput(total, {"loss": value, "logit_bias": bias.detach().clone(), **tau_metrics(tau)})

    @torch.no_grad()
    def temperatures(self, image: Tensor, text: Tensor, ids: IdsLike | None = None) -> Tensor:
        return (-self.logit_scale.to(compute_dtype(image))).exp().expand(2, len(image))


def _pair_gradients(
    rows: Tensor, columns: Tensor, t: Tensor, bias: Tensor, both: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over pairs of local rows [b, D] of one modality with all columns [B, D] of the other, in blocks.

    Returns:
        Σ_j w_ij column_j [b, D], where w_ij is the derivative of pair ij's loss with respect to its logit;
        with `both`, for one rank, Σ_i w_ij row_i [B, D] as well, else zeros;
        and [Σ loss_ij, Σ w_ij s_ij, Σ w_ij].
    """
    first_row = distributed.rank() * len(rows)  # the column of row i's pair is first_row + i
    by_row, by_column = torch.zeros_like(rows), torch.zeros_like(columns if both else rows)
    sums = rows.new_zeros(3)
    for r, c in block_slices(rows, columns):
        similarity = rows[r] @ columns[c].T
        pair = first_row + r.start - c.start  # diagonal of the block that holds positive pairs
        wrong = similarity * t + bias  # −z · logit; the loss is softplus of it
        wrong.diagonal(pair).neg_()
        loss = -F.logsigmoid(-wrong).sum()
        weight = wrong.sigmoid_()
        weight.diagonal(pair).neg_()
        by_row[r].addmm_(weight, columns[c])
        if both:
            by_column[c].addmm_(weight.T, rows[r])
        sums += torch.stack([loss, similarity.mul_(weight).sum(), weight.sum()])
    return by_row, by_column, sums
