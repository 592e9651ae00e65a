"""AmorLIP: partition functions amortised by small networks, in place of the batch's own (arXiv 2505.18983).

    minimise   ½ mean_i Σ_sides [ −s_ii + τ Σ_j w_ij exp(s_ij/τ) / Z̃_i ] + ½ ρ τ,      Z̃ constant

over the columns j of other ids, w_ij = 1, and the pair itself, w_ii = .001. Z_i is the sum over the batch, and
Z̃ = β λ_before(x_i) + (1 − β) Z_i with λ_before of the networks of the epoch before (normaliser/amortised.py). τ has the
gradient of that with its own factor τ constant, and of the last term. ρ changes its sign after a third of the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from disttempnet import distributed
from disttempnet.losses.contrast.backend import anchor_statistics, feature_gradients, use_kernel
from disttempnet.losses.contrast.pairs import EXCLUDED, Anchors, BatchPairs, rounded
from disttempnet.losses.normaliser.amortised import AmortisedPartition
from disttempnet.losses.objective import (
    SIDE_WEIGHT,
    Features,
    IdsLike,
    LossOutput,
    Objective,
    ObjectiveContext,
    as_numbers,
    as_tensor,
    compute_dtype,
    exact_arithmetic,
    tau_metrics,
    with_gradient,
)
from disttempnet.losses.own_parameters import with_own_gradient
from disttempnet.losses.temperature.scalar import AnchorBatch, LearnableTemperature

PAIR_WEIGHT = 1e-3  # of the pair itself in its sum


class AmorLipLoss(Objective):
    """Linear contrast against amortised partition functions, with a learnable τ that is trained with the towers.

    ½ mean Σ_sides [ −s_ii + τ Σ_j w_ij exp(s_ij/τ) / Z̃_i ] + ½ ρ τ,   Z̃ = β λ_before + (1 − β) Z of the batch

    Args:
        context: gives D, and the seed of the networks.
        temperature, tau_min, tau_max: τ at the start, and its bounds.
        rho: ρ; −ρ from `rho_flip_epoch` on.
        rho_flip_epoch: 11 is a third of the published 33 epochs.
        partition_lr, partition_steps, partition_average, partition_share, partition_share_epochs: of the networks, see
            `AmortisedPartition`.

    Call `set_epoch` at the start of every epoch, or build with `steps_per_epoch`: the networks begin anew.

    Shape:
        features: this rank's rows [b, D], as many on every rank. ids: int64 [b], None where all differ. total: 0-d.

    Example:
        In epoch 0 Z̃ is the batch's own Z, so that value and gradient are those of this plain form:

        >>> from disttempnet import Features, build_loss
        >>> from torch.nn.functional import normalize
        >>> def plain(image, text, tau, rho):
        ...     s, total = image @ text.T, 0.5 * rho * tau
        ...     weight = torch.ones_like(s).fill_diagonal_(1e-3)
        ...     for side in (s, s.T):
        ...         terms = weight * (side / tau).exp()
        ...         total = total + 0.5 * (tau * (terms / terms.sum(1, keepdim=True).detach()).sum(1)).mean()
        ...     return total - s.diagonal().mean()
        >>> image, text = (normalize(torch.randn(8, 16), dim=1).requires_grad_() for _ in range(2))
        >>> loss = build_loss("amorlip", num_samples=100, embed_dim=16)
        >>> loss.set_epoch(0)
        >>> total, expected = loss(Features.unit(image, text)).total, plain(image, text, tau=0.07, rho=8.5)
        >>> torch.allclose(total, expected, atol=1e-5)
        True
        >>> gradients, wanted = (torch.autograd.grad(value, (image, text)) for value in (total, expected))
        >>> all(torch.allclose(*pair, atol=1e-5) for pair in zip(gradients, wanted))
        True

    Reference:
        AmorLIP: efficient language-image pretraining via amortization, arXiv 2505.18983.
    """

    def __init__(
        self,
        context: ObjectiveContext,
        *,
        temperature: float = 0.07,
        tau_min: float = 0.01,
        tau_max: float = 1.0,
        rho: float = 8.5,
        rho_flip_epoch: int = 11,
        partition_lr: float = 1e-3,
        partition_steps: int = 3,
        partition_average: float = 0.92,
        partition_share: float = 0.8,
        partition_share_epochs: float = 16.0,
    ) -> None:
        super().__init__()
        self.temperature = LearnableTemperature(context, temperature=temperature, tau_min=tau_min, tau_max=tau_max)
        self.partition = AmortisedPartition(
            context,
            partition_lr=partition_lr,
            partition_steps=partition_steps,
            partition_average=partition_average,
            partition_share=partition_share,
            partition_share_epochs=partition_share_epochs,
        )
        self.rho, self.rho_flip_epoch = rho, rho_flip_epoch
        self.step, self.epoch = 0, 0.0
        self.num_samples = context.num_samples

    @property
    def scheduled(self) -> bool:
        return True

    def begin_epoch(self, epoch: float) -> None:
        if epoch != self.epoch:  # a resumed run sets the same epoch again: that begins none
            self.partition.begin_epoch(epoch)
        self.epoch = float(epoch)

    def forward(self, features: Features, ids: IdsLike | None = None) -> LossOutput:
        """Return the loss; metrics: loss, mean, min, max, std of τ, mean of log Z̃ and of Z/Z̃ − 1, both sides."""
        ids = self.checked(features, ids)
        kernel = use_kernel(features.image_embedding)
        with exact_arithmetic(features.image.device):
            return self._step(features.image, features.text, ids, kernel)

    def _step(self, image: Tensor, text: Tensor, ids: Tensor, kernel: bool) -> LossOutput:
        dtype, b = compute_dtype(image), len(image)
        if self.training:
            self.follow_epoch(b * distributed.world_size())

        # features and ids: x, y [b, D] of this rank; all_image, all_text [B, D] and all_ids [B] of all ranks; τ [b]
        sent = rounded(image, kernel), rounded(text, kernel)
        x, y = (side.to(dtype) for side in sent)
        all_image, all_text = (distributed.all_gather(side).to(dtype) for side in sent)
        all_ids = distributed.all_gather(ids)
        tau, _ = self.temperature(AnchorBatch(x, y, all_image, all_text, all_ids, self.step))
        taus = tau.detach().expand(2, b)

        # log-means and moments over the negatives, and s_ii, of this rank's anchors, then of all
        pairs, negatives = BatchPairs.of((x, y), (all_image, all_text), all_ids, kernel)
        positive = (x * y).sum(1)
        sides, _ = anchor_statistics(pairs, positive, taus, negatives[pairs.local], moments=True, keep=False)
        local = [positive, tau.detach(), *(s.log_mean for s in sides), *(s.mean_exponent for s in sides)]
        gathered = distributed.all_gather(torch.stack(local, dim=1)).T
        all_positive, all_tau, log_mean, moment = gathered[0], gathered[1], gathered[2:4], gathered[4:]

        # log Z of the batch and log Z̃, and the masses Σ_j exp(s_ij/τ)/Z̃ of the negatives and of the pair: [2, B]
        ahead = all_positive / all_tau
        log_negatives = torch.where(negatives > 0, log_mean + negatives.log() + ahead, -torch.inf)
        log_pair = math.log(PAIR_WEIGHT) + ahead
        log_z = torch.logaddexp(log_negatives, log_pair)
        log_target = log_z
        if self.training:
            both = torch.stack([all_image, all_text])
            log_target = self.partition.target(both, log_z, self.epoch)
            self.partition.fit(both, log_target)
            self.step += 1
        of_negatives, of_pair = (log_negatives - log_target).exp(), (log_pair - log_target).exp()
        mass = of_negatives + of_pair

        # the value, and the gradient of the features
        rho = self.rho if self.epoch < self.rho_flip_epoch else -self.rho
        value = SIDE_WEIGHT * (all_tau * mass).sum(0).mean() - all_positive.mean() + 0.5 * rho * all_tau.mean()
        offset = torch.where(negatives > 0, -log_target, EXCLUDED)
        slope = (1 / all_tau).expand_as(offset)
        image_anchors, text_anchors = (Anchors(slope[side], offset[side]) for side in (0, 1))
        attraction = (1 - of_pair).sum(0)[pairs.local]
        gradients = feature_gradients(pairs, image_anchors, text_anchors, attraction, [])
        scale = SIDE_WEIGHT / b
        total = with_gradient(value, image, text, scale * gradients[0], scale * gradients[1])

        # the gradient of τ
        if tau.requires_grad:
            pulled = of_negatives * (moment * all_tau + all_positive) + (of_pair - 1) * all_positive
            h = 0.5 * rho - pulled / all_tau
            total = with_own_gradient(total, scale * (h.sum(0)[pairs.local] @ tau), self)
        metrics = {"loss": value, **tau_metrics(all_tau.expand(2, len(all_ids)))}
        metrics["log_u/image_mean"], metrics["log_u/text_mean"] = log_target.mean(1)
        metrics["normaliser_excess/image_mean"], metrics["normaliser_excess/text_mean"] = mass.mean(1) - 1
        return LossOutput(total, metrics)

    @torch.no_grad()
    def temperatures(self, image: Tensor, text: Tensor, ids: IdsLike | None = None) -> Tensor:
        return self.temperature.predict(image.to(compute_dtype(image)), text, None)

    def get_extra_state(self) -> Tensor:
        return as_tensor(self.step, float(self.epoch))

    def set_extra_state(self, state: Tensor | Mapping[str, float]) -> None:
        step, self.epoch = as_numbers(state, "step", "epoch")
        self.step = round(step)
