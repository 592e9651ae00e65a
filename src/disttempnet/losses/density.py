"""τ from how crowded the place of a pair is: a prototype network without weights, whose prototypes are the batch.

    k_i = ½ (log mean_j exp(x_i·x_j / t) + log mean_j exp(y_i·y_j / t))        j: the batch's pairs of another id
    τ_i = τ0 · exp(a (k_i − mean k))

A pair of a frequent concept has many look-alikes, and a caption that says little has many images that it fits: their
negatives are in part no negatives. A high τ spreads the push over all of them, a low one puts it on the nearest, which
are those. The objective of RGCL asks for the opposite where more than e^−ρ of the negatives are alike: only a τ near 0
tells those apart. docs/results.md compares both with one τ for all, and with τ shuffled among the pairs.

Shapes: b local rows, B global rows, D width, M references.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from disttempnet import distributed
from disttempnet.losses.core import Context
from disttempnet.losses.pairwise import Pairs, statistics
from disttempnet.losses.temperature import Batch, Temperature, check_bounds, random_partners

NOBODY = -1  # id of a reference that is not there yet


class DensityTemperature(Temperature):
    """τ_i = τ0 · exp(a (k_i − mean k)), k_i the log-density of the pair's neighbourhood in the global batch.

    Both sides of a pair have the same τ. It is a constant in the gradient: features are not moved to change it.

    Args:
        context: gives D, and the seed of `shuffle`.
        temperature: τ0, the geometric mean of τ over the batch, before the bounds.
        density_power: a, not negative; 0 = one τ for all.
        density_tau: t, how near a neighbour must be.
        tau_min, tau_max: bounds.
        references: M, training pairs that are kept, by which τ of pairs outside a training step is told.
        shuffle: an ablation: in training τ is dealt anew to the pairs of the batch, by a random permutation. Where a
            normaliser is tracked, it then also averages over unlike τ.

    State: the M references and their ids, evenly from the last batches.
    """

    kind = "density"
    learns = False
    needs_pairs = True

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
        check_bounds(tau_min, tau_max, temperature)
        if not density_tau > 0:
            raise ValueError(f"density_tau must be positive, got {density_tau}")
        if density_power < 0:
            raise ValueError(f"density_power must not be negative, got {density_power}")
        if references < 1:
            raise ValueError(f"references must be positive, got {references}")
        self.tau, self.density_power, self.density_tau = temperature, density_power, density_tau
        self.tau_min, self.tau_max, self.shuffle, self.seed = tau_min, tau_max, shuffle, context.seed
        for side in ("image", "text"):
            self.register_buffer(side, torch.zeros(references, context.embed_dim))
        self.register_buffer("ids", torch.full((references,), NOBODY))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """τ of the local rows [b], the same for both sides of a pair."""
        pairs, others = Pairs.of((batch.image, batch.text), (batch.all_image, batch.all_text), batch.all_ids, False)
        sides = (batch.image, batch.all_image), (batch.text, batch.all_text)
        local = [self._density(pairs, *side, others[pairs.mine]) for side in sides]
        density = distributed.all_gather((local[0] + local[1]) / 2)
        known = others > 0  # else no other id is in the batch
        mean = torch.where(known, density, 0.0).sum() / known.sum().clamp(min=1)
        tau = self._tau(torch.where(known, density - mean, 0.0))
        if self.training:
            self._remember(batch)
            if self.shuffle:
                tau = tau[random_partners(batch, self.seed)]
        return tau[batch.mine], tau[batch.mine]

    def _density(self, pairs: Pairs, rows: Tensor, everyone: Tensor, others: Tensor) -> Tensor:
        """log mean_j exp((row·row_j − 1) / t) of unit rows [b]; −inf where no other id is there."""
        alike = pairs._replace(image=rows, text=rows, all_image=everyone, all_text=everyone)
        t = torch.full_like(rows[:, 0], self.density_tau)
        (found,), _ = statistics(alike, torch.ones_like(t), t[None], others, moments=False, keep=False)
        return found.log_mean

    def _tau(self, above_mean: Tensor) -> Tensor:
        return (self.tau * (self.density_power * above_mean).exp()).clamp(self.tau_min, self.tau_max)

    @torch.no_grad()
    def _remember(self, batch: Batch) -> None:
        # evenly: neighbouring rows of a large batch lie together in a shard
        stride = -(-len(batch.all_ids) // len(self.get_buffer("ids")))
        for name, new in (("image", batch.all_image), ("text", batch.all_text), ("ids", batch.all_ids)):
            kept = self.get_buffer(name)
            kept.copy_(torch.cat([kept, new[::stride].to(kept.dtype)])[-len(kept) :])

    @torch.no_grad()
    def predict(self, image: Tensor, text: Tensor, ids: Tensor | None) -> Tensor:
        """τ [2, n] of pairs, by how dense the references are there, measured as among themselves; τ0 without any."""
        kept = self.get_buffer("ids")
        there = kept != NOBODY
        own = kept if ids is None else torch.cat([kept, ids])
        strangers = there.expand(len(kept) + len(image), -1).clone()
        strangers[: len(own)] &= kept != own[:, None]
        count = strangers.sum(1).to(image.dtype)
        density = -count.log()
        for name, rows in (("image", image), ("text", text)):
            references = self.get_buffer(name).to(rows.dtype)
            exponent = torch.cat([references, rows]) @ references.T / self.density_tau
            density = density + exponent.masked_fill(~strangers, -math.inf).logsumexp(1) / 2
        known = count > 0
        measure = known[: len(kept)] & there
        mean = torch.where(measure, density[: len(kept)], 0.0).sum() / measure.sum().clamp(min=1)
        return self._tau(torch.where(known, density - mean, 0.0)[len(kept) :]).expand(2, -1)
