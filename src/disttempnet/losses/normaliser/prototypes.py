"""Predicted normalisers by prototypes that stand for the data (NeuCLIP, arXiv 2511.08417): no table, no ids.

log (ε + g) = min over α of e^−α (ε + g) + α − 1 is linear in g at a fixed α: a batch gives an unbiased gradient.
α of an anchor is predicted from its feature, by m prototypes W in place of all columns of the data set:

    α_i = log (ε + (1/m) Σ_j exp((cos(x_i, W_j) − s_ii) / τ_i))

W of the image anchors stands for texts, that of the text anchors for images. Each step descends on the batch's

    mean_i τ_i (e^−α_i (ε + g_i) + α_i − 1)

with features, τ and g detached, by a few steps of AdaGrad:

    ∂α_i/∂W_j = q_ij/τ_i (x_i − cos_ij Ŵ_j) / |W_j|,   q_ij = exp((cos_ij − s_ii)/τ_i − α_i) / m,   Ŵ_j = W_j / |W_j|

Shapes: B global rows, D width, m prototypes, K ranks, side 0 image anchors, side 1 text anchors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disttempnet import distributed
from disttempnet.losses.contrast.pairs import LOG2E
from disttempnet.losses.objective import ObjectiveContext, as_numbers, as_tensor

ADAGRAD_EPS = 1e-10  # torch's
BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}  # of exponents that exist at a time, both sides
LARGEST_LOG_RATIO = 30.0  # of (ε + g)/e^α in the prototypes' gradient: its square is still a float32


class PrototypeNormaliser(nn.Module):
    """Prototypes of both sides, and the steps that keep them near the data.

    The first batch has its own ε + g as normaliser. From then on the prototypes are those features of the batches that
    were seen: all of them at the first step and then every `normaliser_restart` steps, as many a step as a batch has.

    Args:
        context: gives D, and the seed of rows that are not filled yet.
        prototypes: m.
        normaliser_steps: steps of AdaGrad a batch.
        normaliser_lr: their rate.
        normaliser_restart: steps of training between two restarts, each with features of recent batches and new
            AdaGrad sums.
        eps: ε.

    State: prototypes and AdaGrad's sums, each [2, m, D], the same on every rank. With K ranks a rank moves m / K of the
    prototypes: it exchanges one number an anchor and step, and its part of the state once a batch.

    Example:
        >>> normaliser = PrototypeNormaliser(ObjectiveContext(num_samples=1, embed_dim=4), prototypes=3)
        >>> image, text = (F.normalize(torch.randn(5, 4), dim=1) for _ in range(2))
        >>> tau, log_g = torch.full((2, 5), 0.1), torch.zeros(2, 5)
        >>> batch = torch.stack([image, text]), (image * text).sum(1), tau, log_g, torch.ones(5, dtype=torch.bool)
        >>> torch.equal(normaliser(*batch), log_g)
        True
        >>> normaliser(*batch).shape
        torch.Size([2, 5])

    Reference:
        NeuCLIP: efficient large-scale CLIP training with neural normalizer optimization, arXiv 2511.08417.
    """

    prototypes: Tensor
    squares: Tensor

    def __init__(
        self,
        context: ObjectiveContext,
        *,
        prototypes: int = 4096,
        normaliser_steps: int = 10,
        normaliser_lr: float = 0.03,
        normaliser_restart: int = 500,
        eps: float = 0.0,
    ) -> None:
        super().__init__()
        if prototypes < 1 or normaliser_steps < 0 or normaliser_restart < 1:
            raise ValueError(
                "need prototypes >= 1, normaliser_steps >= 0 and normaliser_restart >= 1, got "
                f"{prototypes}, {normaliser_steps} and {normaliser_restart}"
            )
        if normaliser_lr <= 0:
            raise ValueError(f"normaliser_lr must be positive, got {normaliser_lr}")
        self.steps, self.rate, self.restart = normaliser_steps, normaliser_lr, normaliser_restart
        self.eps = eps
        generator = torch.Generator().manual_seed(context.seed)
        start = torch.randn(2, prototypes, context.embed_dim, generator=generator)
        self.register_buffer("prototypes", F.normalize(start, dim=2))
        self.register_buffer("squares", torch.zeros_like(start))
        self.step = 0
        self.filled = 0  # prototypes that are features, or were: the others do not count
        self.next = prototypes  # the first that waits for a feature; m = none does

    @torch.no_grad()
    def forward(self, features: Tensor, positive: Tensor, tau: Tensor, log_g: Tensor, counted: Tensor) -> Tensor:
        """Move the prototypes for this batch of training, and return α [2, B].

        Every rank calls this with the global batch. A row that is not finite, or that has no negatives, moves nothing.

        Args:
            features: unit rows of both sides [2, B, D].
            positive: s_ii [B].
            tau, log_g: τ and log (ε + g) of the anchors [2, B].
            counted: bool [B], whether a row has negatives.
        """
        usable = counted & log_g.isfinite() & positive.isfinite() & features.isfinite().all(2)
        alpha = log_g
        if self.filled:
            anchors = _Anchors.of(features, positive, tau, usable)
            alpha = torch.where(usable, self._descend(anchors, torch.where(usable, log_g, 0.0)), log_g)
        self.step += 1
        self._refill(features)
        return alpha

    @torch.no_grad()
    def predict(self, features: Tensor, positive: Tensor, tau: Tensor) -> Tensor:
        """Return α [2, n] of any pairs, and move nothing; −inf before the first step.

        Args:
            features, positive, tau: as of `forward`; of any rows, without communication.
        """
        usable = positive.isfinite() & features.isfinite().all(2)
        if not self.filled:
            return torch.full_like(tau, -torch.inf)
        anchors = _Anchors.of(features, positive, tau, usable)
        unit = F.normalize(self.prototypes[:, : self.filled].to(features.dtype), dim=2)
        alpha = torch.cat([block[-1] for block in self._predicted(anchors, unit, self.filled, exchange=False)], dim=1)
        return torch.where(usable, alpha, torch.nan)

    def _descend(self, anchors: _Anchors, log_g: Tensor) -> Tensor:
        """Move this rank's prototypes by all steps, exchange them, and return α [2, B]."""
        # this rank's prototypes and AdaGrad's sums, each [2, p, D]; on more ranks than prototypes each moves all
        ranks, rank = distributed.world_size(), distributed.rank()
        if self.filled < ranks:
            ranks, rank = 1, 0
        own = slice(rank * self.filled // ranks, (rank + 1) * self.filled // ranks)
        w, squares = (part[:, own].to(anchors.x.dtype, copy=True) for part in (self.prototypes, self.squares))
        largest_share = -(-self.filled // ranks)

        # the steps of AdaGrad
        for _ in range(self.steps):
            norm = w.norm(dim=2, keepdim=True)
            unit = w / norm
            gradient = torch.zeros_like(w)
            for r, exponentials, log_scale, alpha in self._predicted(anchors, unit, largest_share, ranks > 1):
                # Σ_i (1 − e^−α_i (ε + g_i)) q_ij x_i; a rank has all anchors, so that nothing is summed over ranks
                ratio = (log_g[:, r] - alpha).clamp(max=LARGEST_LOG_RATIO)
                factor = -torch.expm1(ratio) * (log_scale - alpha).exp() / anchors.x.shape[1]
                pull = torch.where(anchors.usable[:, r], factor, 0.0)[..., None] * anchors.x[:, r]
                gradient.baddbmm_(exponentials.transpose(1, 2), pull)
            gradient = (gradient - (gradient * unit).sum(2, keepdim=True) * unit) / norm
            squares.addcmul_(gradient, gradient)
            w.addcdiv_(gradient, squares.sqrt().add_(ADAGRAD_EPS), value=-self.rate)

        # the prediction with them, and the state of all ranks
        unit = F.normalize(w, dim=2)
        predicted = [alpha for *_, alpha in self._predicted(anchors, unit, largest_share, ranks > 1)]
        for part, moved in ((self.prototypes, w), (self.squares, squares)):
            if ranks > 1:
                everyone = torch.zeros_like(part[:, : self.filled])
                everyone[:, own] = moved.to(part.dtype)
                part[:, : self.filled] = distributed.all_sum(everyone)
            else:
                part[:, : self.filled] = moved.to(part.dtype)
        return torch.cat(predicted, dim=1)

    def _predicted(
        self, anchors: _Anchors, unit: Tensor, largest_share: int, exchange: bool
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yield blocks of rows: their slice, e_ij [2, r, p], log s_i and α_i [2, r], with q_ij = e_ij s_i e^−α_i.

        Args:
            unit: this rank's prototypes of norm 1 [2, p, D].
            largest_share: p of the rank that has most: all ranks take the same blocks.
            exchange: whether other ranks have the other prototypes.
        """
        bytes_a_row = 2 * largest_share * unit.element_size()
        high = max(1, BLOCK_BYTES.get(unit.device.type, BLOCK_BYTES["cuda"]) // bytes_a_row)
        log_m = math.log(self.filled)
        for start in range(0, anchors.x.shape[1], high):
            r = slice(start, min(start + high, anchors.x.shape[1]))
            exponents = torch.bmm(anchors.x[:, r], unit.transpose(1, 2))
            exponents.mul_(anchors.slope[:, r, None])
            largest = exponents.amax(2)
            exponentials = exponents.sub_(largest[..., None]).exp2_()
            log_scale = (largest + anchors.offset[:, r]) / LOG2E - log_m
            alpha = log_scale + exponentials.sum(2).log()
            if exchange:
                alpha = torch.logsumexp(distributed.all_gather(alpha[None]), 0)
            if self.eps:
                alpha = torch.logaddexp(alpha, alpha.new_full((), math.log(self.eps)))
            yield r, exponentials, log_scale, alpha

    def _refill(self, features: Tensor) -> None:
        """Put features of this batch into prototypes that wait for some, spread evenly over its rows.

        A row that is not finite leaves its prototype as it was.
        """
        size = self.prototypes.shape[1]
        if self.step == 1 or self.step % self.restart == 0:
            self.next = 0
        count = min(size - self.next, features.shape[1])
        if not count:
            return
        rows = torch.arange(count, device=features.device) * features.shape[1] // count
        place = slice(self.next, self.next + count)
        old, new = self.prototypes[:, place], features.flip(0)[:, rows].to(self.prototypes.dtype)
        self.prototypes[:, place] = torch.where(new.isfinite().all(2, keepdim=True), new, old)
        self.squares[:, place] = 0.0
        self.next += count
        self.filled = max(self.filled, self.next)

    def get_extra_state(self) -> Tensor:
        return as_tensor(self.step, self.filled, self.next)

    def set_extra_state(self, state: Tensor | Mapping[str, float]) -> None:
        self.step, self.filled, self.next = map(round, as_numbers(state, "step", "filled", "next"))


class _Anchors(NamedTuple):
    """Anchors of the global batch, both sides, with exponents (cos · slope + offset) in base 2.

    Attributes:
        x: features [2, B, D], 0 where not usable.
        slope, offset: [2, B].
        usable: bool [2, B].
    """

    x: Tensor
    slope: Tensor
    offset: Tensor
    usable: Tensor

    @classmethod
    def of(cls, features: Tensor, positive: Tensor, tau: Tensor, usable: Tensor) -> _Anchors:
        slope = LOG2E / tau
        offset = torch.where(usable, -positive * slope, 0.0)
        return cls(torch.where(usable[..., None], features, 0.0), slope, offset, usable)
