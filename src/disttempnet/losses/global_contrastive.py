"""The global contrastive objective with tracked normalisers: the estimator, and its exact distributed gradient.

    minimise over towers and temperature   F = c · mean_i [ τ1_i (log E_j exp(d1_ij / τ1_i) + ρ)
                                                         + τ2_i (log E_j exp(d2_ij / τ2_i) + ρ) ],   c = ½

    d1_ij = x_i·y_j − x_i·y_i  (anchor image i)      d2_ij = y_i·x_j − x_i·y_i  (anchor text i)

The mean E_j runs over the whole data set. It is followed by one number a sample and side, u_i, across the epochs:
log u ← log((1−γ) u + γ g) with g the mean over the batch's negatives (SogCLR, arXiv 2202.12387, alg. 1; robust form
with ρ and learned τ: RGCL, arXiv 2305.11965, and TempNet, arXiv 2404.04575). Everything is kept as a logarithm.

Shapes: b local rows, B global rows, D width, N samples, K ranks.

No collective runs in the backward pass: with the weights p detached, the gradient with respect to this rank's rows
needs this rank's rows × all columns and eight gathered numbers a sample. The mean of the parameter gradients over
ranks (what DDP takes) is the gradient of the estimator above, for the towers and the temperature networks alike.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from torch import Tensor

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
from disttempnet.losses.sample_state import SampleState
from disttempnet.losses.schedule import Gamma
from disttempnet.losses.temperature import Batch, ConstantTemperature, Temperature

C = 0.5  # both sides of a pair are averaged
STALENESS_LIMIT = 5.0  # on the part of the τ gradient that comes from an old u

TauGradient = Literal["fcco", "batch"]
TAU_GRADIENTS: tuple[str, ...] = ("fcco", "batch")


class GlobalContrastiveLoss(Objective):
    """The estimator × a temperature × a schedule of γ: SogCLR, TempNet and DistTempNet are rows of this family.

    Args:
        num_samples: N, the size of the data set; ids lie in [0, N).
        temperature: gives τ of every anchor, and learns it.
        gamma: the inner learning rate as a function of the epoch.
        rho: weight of τ in the robust objective; ignored by a constant temperature, where it is a constant.
        tau_gradient: `fcco`: h = log u + ρ − Σ_j p_ij d_ij / τ, with u as tracked; what an old u adds to it is
            clamped to ±5, so that it is exact where u is fresh (γ = 1) and bounded elsewhere.
            `batch`: h = ρ − KL(softmax of the batch ‖ uniform), bounded by itself.

    State: log u [2, N / K] a rank in `state`; the temperature's parameters; step and epoch. All in `state_dict()`.
    """

    def __init__(
        self,
        num_samples: int,
        temperature: Temperature,
        gamma: Gamma,
        rho: float = 0.0,
        tau_gradient: TauGradient = "fcco",
    ) -> None:
        super().__init__()
        if tau_gradient not in TAU_GRADIENTS:
            raise ValueError(f"unknown tau_gradient '{tau_gradient}'; known: {', '.join(TAU_GRADIENTS)}")
        self.temperature = temperature
        self.gamma = gamma
        self.learns_tau = not isinstance(temperature, ConstantTemperature)
        self.rho = rho if self.learns_tau else 0.0
        self.tau_gradient = tau_gradient
        self.state = SampleState(num_samples)
        self.step = 0
        self.epoch = 0.0
        self._warned = False

    def set_epoch(self, epoch: float) -> None:
        """Tell the schedule of γ where training is; call it at the start of every epoch."""
        self.epoch = epoch

    def forward(self, image_features: Tensor, text_features: Tensor, ids: Tensor) -> LossOutput:
        """One step of the estimator.

        Args:
            image_features, text_features: this rank's rows [b, D], of unit norm, any floating dtype.
            ids: int64 [b], the samples' ids. Equal ids are no negatives of each other.

        Returns:
            total: c · mean_i τ_i (log u_i + ρ) over the global batch, both sides; the same on every rank.
            metrics: gamma, and mean, min, max, std of tau, mean of log_u and of the τ gradient for both sides.
        """
        check_features(image_features, text_features, ids)
        with exact_arithmetic(image_features.device):
            return self._step(image_features, text_features, ids)

    def _step(self, image: Tensor, text: Tensor, ids: Tensor) -> LossOutput:
        dtype, b = compute_dtype(image), len(image)
        all_image = distributed.all_gather(image).to(dtype)
        all_text = distributed.all_gather(text).to(dtype)
        all_ids = distributed.all_gather(ids)
        x, y = image.detach().to(dtype), text.detach().to(dtype)
        if not self._warned:
            self._warn_if_tau_has_no_optimum(len(all_ids))

        tau1, tau2 = self.temperature(Batch(x, y, all_image, all_text, self.step))
        positive = (x * y).sum(1)
        image_side = row_statistics(x, all_text, positive, tau1.detach(), ids, all_ids)
        text_side = row_statistics(y, all_image, positive, tau2.detach(), ids, all_ids)

        local = [positive, image_side.negatives, tau1.detach(), tau2.detach()]
        local += [image_side.log_mean, text_side.log_mean, image_side.mean_exponent, text_side.mean_exponent]
        gathered = distributed.all_gather(torch.stack(local, dim=1)).T
        all_positive, negatives, tau, log_g, moment = (
            gathered[0],
            gathered[1],
            gathered[2:4],
            gathered[4:6],
            gathered[6:],
        )

        log_u = self._track(all_ids, log_g)
        h = self._tau_gradient(log_u, log_g, moment, negatives)
        anchors = [Anchors.of(tau[side], all_positive, log_u[side], negatives) for side in (0, 1)]
        mine = slice(distributed.rank() * b, distributed.rank() * b + b)
        own = [Anchors(a.slope[mine], a.offset[mine]) for a in anchors]
        # r_i = Σ_j (p1_ij + p2_ij): the pull of the positive pair, in closed form from the row statistics
        r = torch.where(negatives > 0, (log_g - log_u).exp(), 0.0).sum(0)[mine, None]
        scale = C / b
        image_gradient = scale * (pull(x, all_text, own[0], anchors[1], ids, all_ids) - r * y)
        text_gradient = scale * (pull(y, all_image, own[1], anchors[0], ids, all_ids) - r * x)

        value = C * torch.where(negatives > 0, tau * (log_u + self.rho), 0.0).sum(0).mean()
        total = with_gradient(value, image, text, image_gradient, text_gradient)
        if self.learns_tau:
            total = total + only_gradient(scale * (h[0, mine] @ tau1 + h[1, mine] @ tau2))
        return LossOutput(total, self._metrics(value, tau, log_u, h))

    def _track(self, ids: Tensor, log_g: Tensor) -> Tensor:
        """New log u [2, B] from the old and the batch's log g [2, B]; written by the owners when training.

        First visit: log u = log g. Later: logaddexp(log(1−γ) + log u, log γ + log g). Equal ids share the mean of
        their g and are written once. A sample whose rows have no negatives keeps what it had.
        """
        old = self.state.read(ids).to(log_g.dtype)
        log_g = _mean_over_equal_ids(ids, log_g)
        gamma = self.gamma(self.epoch)
        kept = math.log1p(-gamma) if gamma < 1 else -math.inf
        blended = torch.logaddexp(old + kept, log_g + math.log(gamma))
        new = torch.where(old == -math.inf, log_g, blended)
        new = torch.where(log_g == -math.inf, old, new)
        if self.training:
            self.state.write(ids, new)
            self.step += 1
        return new

    def _tau_gradient(self, log_u: Tensor, log_g: Tensor, moment: Tensor, negatives: Tensor) -> Tensor:
        """h [2, B], which multiplies τ_i in the surrogate; 0 for a row without negatives."""
        h = self.rho + log_g - moment  # ρ − KL(softmax ‖ uniform)
        if self.tau_gradient == "fcco":
            staleness = (log_u - log_g) - torch.expm1(log_g - log_u) * moment
            h = h + staleness.clamp(-STALENESS_LIMIT, STALENESS_LIMIT)
        return torch.where(negatives > 0, h, 0.0)

    def _metrics(self, value: Tensor, tau: Tensor, log_u: Tensor, h: Tensor) -> dict[str, Tensor]:
        metrics = {"loss": value, "gamma": value.new_tensor(self.gamma(self.epoch))}
        for side, name in enumerate(("image", "text")):
            metrics |= {
                f"tau/{name}_mean": tau[side].mean(),
                f"tau/{name}_min": tau[side].amin(),
                f"tau/{name}_max": tau[side].amax(),
                f"tau/{name}_std": tau[side].std(correction=0),
                f"log_u/{name}_mean": log_u[side]
                .masked_fill(log_u[side] == -math.inf, math.nan)
                .nanmean()
                .nan_to_num(),
            }
            if self.learns_tau:
                metrics[f"tau_gradient/{name}_mean"] = h[side].mean()
        return {name: value.detach() for name, value in metrics.items()}

    def _warn_if_tau_has_no_optimum(self, batch: int) -> None:
        self._warned = True
        limit = math.log(max(batch - 1, 1))
        if self.learns_tau and self.rho >= limit and distributed.is_main():
            warnings.warn(
                f"rho = {self.rho:g} is not below log(B − 1) = {limit:.3g} at a global batch of {batch}: the "
                "gradient of the temperature is then never negative and every τ falls to its lower bound; "
                f"choose rho < {limit:.3g}",
                stacklevel=4,
            )

    @torch.no_grad()
    def temperatures(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """τ of image and text anchors [2, n] for unit features [n, D]: no dropout, no gradient."""
        with exact_arithmetic(image_features.device):
            dtype = compute_dtype(image_features)
            return self.temperature.predict(image_features.to(dtype), text_features.to(dtype))

    def get_extra_state(self) -> dict[str, float]:
        return {"step": self.step, "epoch": self.epoch}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.step, self.epoch = int(state["step"]), state["epoch"]


def _mean_over_equal_ids(ids: Tensor, log_g: Tensor) -> Tensor:
    """log of the mean of g over rows of equal id, for every row: ids [B], log_g [2, B] → [2, B].

    Fixed shapes only (sort, scatter): the host never waits for the device.
    """
    order = ids.argsort(stable=True)
    ordered = ids[order]
    starts = torch.ones_like(ordered)
    starts[1:] = (ordered[1:] != ordered[:-1]).long()
    group = torch.empty_like(ids)
    group[order] = starts.cumsum(0) - 1
    index = group.expand_as(log_g)
    count = torch.zeros_like(log_g).scatter_add_(1, index, torch.ones_like(log_g))
    largest = torch.full_like(log_g, -torch.inf).scatter_reduce_(1, index, log_g, "amax")
    finite = torch.where(largest == -torch.inf, 0.0, largest)
    shifted = (log_g - finite.gather(1, index)).exp()
    total = torch.zeros_like(log_g).scatter_add_(1, index, shifted)
    return (finite + total.log() - count.log()).gather(1, index)
