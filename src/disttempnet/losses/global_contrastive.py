"""Contrastive objectives with one estimator: tracked normalisers or the batch alone, any temperature.

    minimise over towers and temperature   F = c · mean_i [ ω(τ1_i) (log E_j exp(d1_ij / τ1_i) + ρ)
                                                         + ω(τ2_i) (log E_j exp(d2_ij / τ2_i) + ρ) ],   c = ½

    d1_ij = x_i·y_j − x_i·y_i  (anchor image i)      d2_ij = y_i·x_j − x_i·y_i  (anchor text i)

ω(τ) = τ in the robust form (SogCLR, iSogCLR, TempNet, FastCLIP-v1 to v3), 1 in CLIP and FastCLIP-v0. The mean E_j is
over the whole data set. A moving average u_i a sample and side tracks it across the epochs:
log u ← log((1−γ) u + γ g) with g the mean over the batch's negatives (SogCLR, arXiv 2202.12387, alg. 1; robust form
with ρ and learned τ: RGCL, arXiv 2305.11965, and TempNet, arXiv 2404.04575). Everything is kept as a logarithm.
With ε > 0, log (ε + E_j …) stands in place of log E_j … (FastCLIP, arXiv 2407.01445).
Without γ nothing is tracked and E_j is over the batch, the pair itself included: cross-entropy, CLIP. With γ = 1 and
no table (`NoMemory`) the pair itself is left out: the decoupled contrastive loss, arXiv 2110.06848. With a margin m,
[d_ij + m]₊² stands in place of d_ij: TuneCLIP, arXiv 2601.09859. With a reference model d_ij − d^ref_ij does:
DRRho-CLIP, arXiv 2505.06699. With a learned popularity of negatives d_ij − ζ_j does: NUCLR, arXiv 2410.09156.

Shapes: b local rows, B global rows, D width, N samples, K ranks.

The backward pass has no collective: with the weights p detached, the gradient of this rank's rows needs this rank's
rows × all columns and five gathered numbers a sample, seven where τ is learned. The mean of the parameter gradients
over ranks (what DDP takes) is the gradient of the estimator above, for towers and temperatures. With `ring` no rank
holds all columns: they come round once for the statistics, and once more in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from disttempnet import distributed
from disttempnet.losses.contrast.backend import anchor_statistics, feature_gradients, use_kernel
from disttempnet.losses.contrast.pairs import EXCLUDED, Anchors, BatchPairs, rounded
from disttempnet.losses.distillation import Distilled, distill
from disttempnet.losses.drift import Drift, Numbers
from disttempnet.losses.normaliser.prototypes import PrototypeNormaliser
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
    int64_ids,
    tau_metrics,
    with_gradient,
)
from disttempnet.losses.own_parameters import refuse_second_gradient, with_own_gradient
from disttempnet.losses.popularity import Popularity
from disttempnet.losses.sample_state import NEVER, SampleState, log_mean_over_equal_ids, log_moving_average
from disttempnet.losses.schedule import Gamma, NoMemory
from disttempnet.losses.temperature.scalar import AnchorBatch, Temperature

TauGradient = Literal["fcco", "batch"]
TAU_GRADIENTS: tuple[str, ...] = ("fcco", "batch")


class FeatureGradientInputs(NamedTuple):
    """Tensors from which the backward pass computes the feature gradient.

    Attributes:
        all_image, all_text: what is compared, of all ranks [B, D + R]: features, and behind them those of a
            reference, or popularities; None where these are the local features, or come round.
        ids: int64 [B]; None where every column counts.
        anchors: weights of image and text anchors [2, B].
        positive_weight: r, weight of the positive pair [b].
        positive: s_ii of all ranks [B], of the hinge form; else None.
        similarities: blocks of similarities that were kept, or none.
    """

    all_image: Tensor | None
    all_text: Tensor | None
    ids: Tensor | None
    anchors: Anchors
    positive_weight: Tensor
    positive: Tensor | None
    similarities: list[Tensor]


class GlobalContrastiveLoss(Objective):
    """Estimator × temperature × schedule of γ; most objectives are rows of this family. `build_loss` builds them.

    ½ mean_i Σ_sides ω(τ_i) (log (ε + E_j exp(d_ij / τ_i)) + ρ), with the mean E_j over the data set tracked by u_i.

    Args:
        context: gives N.
        temperature: gives τ of every anchor, and learns it.
        gamma: the inner learning rate as a function of the epoch. None: no past and no state; every column counts,
            including the pair itself and equal ids, as in CLIP's cross-entropy. `NoMemory`: no past and no state; the
            pair itself and equal ids are left out.
        predicted: predicts log (ε + E_j …) of every anchor, as NeuCLIP does, in place of the batch's own; with
            `NoMemory`.
        robust: ω(τ) = τ if true, else 1.
        rho: ρ of the robust form, where τ is learned.
        tau_gradient: form of the gradient with respect to τ.
            `fcco`: h = log u + ρ − Σ_j p_ij d_ij / τ, with u as tracked.
            `batch`: h = ρ − KL(softmax of the batch ‖ uniform), which is bounded.
            With ω = 1, h is −Σ_j p_ij d_ij / τ², of the tracked u or of the batch.
        tau_gradient_limit: largest amount that an old u adds to the h of `fcco`, or takes from it (with ω = 1: τ h);
            0 = none. Where u is fresh (γ = 1) h is exact at any limit.
        eps: ε: the objective is ω(τ) (log (ε + u) + ρ), and p_ij = exp(d_ij / τ) / (n (ε + u)). It takes weight from
            anchors whose u is small beside it: those that all negatives trail.
        margin: m of the hinge form, [d_ij + m]₊² in place of d_ij: negatives that trail the pair by more than m have no
            weight. None: the linear form.
        referenced: take d_ij − d^ref_ij in place of d_ij, with the features of a reference model (`Features.of`), which
            have no gradient.
        popularity: ζ of every sample, subtracted where it is a negative; with a constant τ.
        distillation: weight of the cross-entropy with the reference's softmax over the batch (losses/distillation.py).
        drift: share of the running mean M of log g that a step replaces; u of a sample visited long ago is shifted by
            what M has moved since. 0 = u stays as it was at the visit.

    State: log u [2, N] in `state`; the temperature's parameters; step, epoch and M. All in `state_dict()`.

    Shape:
        features: this rank's rows [b, D], as many on every rank. ids: int64 [b]. total: 0-d.

    Example:
        >>> from disttempnet import Features, build_loss
        >>> from torch.nn.functional import normalize
        >>> image, text = (normalize(torch.randn(8, 16), dim=1).requires_grad_() for _ in range(2))
        >>> loss = build_loss("sogclr", num_samples=100, embed_dim=16, temperature=0.1, gamma=0.8)
        >>> loss.set_epoch(0)
        >>> out = loss(Features.unit(image, text), ids=torch.arange(8))
        >>> out.total.backward()
        >>> image.grad.shape, sorted(out.metrics)[:4]
        (torch.Size([8, 16]), ['gamma', 'log_u/image_mean', 'log_u/text_mean', 'loss'])

        At a first visit u is the batch's own g, so that value and gradient are those of this plain form:

        >>> def plain(image, text, tau):
        ...     total = 0.0
        ...     for similarity in (image @ text.T, text @ image.T):
        ...         d = similarity - similarity.diagonal()[:, None]  # [B, B], row i is the anchor
        ...         negatives = d[~torch.eye(len(d), dtype=torch.bool)].view(len(d), -1)  # [B, B - 1]
        ...         g = (negatives / tau).exp().mean(dim=1)
        ...         total += 0.5 * (tau * g.log()).mean()
        ...     return total
        >>> expected = plain(image, text, tau=0.1)
        >>> torch.allclose(out.total, expected, atol=1e-5)
        True
        >>> torch.allclose(image.grad, torch.autograd.grad(expected, image)[0], atol=1e-5)
        True

    Reference:
        SogCLR arXiv 2202.12387; iSogCLR 2305.11965; TempNet 2404.04575; FastCLIP 2407.01445; CLIP 2103.00020.
    """

    def __init__(
        self,
        context: ObjectiveContext,
        temperature: Temperature,
        gamma: Gamma | None,
        *,
        predicted: PrototypeNormaliser | None = None,
        robust: bool = True,
        rho: float = 0.0,
        tau_gradient: TauGradient = "fcco",
        tau_gradient_limit: float = 0.0,
        eps: float = 0.0,
        drift: float = 0.0,
        margin: float | None = None,
        referenced: bool = False,
        distillation: float = 0.0,
        popularity: Popularity | None = None,
    ) -> None:
        super().__init__()
        if tau_gradient not in TAU_GRADIENTS:
            raise ValueError(f"unknown tau_gradient '{tau_gradient}'; known: {', '.join(TAU_GRADIENTS)}")
        if tau_gradient_limit < 0:
            raise ValueError(f"tau_gradient_limit must not be negative, got {tau_gradient_limit}")
        if eps < 0 or not 0 <= drift <= 1:
            raise ValueError(f"need eps >= 0 and 0 <= drift <= 1, got {eps} and {drift}")
        self.temperature = temperature
        self.gamma = gamma
        self.predicted = predicted
        self.robust, self.rho = robust, rho
        self.tau_gradient, self.tau_gradient_limit = tau_gradient, tau_gradient_limit
        if margin is not None and (margin < 0 or gamma is None):
            raise ValueError(f"margin must not be negative, and needs a γ: got {margin} and {gamma}")
        self.eps, self.margin = eps, margin
        self.referenced, self.distillation = referenced, distillation
        self.popularity = popularity
        whole = (predicted, popularity, referenced or None, temperature.reads_all or None)
        self.ring = context.ring and whole == (None,) * 4
        self.drift = Drift(drift) if drift else None
        self.state = None
        if gamma is not None and not isinstance(gamma, NoMemory):
            self.state = SampleState(context.num_samples, {"log_u": NEVER}, context.shard_state)
        self.step = 0
        self.epoch = 0.0
        self.num_samples = context.num_samples
        self._warned = False

    def begin_epoch(self, epoch: float) -> None:
        if epoch != self.epoch:  # a resumed run sets the same epoch again: that begins none
            self.temperature.set_epoch(epoch)
        self.epoch = float(epoch)

    @property
    def scheduled(self) -> bool:
        return (self.gamma is not None and self.gamma.changes) or self.temperature.changes

    @property
    def own_rate(self) -> float:
        return self.temperature.tau_lr

    def rate_at(self, epoch: float) -> float:
        return self.temperature.learning_rate(epoch)

    def current_rate(self) -> float:
        return 0.0 if self.temperature.started is False else self.rate_at(self.epoch)

    def forward(self, features: Features, ids: IdsLike | None = None) -> LossOutput:
        """Compute one step of the estimator.

        Args:
            features: this rank's rows [b, D], any floating dtype.
            ids: [b], sample ids in [0, N). Equal ids are no negatives of each other, where γ is given. In evaluation
                they may be left out, and may be any integers.

        Returns:
            total: c · mean_i ω(τ_i) (log u_i + ρ) over the global batch, both sides; the same on every rank. In
                evaluation u is the batch's own g.
            metrics: loss, gamma, and mean, min, max, std of tau, mean of log_u and of the τ gradient, both sides;
                tau_started: 0 while a network waits to be `ahead`, then 1;
                rows_not_finite: rows of either side that kept their state because a new value was not finite, since
                the process began.

        Raises:
            ValueError, IndexError: see `checked`.
        """
        ids = self.checked(features, ids)
        kernel = use_kernel(features.image_embedding, hinge=self.margin is not None)
        with exact_arithmetic(features.image.device):
            return self._step(features, ids, kernel)

    def check_reference(self, features: Features) -> None:
        if not self.referenced:
            return
        image, text = features.reference_image, features.reference_text
        if image is None or text is None:
            raise ValueError(
                "features of a reference model are needed: Features.of(image, text, reference=(image, text))"
            )
        rows = len(features.image)
        if image.ndim != 2 or image.shape != text.shape or len(image) != rows:
            raise ValueError(
                f"features of the reference must both be [{rows}, R], got {tuple(image.shape)} and {tuple(text.shape)}"
            )

    def _step(self, features: Features, ids: Tensor, kernel: bool) -> LossOutput:
        image, text = features.image, features.text
        dtype, b, learns = compute_dtype(image), len(image), self.temperature.learns
        if self.training:
            self.follow_epoch(b * distributed.world_size())

        # features and ids: x, y [b, D] of this rank; all_image, all_text [B, D], in the dtype that they were sent in,
        # and all_ids [B] of all ranks; and what is compared, which with a reference is [b, D + R] and [B, D + R]
        sent = [rounded(side, kernel) for side in self.compared(features)]
        in_ring = self.ring and distributed.world_size() > 1
        compared = [] if in_ring else [distributed.all_gather(side) for side in sent]
        own = [side.to(dtype) for side in sent]
        all_ids = distributed.all_gather(ids)
        width = image.shape[1]
        zeta: Tensor | None = None
        if self.popularity is not None:
            zeta = self.popularity.read(all_ids, dtype, self.training)
            compared = list(_with_popularity([side.to(dtype) for side in compared], zeta))
            first_row = distributed.rank() * b
            own = [side[first_row : first_row + b] for side in compared]
        everyone = (None, None) if in_ring else (compared[0], compared[1])
        all_image, all_text = (None if side is None else side[:, :width] for side in everyone)
        x, y = (side[:, :width] for side in own)
        rho = self.rho if self.robust and learns else 0.0
        if rho:
            self._warn_of_rho(len(all_ids))

        # temperatures of this rank's anchors: tau1, tau2 [b]
        batch = AnchorBatch(x, y, all_image, all_text, all_ids, self.step)
        tau1, tau2 = self.temperature(batch)
        local_tau = torch.stack([tau1.detach(), tau2.detach()])  # [2, b]

        # statistics of this rank's anchors over all columns: ℓ and m, each [b] a side; n of all anchors [B]
        counted_ids = all_ids if self.gamma is not None else None
        pairs, negatives = BatchPairs.of((own[0], own[1]), everyone, counted_ids, kernel, self.margin)
        positive = (own[0] * own[1]).sum(1)
        exponent_zero = positive if zeta is None else positive + zeta.flip(0)[:, pairs.local]
        keep = torch.is_grad_enabled() and (image.requires_grad or text.requires_grad)
        sides, similarities = anchor_statistics(
            pairs, exponent_zero, local_tau, negatives[pairs.local], moments=learns, keep=keep
        )

        # the same of all anchors: s_ii [B]; τ, ℓ and, where τ is learned, m, each [2, B]
        local = [positive, *local_tau, *(side.log_mean for side in sides)]
        if learns:
            local += [side.mean_exponent for side in sides]
        gathered = distributed.all_gather(torch.stack(local, dim=1)).T
        all_positive, tau, log_g, moment = gathered[0], gathered[1:3], gathered[3:5], gathered[5:]

        # normalisers log u and log (ε + u), weights ω and the gradient h of τ [2, B]; the value, 0-d
        has_negatives = negatives > 0
        log_eps = None if self.popularity is None or zeta is None else self.popularity.log_eps(zeta, tau)
        gamma: Tensor | None = None
        if self.predicted is not None and self.training:
            assert all_image is not None
            assert all_text is not None
            both = torch.stack([all_image, all_text]).to(dtype)
            log_v = log_u = self.predicted(both, all_positive, tau, self.with_eps(log_g), has_negatives)
        else:
            log_u, gamma = self._track(all_ids, log_g, pairs.distinct)
            log_v = self.with_eps(log_u) if log_eps is None else torch.logaddexp(log_u, log_eps)
        excess = self._excess(log_g, log_v)
        weight = tau if self.robust else torch.ones_like(tau)
        h = self._tau_gradient(rho, tau, log_v, log_g, moment, excess, has_negatives) if learns else None
        value = SIDE_WEIGHT * torch.where(has_negatives, weight * (log_v + excess + rho), 0.0).sum(0).mean()
        if zeta is not None:
            value = value + SIDE_WEIGHT * torch.where(has_negatives, zeta, 0.0).sum(0).mean()
        if self.gamma is None:
            value = value + math.log(len(all_ids))  # cross-entropy sums over the batch
        elif isinstance(self.gamma, NoMemory) and self.predicted is None:  # so does its decoupled form
            value = value + torch.where(has_negatives, negatives.to(dtype).log(), 0.0).mean()

        # gradient of the features: column j has the weight ω/τ · p_ij, the positive pair
        # r_i = Σ_j ω/τ (p1_ij + p2_ij) [b], in closed form from the statistics
        share = weight / tau
        r = torch.where(has_negatives, (log_g - log_v).exp() * share, 0.0)[:, pairs.local]
        if self.margin is not None:
            r = r * torch.stack([side.mean_pull for side in sides if side.mean_pull is not None])
        shift = all_positive if self.margin is None else torch.zeros_like(all_positive)
        shift = shift if zeta is None else shift + zeta.flip(0)
        from_local = pairs.single_rank and own[0].shape[1] == width
        inputs = FeatureGradientInputs(
            all_image=None if from_local else everyone[0],
            all_text=None if from_local else everyone[1],
            ids=pairs.ids,
            anchors=Anchors.of(tau, shift, log_v - share.log(), negatives),
            positive_weight=r.sum(0),
            positive=None if self.margin is None else all_positive,
            similarities=similarities,
        )
        form = pairs.first_row, pairs.distinct, kernel, self.margin
        total = _WithFeatureGradient.apply(value, image, text, inputs, *form)
        assert isinstance(total, Tensor)

        # cross-entropy with the reference
        distilled = self._distilled(own, compared, width, tau) if self.distillation else None
        if distilled is not None:
            weighed = [self.distillation * part for part in distilled]
            total = total + with_gradient(weighed[0], image, text, weighed[1], weighed[2])
            value = value + weighed[0]
            h = h + weighed[3] if h is not None else None

        # gradient of τ: parameters through the graph of tau1, tau2; per-sample τ in its table
        if h is not None and (tau1.requires_grad or tau2.requires_grad):
            term = SIDE_WEIGHT / b * (h[0, pairs.local] @ tau1 + h[1, pairs.local] @ tau2)
            total = with_own_gradient(total, term, self)
        if self.training:
            if h is not None:
                self.temperature.learn(all_ids, h, has_negatives, self.still)
                self.temperature.observe(log_g, moment, has_negatives, self.epoch)
            learning = self.popularity is not None and self.popularity.learns_in(self.epoch) and not self.still
            if self.popularity is not None and zeta is not None and learning:
                popular = _popular(pairs, Anchors.of(tau, shift, log_v, torch.ones_like(negatives)))
                itself = (-zeta.flip(0) / tau - log_v).exp().flip(0)
                self.popularity.learn(all_ids, (popular + itself) / len(all_ids), has_negatives)
            self.step += 1
        metrics = self._metrics(value, tau, log_u, gamma, excess, h)
        if distilled is not None:
            metrics["distillation"] = distilled.value
        if zeta is not None:
            metrics["zeta/image_mean"], metrics["zeta/text_mean"] = zeta.mean(1)
        return LossOutput(total, metrics)

    def compared(self, features: Features) -> tuple[Tensor, Tensor]:
        """Return images and texts [b, D], or [b, D + R] whose products are s_ij − s^ref_ij."""
        image, text = features.image.detach(), features.text.detach()
        if not self.referenced:
            return image, text
        first, second = features.reference_image, features.reference_text
        assert first is not None
        assert second is not None
        dtype = compute_dtype(image)
        sides = (image, first), (text, -second)
        both = [torch.cat([ours.to(dtype), theirs.to(dtype)], dim=1) for ours, theirs in sides]
        return both[0], both[1]

    def _distilled(self, own: Sequence[Tensor], compared: Sequence[Tensor], width: int, tau: Tensor) -> Distilled:
        """Return the cross-entropy with the reference, of all columns of the batch."""

        def pairs_of(columns: slice, sign: int) -> BatchPairs:
            local, everyone = ([side[:, columns] for side in sides] for sides in (own, compared))
            return BatchPairs.of((local[0], sign * local[1]), (everyone[0], sign * everyone[1]), None, kernel=False)[0]

        return distill(pairs_of(slice(0, width), 1), pairs_of(slice(width, None), -1), tau)

    def _track(self, ids: Tensor, log_g: Tensor, distinct: bool) -> tuple[Tensor, Tensor | None]:
        """Return new log u [2, B] from the tracked and the batch's log g [2, B], and the mean γ; store u in training.

        First visit: log u = log g. Later: logaddexp(log(1−γ) + log u, log γ + log g). Equal ids share the mean of
        their g and are written once. A row without negatives keeps its log u. So does a row whose new log u is not
        finite: the value and gradient of this step are not finite, those of later steps are. In evaluation log u is
        log g, because ids may belong to other samples. With `drift` the table keeps log u less what M has moved.
        """
        if self.gamma is None:
            return log_g, None
        alone = log_g.new_ones(())  # γ = 1
        if self.state is None:
            return log_g, alone
        if not distinct:
            log_g = log_mean_over_equal_ids(ids, log_g)
        if not self.training:
            return log_g, alone

        # u as read, γ of this epoch or of each row, and the new u
        moved = self.drift.follow(log_g) if self.drift is not None else 0.0
        tracked = self.state.read(ids, checked=True).to(log_g.dtype) + moved
        visited = torch.where(tracked == NEVER, tracked, self.with_eps(tracked))
        shares = self.gamma.shares(self.epoch, visited)
        new = log_moving_average(tracked, log_g, shares)
        self.state.write(ids, new - moved)
        gamma = shares.new.exp().mean() if isinstance(shares.new, Tensor) else log_g.new_full((), math.exp(shares.new))
        return new, gamma

    def with_eps(self, log_u: Tensor) -> Tensor:
        """Return log (ε + u)."""
        return torch.logaddexp(log_u, log_u.new_full((), math.log(self.eps))) if self.eps else log_u

    def _excess(self, log_g: Tensor, log_v: Tensor) -> Tensor:
        """Return e^−α (ε + g) − 1 of predicted α [2, B]: its mean over batches is the relative error of e^α; else 0."""
        if self.predicted is None or not self.training:
            return log_v.new_zeros(())
        return torch.expm1(self.with_eps(log_g) - log_v)

    def _tau_gradient(
        self,
        rho: float,
        tau: Tensor,
        log_v: Tensor,
        log_g: Tensor,
        moment: Tensor,
        excess: Tensor,
        has_negatives: Tensor,
    ) -> Tensor:
        """Return h = ∂F_i/∂τ_i [2, B]; 0 for a row without negatives.

        Args:
            log_v, log_g: log (ε + u), log g of the batch.
            moment: m = Σ_j softmax_ij d_ij / τ.
            excess: of a predicted normaliser, [2, B].
        """
        # Σ_j p_ij d_ij / τ with the batch's own u, and the part that an old u adds
        fresh = self.with_eps(log_g)
        fresh_moment = (log_g - fresh).exp() * moment if self.eps else moment
        stale_moment = torch.expm1(fresh - log_v) * fresh_moment
        if self.robust:
            # without ε: ρ − KL(softmax ‖ uniform)
            h, staleness = rho + fresh - fresh_moment, (log_v - fresh) - stale_moment + excess
        else:
            h, staleness = -fresh_moment, -stale_moment
        if self.tau_gradient == "fcco":
            limit = self.tau_gradient_limit or math.inf
            h = h + staleness.clamp(-limit, limit)
        if not self.robust:
            h = h / tau
        return torch.where(has_negatives, h, 0.0)

    def _metrics(
        self, value: Tensor, tau: Tensor, log_u: Tensor, gamma: Tensor | None, excess: Tensor, h: Tensor | None
    ) -> dict[str, Tensor]:
        metrics = {"loss": value, **tau_metrics(tau)}
        if excess.ndim:
            finite = excess.isfinite()
            mean = torch.where(finite, excess, 0.0).sum(1) / finite.sum(1).clamp(min=1)
            metrics["normaliser_excess/image_mean"], metrics["normaliser_excess/text_mean"] = mean
        if gamma is not None:
            metrics["gamma"] = gamma
        if self.gamma is not None:
            visited = log_u.abs() < math.inf
            mean = torch.where(visited, log_u, 0.0).sum(1) / visited.sum(1).clamp(min=1)
            metrics["log_u/image_mean"], metrics["log_u/text_mean"] = mean
        if self.temperature.started is not None:
            metrics["tau_started"] = value.new_full((), float(self.temperature.started))
        if h is not None:
            metrics["tau_gradient/image_mean"], metrics["tau_gradient/text_mean"] = h.mean(1)

        # a row may have kept its old values in both tables
        tables = [table for table in (self.state, getattr(self.temperature, "state", None)) if table is not None]
        if len(tables) == 1:
            metrics["rows_not_finite"] = tables[0].rows_not_finite.clone()
        elif tables:
            metrics["rows_not_finite"] = torch.stack([table.rows_not_finite for table in tables]).amax()
        return metrics

    def _warn_of_rho(self, batch: int) -> None:
        """Warn once where τ has no optimum at this ρ.

        The optimum has KL(weights ‖ uniform) = ρ. The KL is at most log(B − 1) over the batch, log(N − 1) over the data
        set, which a tracked u stands for.
        """
        if self._warned:
            return
        self._warned = True
        follows = self.predicted is not None or (self.gamma is not None and self.gamma.remembers)
        remembers = follows and self.tau_gradient == "fcco"
        count, symbol = (self.num_samples, "N") if remembers else (batch, "B")
        limit = math.log(max(count - 1, 1))
        if self.rho >= limit:
            of = f"{count:,} samples" if remembers else f"a global batch of {count:,}, without memory of earlier ones"
            self.notice(
                f"rho = {self.rho:g} is not below log({symbol} − 1) = {limit:.3g} of {of}: the gradient of the "
                f"temperature is then never negative and every τ falls to its lower bound; choose rho < {limit:.3g}"
            )

    @torch.no_grad()
    def temperatures(self, image: Tensor, text: Tensor, ids: IdsLike | None = None) -> Tensor | None:
        ids = None if ids is None else int64_ids(ids, len(image)).to(image.device)
        with exact_arithmetic(image.device):
            dtype = compute_dtype(image)
            return self.temperature.predict(image.to(dtype), text.to(dtype), ids)

    def tracked_temperatures(self) -> Tensor | None:
        return self.temperature.tracked()

    @torch.no_grad()
    def log_normalisers(self, image: Tensor, text: Tensor, ids: Tensor, tau: Tensor) -> Tensor | None:
        """Return log (ε + u) of training samples as it is kept, or predicted, now [2, n].

        Args:
            image, text: unit features [n, D], of which a prediction is made; every rank passes the same ones.
            ids: int64 [n]; what is kept goes by them.
            tau: [2, n].

        Returns:
            −inf where a sample was never visited; None where nothing is kept.
        """
        if self.predicted is not None:
            return self.predicted.predict(torch.stack([image, text]), (image * text).sum(1), tau)
        if self.state is None:
            return None
        log_u = self.state.read(ids).to(tau.dtype)
        if self.drift is not None:
            log_u = log_u + self.drift.moved.to(log_u)
        return torch.where(log_u == NEVER, log_u, self.with_eps(log_u))

    def get_extra_state(self) -> Tensor:
        moved = self.drift.numbers if self.drift is not None else ()
        return as_tensor(self.step, float(self.epoch), *moved)

    def set_extra_state(self, state: Tensor | Mapping[str, float]) -> None:
        if self.drift is None:
            step, self.epoch = as_numbers(state, "step", "epoch")
        else:  # in a state that was saved without drift nothing has moved yet
            step, self.epoch, *moved = as_numbers(state, "step", "epoch", later=Numbers()._asdict())
            self.drift.numbers = Numbers(*moved)
        self.step = round(step)


def _with_popularity(compared: Sequence[Tensor], zeta: Tensor) -> tuple[Tensor, Tensor]:
    """Return images and texts of all ranks [B, D + 2] whose products are s_ij − ζ_i − ζ_j, of image i and text j."""
    image, text = compared
    one = torch.ones_like(zeta[0])
    return torch.cat([image, torch.stack([one, -zeta[0]], 1)], 1), torch.cat([text, torch.stack([-zeta[1], one], 1)], 1)


def _popular(pairs: BatchPairs, anchors: Anchors) -> Tensor:
    """Return the weights of images and texts as negatives, summed over all anchors of the other side [2, B]."""
    ones = pairs.image.new_ones(pairs.size, 1)
    summed = pairs._replace(pulled=(ones, ones), kernel=False)
    nothing = torch.zeros_like(pairs.image[:, 0])
    silent = Anchors(torch.zeros_like(anchors.slope[0]), torch.full_like(anchors.offset[0], EXCLUDED))
    first, second = (Anchors(anchors.slope[side], anchors.offset[side]) for side in (0, 1))
    of_text = feature_gradients(summed, first, silent, nothing, [])[1]  # image anchors' columns
    of_image = feature_gradients(summed, silent, second, nothing, [])[0]
    return distributed.all_gather(torch.cat([of_image, of_text], dim=1)).T


class _WithFeatureGradient(torch.autograd.Function):
    """Identity of a value, whose feature gradient is computed in the backward pass: memory for it is taken only there.

    Tensors go through `save_for_backward`, so that autograd frees them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        image: Tensor,
        text: Tensor,
        inputs: FeatureGradientInputs,
        first_row: int,
        distinct: bool,
        kernel: bool,
        margin: float | None,
    ) -> Tensor:
        ctx.first_row, ctx.distinct, ctx.kernel, ctx.margin = first_row, distinct, kernel, margin
        *fixed, anchors, positive_weight, positive, similarities = inputs
        ctx.save_for_backward(image, text, *fixed, *anchors, positive_weight, positive, *similarities)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return (c/b) (M·Y − r⊙y) and (c/b) (Mᵀ·X − r⊙x) with M = A + Cᵀ, each [b, D], times `upstream`."""
        refuse_second_gradient()
        image, text, all_image, all_text, ids, slope, offset, r, positive, *similarities = ctx.saved_tensors
        with exact_arithmetic(image.device):
            local, width = slice(ctx.first_row, ctx.first_row + len(image)), image.shape[1]
            pulled = None
            if all_image is None:
                own = [rounded(side, ctx.kernel).to(r.dtype) for side in (image, text)]
                if distributed.world_size() == 1:
                    all_image, all_text = own
            else:
                own = [side[local].to(r.dtype) for side in (all_image, all_text)]
                if all_image.shape[1] > width:
                    pulled = all_image[:, :width], all_text[:, :width]
            pairs = BatchPairs(
                own[0],
                own[1],
                all_image,
                all_text,
                ctx.first_row,
                ids,
                ctx.distinct,
                ctx.kernel,
                ctx.margin,
                positive,
                pulled,
            )
            image_anchors, text_anchors = Anchors(slope[0], offset[0]), Anchors(slope[1], offset[1])
            image_gradient, text_gradient = feature_gradients(pairs, image_anchors, text_anchors, r, similarities)
            scale = upstream * (SIDE_WEIGHT / len(image))
            image_gradient, text_gradient = image_gradient.mul_(scale), text_gradient.mul_(scale)
        return None, image_gradient.to(image.dtype), text_gradient.to(text.dtype), *(None for _ in range(5))
