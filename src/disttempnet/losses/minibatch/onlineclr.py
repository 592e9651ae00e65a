"""onlineCLR: all negative pairs of the data set against all positive ones, each followed by one number.

    minimise   τn · log E_neg exp(s / τn) + τp · log E_pos exp(−s / τp)

over negative pairs (i, j) of different samples and positive pairs (i, i), s = x_i·y_j, both directions. The two means
run over the whole data set; u_neg and u_pos follow them over the steps: u ← (1−γ) u + γ g with g the batch's mean. The
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
    LossOutput,
    Objective,
    ObjectiveContext,
    SampleIds,
    compute_dtype,
    exact_arithmetic,
    tau_metrics,
    with_gradient,
)
from disttempnet.losses.sample_state import NEVER, log_moving_average
from disttempnet.losses.schedule import ConstantGamma
from disttempnet.losses.temperature.scalar import check_start

POSITIVE_FACTOR = 10.0  # τp / τn


class OnlineClrLoss(Objective):
    """Pooled contrast with two scalar states.

    Args:
        context: not needed.
        temperature: τn; τp is ten times that.
        gamma: γ.

    Equal ids are no negatives of each other. A batch without negatives has no first term, and leaves u_neg as it is.

    State: `log_u`, [log u_neg, log u_pos], equal on all ranks; −inf = never seen. A step whose new number is not finite
    leaves the old one, and is counted in `rows_not_finite`.
    """

    log_u: Tensor
    rows_not_finite: Tensor

    def __init__(self, context: ObjectiveContext, *, temperature: float = 0.01, gamma: float = 0.5) -> None:
        super().__init__()
        check_start(temperature)
        self.tau, self.gamma = temperature, ConstantGamma(gamma)
        self.register_buffer("log_u", torch.full((2,), NEVER, dtype=torch.float64))
        self.register_buffer("rows_not_finite", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, features: Features, ids: SampleIds | None = None) -> LossOutput:
        """This rank's rows [b, D]. Metrics: loss, log_u of both states, and mean, min, max, std of τn."""
        ids = self.checked(features, ids)
        kernel = use_kernel(features.image_embedding)
        with exact_arithmetic(features.image.device):
            return self._step(features.image, features.text, ids, kernel)

    def _step(self, image: Tensor, text: Tensor, ids: Tensor, kernel: bool) -> LossOutput:
        dtype = compute_dtype(image)
        tau, tau_positive = self.tau, POSITIVE_FACTOR * self.tau
        sent = rounded(image, kernel), rounded(text, kernel)
        x, y = (side.to(dtype) for side in sent)
        all_image, all_text = (distributed.all_gather(side).to(dtype) for side in sent)
        all_ids = distributed.all_gather(ids)
        batch = len(all_ids)

        # the text side's similarities are the image side's, transposed: both directions have one mean
        taus = x.new_full((1, len(x)), tau)
        pairs, counts = BatchPairs.of((x, y), (all_image, all_text), all_ids, kernel)
        own = counts[pairs.mine]
        (negative,), _ = anchor_statistics(pairs, torch.zeros_like(own), taus, own, moments=False, keep=False)
        log_mean, positive = distributed.all_gather(torch.stack([negative.log_mean, (x * y).sum(1)], dim=1)).T
        total_count = counts.sum()
        log_negative = torch.logsumexp(log_mean + counts.log(), 0) - total_count.log()
        log_negative = torch.where(total_count > 0, log_negative, NEVER)
        log_positive = torch.logsumexp(-positive / tau_positive, 0) - math.log(batch)
        log_g = torch.stack([log_negative, log_positive])
        log_u = log_g  # in evaluation: the batch's own
        if self.training:
            log_u = log_moving_average(self.log_u.to(dtype), log_g, self.gamma.gamma)
            usable = log_u < math.inf  # −inf: not seen yet
            self.log_u.copy_(torch.where(usable, log_u, self.log_u))
            self.rows_not_finite += (~usable).sum()

        # each direction has half of the negatives' weight: rows as anchors, and columns as anchors
        weight = Anchors.of(
            *(v.expand(batch) for v in (log_u.new_full((), tau), log_u.new_zeros(()), log_u[0], 2 * total_count))
        )
        attraction = (-(x * y).sum(1) / tau_positive - log_u[1]).exp() / batch
        ranks = batch // len(x)  # the mean over ranks is taken of what must be the sum
        sides = feature_gradients(pairs, weight, weight, attraction, [])
        image_gradient, text_gradient = (ranks * side for side in sides)

        value = torch.where(total_count > 0, tau * log_u[0], 0.0) + tau_positive * log_u[1]
        total = with_gradient(value, image, text, image_gradient, text_gradient)
        metrics = {"loss": value, **tau_metrics(taus[:, :1].expand(2, 1)), "log_u/positive": log_u[1]}
        metrics["log_u/negative"] = torch.where(log_u[0] == NEVER, 0.0, log_u[0])
        metrics["rows_not_finite"] = self.rows_not_finite.clone()
        return LossOutput(total, metrics)

    def temperatures(self, image: Tensor, text: Tensor, ids: SampleIds | None = None) -> Tensor:
        return image.new_full((2, len(image)), self.tau, dtype=compute_dtype(image))
