"""τ from how crowded the place of a pair is: a prototype network without weights, whose prototypes are the batch.

    k_i = ½ (log mean_j exp(x_i·x_j / t) + log mean_j exp(y_i·y_j / t))        j: the batch's pairs of another id
    τ_i = τ0 · exp(a (k_i − mean k))

A pair of a frequent concept has many look-alikes, and a caption that says little has many images that it fits: their
negatives are in part no negatives. A high τ spreads the push over all of them, a low one puts it on the nearest, which
are those. The objective of RGCL asks for the opposite: the more negatives are alike, the lower the τ at which e^−ρ of
them count. docs/results.md compares both with one τ for all, and with τ shuffled among the pairs.

Shapes: b local rows, B global rows, D width, M references.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from disttempnet import distributed
from disttempnet.losses.core import Context
from disttempnet.losses.pairwise import Pairs, statistics
from disttempnet.losses.temperature import Batch, Temperature, check_bounds, check_start, random_partners

NOBODY = -1  # id of a reference that is not there yet


class DensityTemperature(Temperature):
    """τ_i = τ0 · exp(a (k_i − mean k)), k_i the log-density of the pair's neighbourhood in the global batch.

    Args:
        context: gives D, and the seed of `shuffle`.
        temperature: τ0, the geometric mean of τ.
        density_power: a; 0 = one τ for all.
        density_tau: t, how near a neighbour must be.
        tau_min, tau_max: bounds.
        references: M, the last pairs of training, by which τ of pairs outside a training step is told.
        shuffle: an ablation: in training every anchor gets the τ of another, random pair of the batch.

    State: the M references, their ids, and mean k of the last step.
    """

    kind = "density"
    learns = False

    def __init__(
        self,
        context: Context,
        *,
        temperature: float = 0.07,
        density_power: float = 0.5,
        density_tau: float = 0.1,
        tau_min: float = 0.01,
        tau_max: float = 1.0,
        references: int = 512,
        shuffle: bool = False,
    ) -> None:
        super().__init__()
        check_start(temperature)
        check_bounds(tau_min, tau_max)
        if not tau_min <= temperature <= tau_max:
            raise ValueError(f"temperature {temperature} must lie in [tau_min, tau_max] = [{tau_min}, {tau_max}]")
        if not density_tau > 0:
            raise ValueError(f"density_tau must be positive, got {density_tau}")
        if references < 1:
            raise ValueError(f"references must be positive, got {references}")
        self.tau, self.power, self.width = temperature, density_power, density_tau
        self.tau_min, self.tau_max, self.shuffle, self.seed = tau_min, tau_max, shuffle, context.seed
        for side in ("image", "text"):
            self.register_buffer(side, torch.zeros(references, context.embed_dim))
        self.register_buffer("ids", torch.full((references,), NOBODY))
        self.register_buffer("mean_density", torch.zeros(()))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """τ of the local rows [b], the same for both sides of a pair."""
        sides = (batch.image, batch.all_image), (batch.text, batch.all_text)
        local = [self._density(rows, everyone, batch.all_ids) for rows, everyone in sides]
        density = distributed.all_gather((local[0] + local[1]) / 2)
        known = density.isfinite()  # a row without other ids in the batch has no neighbours
        mean = torch.where(known, density, 0.0).sum() / known.sum().clamp(min=1)
        tau = self._tau(torch.where(known, density - mean, 0.0))
        if self.training:
            self._remember(batch, mean)
            if self.shuffle:
                tau = tau[random_partners(batch, self.seed)]
        return tau[batch.mine], tau[batch.mine]

    def _density(self, rows: Tensor, everyone: Tensor, ids: Tensor) -> Tensor:
        """log mean_j exp((row·row_j − 1) / t) of unit rows [b]; −inf where no other id is there."""
        pairs, others = Pairs.of((rows, rows), (everyone, everyone), ids, kernel=False)
        norm, width = torch.ones_like(rows[:, 0]), torch.full_like(rows[:, 0], self.width)
        (found,), _ = statistics(pairs, norm, width[None], others[pairs.mine], moments=False, keep=False)
        return found.log_mean

    def _tau(self, above_mean: Tensor) -> Tensor:
        return (self.tau * (self.power * above_mean).exp()).clamp(self.tau_min, self.tau_max)

    @torch.no_grad()
    def _remember(self, batch: Batch, mean: Tensor) -> None:
        for name, new in (("image", batch.all_image), ("text", batch.all_text), ("ids", batch.all_ids)):
            kept = self.get_buffer(name)
            kept.copy_(torch.cat([kept, new.to(kept.dtype)])[-len(kept) :])
        self.get_buffer("mean_density").copy_(mean)

    @torch.no_grad()
    def predict(self, image: Tensor, text: Tensor, ids: Tensor | None) -> Tensor:
        """τ [2, n] of pairs, by their density among the references; τ0 before the first step."""
        kept = self.get_buffer("ids")
        others = (kept != NOBODY).expand(len(image), -1)
        if ids is not None:
            others = others & (kept != ids[:, None])
        count = others.sum(1).to(image.dtype)
        density = torch.zeros_like(image[:, 0])
        for name, rows in (("image", image), ("text", text)):
            exponent = (rows @ self.get_buffer(name).to(rows.dtype).T - 1) / self.width
            density += exponent.masked_fill(~others, -math.inf).logsumexp(1) / 2
        density -= count.log()
        tau = self._tau(torch.where(count > 0, density - self.get_buffer("mean_density").to(rows.dtype), 0.0))
        return tau.expand(2, -1)
