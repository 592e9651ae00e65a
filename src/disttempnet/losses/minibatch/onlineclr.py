"""onlineCLR: all negative pairs of the data set against all positive ones, each mean tracked by one number.

    minimise   τn · log E_neg exp(s / τn) + τp · log E_pos exp(−s / τp)

over negative pairs (i, j) of different samples and positive pairs (i, i), s = x_i·y_j, both directions. The two means
are over the whole data set. Moving averages u_neg and u_pos track them: u ← (1−γ) u + γ g with g the batch's mean. The
gradient has the weights exp(s/τn) / u_neg and exp(−s/τp) / u_pos, detached. From the bimodal code of iSogCLR
(arXiv 2305.11965), where it is a baseline.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from disttempnet import distributed
from disttempnet.losses.contrast.backend import anchor_statistics, feature_gradients, use_kernel
from disttempnet.losses.contrast.pairs import Anchors, BatchPairs, rounded
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
from disttempnet.losses.sample_state import NEVER, log_moving_average
from disttempnet.losses.schedule import ConstantGamma, Shares
from disttempnet.losses.temperature.scalar import check_start

POSITIVE_FACTOR = 10.0  # τp / τn


class OnlineClrLoss(Objective):
    """Pooled contrast with two scalar states.

    τn · log E_neg exp(s / τn) + τp · log E_pos exp(−s / τp),   τp = 10 τn

    Equal ids are no negatives of each other. A batch without negatives has no first term, and leaves u_neg as it is.

    Args:
        context: not used.
        temperature: τn; τp is ten times that.
        gamma: γ.

    State: `log_u`, [log u_neg, log u_pos], equal on all ranks; −inf = never seen. A step whose new number is not finite
    keeps the old one, and is counted in `rows_not_finite`.

    Shape:
        features: this rank's rows [b, D], as many on every rank. ids: int64 [b], None where all differ. total: 0-d.

    Example:
        At the first step u is the batch's own mean, so that value and gradient are those of this plain form:

        >>> from disttempnet import Features, build_loss
        >>> def plain(image, text, tau):
        ...     s = image @ text.T  # [B, B]
        ...     negative, positive = s[~torch.eye(len(s), dtype=torch.bool)], s.diagonal()
        ...     first = tau * (negative / tau).exp().mean().log()
        ...     return first + 10 * tau * (-positive / (10 * tau)).exp().mean().log()
        >>> from torch.nn.functional import normalize
        >>> image, text = (normalize(torch.randn(8, 16), dim=1).requires_grad_() for _ in range(2))
        >>> loss = build_loss("onlineclr", num_samples=100, embed_dim=16, temperature=0.1)
        >>> total, expected = loss(Features.unit(image, text)).total, plain(image, text, tau=0.1)
        >>> torch.allclose(total, expected, atol=1e-5)
        True
        >>> gradients, wanted = (torch.autograd.grad(value, (image, text)) for value in (total, expected))
        >>> all(torch.allclose(*pair, atol=1e-5) for pair in zip(gradients, wanted))
        True

    Reference:
        Code of iSogCLR, arXiv 2305.11965.
    """

    log_u: Tensor
    rows_not_finite: Tensor

    def __init__(self, context: ObjectiveContext, *, temperature: float = 0.01, gamma: float = 0.5) -> None:
        super().__init__()
        check_start(temperature)
        self.tau, self.gamma = temperature, ConstantGamma(gamma)
        self.register_buffer("log_u", torch.full((2,), NEVER, dtype=torch.float64))
        self.register_buffer("rows_not_finite", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, features: Features, ids: IdsLike | None = None) -> LossOutput:
        """Return the loss; metrics: loss, log_u of both states, rows_not_finite, and mean, min, max, std of τn."""
        ids = self.checked(features, ids)
        kernel = use_kernel(features.image_embedding)
        with exact_arithmetic(features.image.device):
            return self._step(features.image, features.text, ids, kernel)

    def _step(self, image: Tensor, text: Tensor, ids: Tensor, kernel: bool) -> LossOutput:
        # features and ids: x, y [b, D] of this rank; all_image, all_text [B, D] and all_ids [B] of all ranks
        dtype = compute_dtype(image)
        tau, tau_positive = self.tau, POSITIVE_FACTOR * self.tau
        sent = rounded(image, kernel), rounded(text, kernel)
        x, y = (side.to(dtype) for side in sent)
        all_image, all_text = (distributed.all_gather(side).to(dtype) for side in sent)
        all_ids = distributed.all_gather(ids)
        batch = len(all_ids)

        # log-mean over the negatives of each local image [b], and s_ii [b]; then of all ranks [B]. The text side's
        # similarities are the image side's, transposed: both directions have the same mean
        taus = x.new_full((1, len(x)), tau)
        pairs, counts = BatchPairs.of((x, y), (all_image, all_text), all_ids, kernel)
        own_counts = counts[pairs.local]
        zero = torch.zeros_like(own_counts)  # in place of s_ii: exponents are s/τ, not d/τ
        (negative,), _ = anchor_statistics(pairs, zero, taus, own_counts, moments=False, keep=False)
        log_mean, positive = distributed.all_gather(torch.stack([negative.log_mean, (x * y).sum(1)], dim=1)).T

        # log g of negatives and positives, and the tracked log u: each [2]
        total_count = counts.sum()
        log_negative = torch.logsumexp(log_mean + counts.log(), 0) - total_count.log()
        log_negative = torch.where(total_count > 0, log_negative, NEVER)
        log_positive = torch.logsumexp(-positive / tau_positive, 0) - math.log(batch)
        log_g = torch.stack([log_negative, log_positive])
        log_u = log_g  # in evaluation, the batch's own
        if self.training:
            log_u = log_moving_average(self.log_u.to(dtype), log_g, Shares.of(self.gamma.gamma))
            usable = log_u < math.inf  # −inf: never seen
            self.log_u.copy_(torch.where(usable, log_u, self.log_u))
            self.rows_not_finite += (~usable).sum()

        # gradient of the features [b, D]: half of the negatives' weight for rows as anchors, half for columns; it must
        # be summed over ranks, and DDP takes the mean
        weight = Anchors.of(
            *(v.expand(batch) for v in (log_u.new_full((), tau), log_u.new_zeros(()), log_u[0], 2 * total_count))
        )
        attraction = (-(x * y).sum(1) / tau_positive - log_u[1]).exp() / batch
        ranks = batch // len(x)
        sides = feature_gradients(pairs, weight, weight, attraction, [])
        image_gradient, text_gradient = (ranks * side for side in sides)

        value = torch.where(total_count > 0, tau * log_u[0], 0.0) + tau_positive * log_u[1]
        total = with_gradient(value, image, text, image_gradient, text_gradient)
        metrics = {"loss": value, **tau_metrics(taus[:, :1].expand(2, 1)), "log_u/positive": log_u[1]}
        metrics["log_u/negative"] = torch.where(log_u[0] == NEVER, 0.0, log_u[0])
        metrics["rows_not_finite"] = self.rows_not_finite.clone()
        return LossOutput(total, metrics)

    def temperatures(self, image: Tensor, text: Tensor, ids: IdsLike | None = None) -> Tensor:
        return image.new_full((2, len(image)), self.tau, dtype=compute_dtype(image))
