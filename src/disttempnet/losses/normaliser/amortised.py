"""Amortised partition functions: log λ of an anchor from its feature, by a small network a side (AmorLIP).

    log λ(x) = v·relu(h2 + x) + c,   h1 = LN(relu(W1 x + b1)),   h2 = LN(relu(W2 h1 + b2))

The networks are fitted to the target Z̃ = β λ_before + (1 − β) Z of each batch, (log λ − log Z̃)², by a few steps of
Adam. λ_before is the moving average of the networks at the end of the epoch before; each epoch begins new ones. β rises
from 0 on a cosine.

Shapes: B global rows, D width, P numbers of a network, side 0 image anchors, side 1 text anchors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disttempnet.losses.objective import ObjectiveContext, as_numbers, as_tensor

FITTED_ROWS = 4096
ADAM = (0.9, 0.999, 1e-8)
AVERAGE_EVERY = 2  # batches


class AmortisedPartition(nn.Module):
    """The networks of both sides, their moving average, and that of the epoch before.

    Every rank computes the same from the features of the global batch, so that nothing is exchanged.

    Args:
        context: gives D, and the seed of the networks of every epoch.
        partition_lr, partition_steps: of Adam, a batch.
        partition_average: what the moving average keeps every other batch.
        partition_share, partition_share_epochs: β, and the epochs over which it rises.

    State: the networks, both averages and Adam's moments, 10 P numbers; P = 2 D² + 7 D + 1.

    Example:
        >>> partition = AmortisedPartition(ObjectiveContext(num_samples=1, embed_dim=4))
        >>> features, log_z = F.normalize(torch.randn(2, 6, 4), dim=2), torch.zeros(2, 6)
        >>> torch.equal(partition.target(features, log_z, epoch=0), log_z)  # β = 0
        True
        >>> partition.fit(features, log_z)
    """

    networks: Tensor
    average: Tensor
    before: Tensor
    moments: Tensor

    def __init__(
        self,
        context: ObjectiveContext,
        *,
        partition_lr: float = 1e-3,
        partition_steps: int = 3,
        partition_average: float = 0.92,
        partition_share: float = 0.8,
        partition_share_epochs: float = 16.0,
    ) -> None:
        super().__init__()
        if partition_lr <= 0 or partition_steps < 0 or partition_share_epochs <= 0:
            raise ValueError(
                "need partition_lr > 0, partition_steps >= 0 and partition_share_epochs > 0, got "
                f"{partition_lr}, {partition_steps} and {partition_share_epochs}"
            )
        if not (0 <= partition_average < 1 and 0 <= partition_share < 1):
            raise ValueError(
                "partition_average and partition_share must lie in [0, 1), got "
                f"{partition_average} and {partition_share}"
            )
        self.rate, self.steps, self.kept = partition_lr, partition_steps, partition_average
        self.share, self.share_epochs = partition_share, partition_share_epochs
        self.width, self.seed = context.embed_dim, context.seed
        start = self._fresh(0)
        self.register_buffer("networks", start)
        self.register_buffer("average", start.clone())
        self.register_buffer("before", start.clone())
        self.register_buffer("moments", torch.zeros(2, *start.shape))
        self.fits = self.batches = 0  # steps of Adam, and batches, of this epoch

    def _sizes(self) -> list[int]:
        d = self.width
        return [d * d, d, d, d, d * d, d, d, d, d, 1]

    def _fresh(self, epoch: float) -> Tensor:
        """Return new networks [2, P]: torch's initialisation of linear layers, drawn from (seed, epoch)."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + int(epoch)) % (1 << 62))
        bound = 1 / math.sqrt(self.width)
        numbers = torch.empty(2, sum(self._sizes())).uniform_(-bound, bound, generator=generator)
        pieces = numbers.split(self._sizes(), dim=1)
        for gain in (pieces[2], pieces[6]):
            gain.fill_(1.0)
        for bias in (pieces[3], pieces[7]):
            bias.zero_()
        return numbers

    @torch.no_grad()
    def begin_epoch(self, epoch: float) -> None:
        """Keep the average of the last epoch, and begin new networks."""
        self.before.copy_(self.average)
        self.networks.copy_(self._fresh(epoch))
        self.average.copy_(self.networks)
        self.moments.zero_()
        self.fits = self.batches = 0

    def beta(self, epoch: float) -> float:
        """Return β of an epoch."""
        progress = min(1.0, epoch / self.share_epochs)
        return 0.5 * self.share * (1 - math.cos(math.pi * progress))

    @torch.no_grad()
    def target(self, features: Tensor, log_z: Tensor, epoch: float) -> Tensor:
        """Return log Z̃ [2, B].

        Args:
            features: unit rows of both sides [2, B, D].
            log_z: log Z of the batch [2, B].
            epoch: the current one.
        """
        beta = self.beta(epoch)
        if beta == 0:
            return log_z
        parts = features.split(FITTED_ROWS, dim=1)
        log_before = torch.cat([self._log_partition(self.before.to(log_z.dtype), part) for part in parts], dim=1)
        return torch.logaddexp(log_before + math.log(beta), log_z + math.log1p(-beta))

    def _log_partition(self, networks: Tensor, x: Tensor) -> Tensor:
        """Return log λ [2, n] of features [2, n, D] by networks [2, P]."""
        d = self.width
        found = []
        for side in (0, 1):
            w1, b1, g1, c1, w2, b2, g2, c2, v, c = networks[side].split(self._sizes())
            h = F.layer_norm(F.linear(x[side], w1.view(d, d), b1).relu(), (d,), g1, c1)
            h = F.layer_norm(F.linear(h, w2.view(d, d), b2).relu(), (d,), g2, c2)
            found.append((h + x[side]).relu() @ v + c)
        return torch.stack(found)

    def fit(self, features: Tensor, log_target: Tensor) -> None:
        """Move the networks towards log Z̃ [2, B] of features [2, B, D]; a row that is not finite moves nothing."""
        usable = log_target.isfinite() & features.isfinite().all(2)
        x = torch.where(usable[..., None], features, 0.0)
        wanted = torch.where(usable, log_target, 0.0)
        networks, moments = self.networks.to(x.dtype), self.moments.to(x.dtype)
        first_beta, second_beta, eps = ADAM
        for _ in range(self.steps):
            gradient = self._gradient(networks, x, wanted, usable)
            self.fits += 1
            first = first_beta * moments[0] + (1 - first_beta) * gradient
            second = second_beta * moments[1] + (1 - second_beta) * gradient.square()
            moments = torch.stack([first, second])
            size = (second / (1 - second_beta**self.fits)).sqrt() + eps
            networks = networks - self.rate * first / (1 - first_beta**self.fits) / size
        self.networks.copy_(networks)
        self.moments.copy_(moments)
        self.batches += 1
        if self.batches % AVERAGE_EVERY == 0:
            self.average.lerp_(self.networks, 1 - self.kept)

    def _gradient(self, networks: Tensor, x: Tensor, wanted: Tensor, usable: Tensor) -> Tensor:
        """Return the gradient [2, P] of the mean over rows of (log λ − log Z̃)², of each side."""
        total = torch.zeros_like(networks)
        with torch.enable_grad():
            leaf = networks.detach().requires_grad_()
            for start in range(0, x.shape[1], FITTED_ROWS):
                rows = slice(start, start + FITTED_ROWS)
                error = torch.where(usable[:, rows], self._log_partition(leaf, x[:, rows]) - wanted[:, rows], 0.0)
                total += torch.autograd.grad(error.square().sum() / x.shape[1], leaf)[0]
        return total

    def get_extra_state(self) -> Tensor:
        return as_tensor(self.fits, self.batches)

    def set_extra_state(self, state: Tensor | Mapping[str, float]) -> None:
        self.fits, self.batches = map(round, as_numbers(state, "fits", "batches"))
