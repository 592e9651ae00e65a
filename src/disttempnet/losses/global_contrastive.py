"""The contrastive objectives with one estimator: tracked normalisers or the batch alone, any temperature.

    minimise over towers and temperature   F = c · mean_i [ ω(τ1_i) (log E_j exp(d1_ij / τ1_i) + ρ)
                                                         + ω(τ2_i) (log E_j exp(d2_ij / τ2_i) + ρ) ],   c = ½

    d1_ij = x_i·y_j − x_i·y_i  (anchor image i)      d2_ij = y_i·x_j − x_i·y_i  (anchor text i)

ω(τ) = τ in the robust form (SogCLR, iSogCLR, TempNet, FastCLIP-v1 to v3), 1 in CLIP and FastCLIP-v0. The mean E_j runs
over the whole data set. It is followed by one number a sample and side, u_i, across the epochs:
log u ← log((1−γ) u + γ g) with g the mean over the batch's negatives (SogCLR, arXiv 2202.12387, alg. 1; robust form
with ρ and learned τ: RGCL, arXiv 2305.11965, and TempNet, arXiv 2404.04575). Everything is kept as a logarithm.
Without γ nothing is tracked and E_j runs over the batch, the pair itself included: cross-entropy, CLIP.

Shapes: b local rows, B global rows, D width, N samples, K ranks.

No collective runs in the backward pass: with the weights p detached, the gradient with respect to this rank's rows
needs this rank's rows × all columns and five gathered numbers a sample, seven where τ is learned. The mean of the
parameter gradients over ranks (what DDP takes) is the gradient of the estimator above, for the towers and the
temperatures alike.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from disttempnet import distributed
from disttempnet.errors import UserNotice
from disttempnet.losses.contrast.backend import anchor_statistics, feature_gradients, use_kernel
from disttempnet.losses.contrast.pairs import Anchors, BatchPairs, rounded
from disttempnet.losses.objective import (
    Features,
    LossOutput,
    Objective,
    ObjectiveContext,
    SampleIds,
    as_numbers,
    as_tensor,
    compute_dtype,
    exact_arithmetic,
    int64_ids,
    tau_metrics,
    with_later_gradient,
)
from disttempnet.losses.own_parameters import with_own_gradient
from disttempnet.losses.sample_state import NEVER, SampleState, log_mean_over_equal_ids, log_moving_average
from disttempnet.losses.schedule import Gamma
from disttempnet.losses.temperature.scalar import AnchorBatch, Temperature

C = 0.5  # both sides of a pair are averaged
RHO_SHARE = 0.3  # of log(B − 1): where τ has an optimum inside its bounds (docs/results.md)
STALENESS_LIMIT = 5.0  # on the part of the τ gradient that comes from an old u

TauGradient = Literal["fcco", "batch"]
TAU_GRADIENTS: tuple[str, ...] = ("fcco", "batch")


class GlobalContrastiveLoss(Objective):
    """The estimator × a temperature × a schedule of γ: most objectives are rows of this family.

    Args:
        context: gives N.
        temperature: gives τ of every anchor, and learns it.
        gamma: the inner learning rate as a function of the epoch. None: no past and no state; every column counts,
            also the pair itself and equal ids, as in CLIP's cross-entropy.
        robust: whether ω(τ) = τ, else 1.
        rho: ρ of the robust form, where τ is learned; 0 = 0.3 · log(B − 1), with B the global batch.
        tau_gradient: `fcco`: h = log u + ρ − Σ_j p_ij d_ij / τ, with u as tracked; what an old u adds to it is
            clamped to ±5, so that it is exact where u is fresh (γ = 1) and bounded elsewhere.
            `batch`: h = ρ − KL(softmax of the batch ‖ uniform), bounded by itself.
            With ω = 1 it is −Σ_j p_ij d_ij / τ² and its batch's own form.

    State: log u [2, N] in `state`; the temperature's parameters; step and epoch. All in `state_dict()`.
    """

    def __init__(
        self,
        context: ObjectiveContext,
        temperature: Temperature,
        gamma: Gamma | None,
        *,
        robust: bool = True,
        rho: float = 0.0,
        tau_gradient: TauGradient = "fcco",
    ) -> None:
        super().__init__()
        if tau_gradient not in TAU_GRADIENTS:
            raise ValueError(f"unknown tau_gradient '{tau_gradient}'; known: {', '.join(TAU_GRADIENTS)}")
        self.temperature = temperature
        self.gamma = gamma
        self.robust, self.rho, self.tau_gradient = robust, rho, tau_gradient
        self.state = None
        if gamma is not None:
            self.state = SampleState(context.num_samples, {"log_u": NEVER}, context.shard_state)
        self.step = 0
        self.epoch = 0.0
        self.num_samples = context.num_samples
        self._warned = False
        self._epoch_settled = False  # somebody tells it, or it was said that nobody does
        self._rows_untold = 0  # of the global batches seen until then

    def set_epoch(self, epoch: float) -> None:
        """Tell the schedules of γ and τ where training is; call it at the start of every epoch.

        From then on the objective no longer counts `steps_per_epoch` itself.
        """
        self._epoch_settled = True
        self._begin_epoch(epoch)

    def _begin_epoch(self, epoch: float) -> None:
        if not epoch >= 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        if epoch != self.epoch:  # a resumed run says again where it is: that begins no epoch
            self.temperature.set_epoch(epoch)
        self.epoch = float(epoch)

    @property
    def own_rate(self) -> float:
        return self.temperature.tau_lr

    def rate_at(self, epoch: float) -> float:
        return self.temperature.learning_rate(epoch)

    def current_rate(self) -> float:
        return self.rate_at(self.epoch)

    def forward(self, features: Features, ids: SampleIds | None = None) -> LossOutput:
        """One step of the estimator.

        Args:
            features: this rank's rows [b, D], any floating dtype.
            ids: [b], the samples' numbers in [0, N). Equal ids are no negatives of each other, where γ is given. In
                evaluation they may be left out, and may be any numbers.

        Returns:
            total: c · mean_i ω(τ_i) (log u_i + ρ) over the global batch, both sides; the same on every rank. In
                evaluation u is the batch's own g.
            metrics: loss, gamma, and mean, min, max, std of tau, mean of log_u and of the τ gradient, both sides;
                rows_not_finite, of either side, that kept their state for that reason since the process began.
        """
        ids = self.checked(features, ids)
        kernel = use_kernel(features.image_embedding)
        with exact_arithmetic(features.image.device):
            return self._step(features.image, features.text, ids, kernel)

    def _step(self, image: Tensor, text: Tensor, ids: Tensor, kernel: bool) -> LossOutput:
        dtype, b = compute_dtype(image), len(image)
        if self.training:
            self._follow_epoch(b * distributed.world_size())
        sent = rounded(image, kernel), rounded(text, kernel)
        all_image, all_text = (distributed.all_gather(side).to(dtype) for side in sent)
        all_ids = distributed.all_gather(ids)
        x, y = (side.to(dtype) for side in sent)
        rho = self._resolve_rho(len(all_ids))

        batch = AnchorBatch(x, y, all_image, all_text, all_ids, self.step)
        tau1, tau2 = self.temperature(batch)
        counted = all_ids if self.gamma is not None else None
        pairs, negatives = BatchPairs.of((x, y), (all_image, all_text), counted, kernel)
        positive = (x * y).sum(1)
        taus = torch.stack([tau1.detach(), tau2.detach()])
        sides, kept = anchor_statistics(
            pairs,
            positive,
            taus,
            negatives[batch.mine],
            moments=self.temperature.learns,
            keep=torch.is_grad_enabled() and (image.requires_grad or text.requires_grad),
        )
        local = [positive, *taus, *(side.log_mean for side in sides)]
        local += [side.mean_exponent for side in sides] if self.temperature.learns else []
        gathered = distributed.all_gather(torch.stack(local, dim=1)).T
        all_positive, tau, log_g, moment = gathered[0], gathered[1:3], gathered[3:5], gathered[5:]

        log_u = self._track(all_ids, log_g)
        weight = tau if self.robust else torch.ones_like(tau)
        h = self._tau_gradient(rho, tau, log_u, log_g, moment, negatives) if self.temperature.learns else None
        value = C * torch.where(negatives > 0, weight * (log_u + rho), 0.0).sum(0).mean()
        if self.gamma is None:
            value = value + math.log(len(all_ids))  # cross-entropy sums over the batch

        # the weight of column j in an anchor's gradient is ω/τ · p_ij
        anchors = [Anchors.of(tau[i], all_positive, log_u[i] - (weight / tau)[i].log(), negatives) for i in (0, 1)]
        # r_i = Σ_j ω/τ (p1_ij + p2_ij): the pull of the positive pair, in closed form from the row statistics
        r = torch.where(negatives > 0, (log_g - log_u).exp() * weight / tau, 0.0).sum(0)[batch.mine]
        others = (None, None) if pairs.whole else (all_image, all_text)
        gradient = partial(_feature_gradient, own=pairs.own, distinct=pairs.distinct, kernel=kernel)
        total = with_later_gradient(
            value, image, text, gradient, *others, pairs.ids, *anchors[0], *anchors[1], r, *kept
        )
        if h is not None and (tau1.requires_grad or tau2.requires_grad):
            total = with_own_gradient(total, C / b * (h[0, batch.mine] @ tau1 + h[1, batch.mine] @ tau2), self)
        if self.training:
            if h is not None:
                self.temperature.learn(all_ids, h, negatives > 0)
            self.step += 1
        return LossOutput(total, self._metrics(value, tau, log_u, h))

    def _follow_epoch(self, batch: int) -> None:
        """Begin the epoch of this step where nobody tells; say once that it is not known where it matters."""
        if self._epoch_settled:
            return
        if self.steps_per_epoch:
            self._begin_epoch(self.step // self.steps_per_epoch)
            return
        self._rows_untold += batch
        scheduled = (self.gamma is not None and self.gamma.changes) or self.temperature.changes
        if scheduled and self._rows_untold > self.num_samples + batch:
            self._epoch_settled = True
            self._notice(
                f"more than the {self.num_samples} samples of an epoch have passed and set_epoch was never called: "
                f"the schedules of γ and of the temperature's rate stay at epoch {self.epoch:g}; call "
                "loss.set_epoch(epoch) at the start of every epoch, or build_loss(…, steps_per_epoch=len(loader))"
            )

    def _notice(self, what: str) -> None:
        if distributed.is_main():
            warnings.warn(what, UserNotice, stacklevel=7)  # whoever called the module

    def _track(self, ids: Tensor, log_g: Tensor) -> Tensor:
        """New log u [2, B] from the old and the batch's log g [2, B]; written by the owners when training.

        First visit: log u = log g. Later: logaddexp(log(1−γ) + log u, log γ + log g). Equal ids share the mean of
        their g and are written once. A sample whose rows have no negatives keeps what it had, and so does one whose
        new log u is not finite: the value and gradient of this step are not, those of later steps are. In evaluation
        log u is log g: whose ids they are is not known.
        """
        if self.gamma is None or self.state is None:
            return log_g
        log_g = log_mean_over_equal_ids(ids, log_g)
        if not self.training:
            return log_g
        new = log_moving_average(self.state.read(ids).to(log_g.dtype), log_g, self.gamma(self.epoch))
        self.state.write(ids, new)
        return new

    def _tau_gradient(
        self, rho: float, tau: Tensor, log_u: Tensor, log_g: Tensor, moment: Tensor, negatives: Tensor
    ) -> Tensor:
        """h = ∂F_i/∂τ_i [2, B]; 0 for a row without negatives."""
        stale_moment = torch.expm1(log_g - log_u) * moment  # what an old u adds to Σ_j p_ij d_ij / τ
        if self.robust:
            h, staleness = rho + log_g - moment, (log_u - log_g) - stale_moment  # ρ − KL(softmax ‖ uniform)
        else:
            h, staleness = -moment, -stale_moment
        if self.tau_gradient == "fcco":
            h = h + staleness.clamp(-STALENESS_LIMIT, STALENESS_LIMIT)
        if not self.robust:
            h = h / tau
        return torch.where(negatives > 0, h, 0.0)

    def _metrics(self, value: Tensor, tau: Tensor, log_u: Tensor, h: Tensor | None) -> dict[str, Tensor]:
        metrics = {"loss": value, **tau_metrics(tau)}
        if self.gamma is not None:
            metrics["gamma"] = value.new_full((), self.gamma(self.epoch))  # filled there: no transfer to a GPU
        for side, name in enumerate(("image", "text")):
            if self.gamma is not None:
                visited = log_u[side].masked_fill(log_u[side] == NEVER, math.nan)
                metrics[f"log_u/{name}_mean"] = visited.nanmean().nan_to_num()
            if h is not None:
                metrics[f"tau_gradient/{name}_mean"] = h[side].mean()
        tables = [table for table in (self.state, getattr(self.temperature, "state", None)) if table is not None]
        if tables:  # a row may be left as it was in both
            metrics["rows_not_finite"] = torch.stack([table.rows_not_finite for table in tables]).amax()
        return {name: value.detach() for name, value in metrics.items()}

    def _resolve_rho(self, batch: int) -> float:
        """ρ at this global batch; warns once where τ has no optimum at it."""
        limit = math.log(max(batch - 1, 1))
        if not (self.robust and self.temperature.learns):
            return 0.0
        if self.rho and self.rho >= limit and not self._warned:
            self._notice(
                f"rho = {self.rho:g} is not below log(B − 1) = {limit:.3g} at a global batch of {batch}: the "
                "gradient of the temperature is then never negative and every τ falls to its lower bound; "
                f"choose rho < {limit:.3g}, or 0 for {RHO_SHARE:g} · log(B − 1)"
            )
        self._warned = True
        return self.rho or RHO_SHARE * limit

    @torch.no_grad()
    def temperatures(self, image: Tensor, text: Tensor, ids: SampleIds | None = None) -> Tensor | None:
        ids = None if ids is None else int64_ids(ids, len(image)).to(image.device)
        with exact_arithmetic(image.device):
            dtype = compute_dtype(image)
            return self.temperature.predict(image.to(dtype), text.to(dtype), ids)

    def tracked_temperatures(self) -> Tensor | None:
        return self.temperature.tracked()

    def get_extra_state(self) -> Tensor:
        return as_tensor(self.step, float(self.epoch))

    def set_extra_state(self, state: Tensor | Mapping[str, float]) -> None:
        step, self.epoch = as_numbers(state, "step", "epoch")
        self.step = round(step)


def _feature_gradient(
    upstream: Tensor,
    image: Tensor,
    text: Tensor,
    all_image: Tensor | None,
    all_text: Tensor | None,
    ids: Tensor | None,
    slope1: Tensor,
    offset1: Tensor,
    slope2: Tensor,
    offset2: Tensor,
    r: Tensor,
    *kept: Tensor,
    own: int,
    distinct: bool,
    kernel: bool,
) -> tuple[Tensor, Tensor]:
    """(c/b) (M·Y − r⊙y) and (c/b) (Mᵀ·X − r⊙x), M = A + Cᵀ, times `upstream`; all_… None: the local rows are all."""
    x, y = (rounded(side, kernel).to(r.dtype) for side in (image, text))
    pairs = BatchPairs(
        x, y, x if all_image is None else all_image, y if all_text is None else all_text, own, ids, distinct, kernel
    )
    gradients = feature_gradients(pairs, Anchors(slope1, offset1), Anchors(slope2, offset2), r, list(kept))
    scale = upstream * (C / len(x))
    return gradients[0].mul_(scale), gradients[1].mul_(scale)
