"""Popularity of negatives: a learned ζ for every sample, subtracted where it is a negative (NUCLR, arXiv 2410.09156).

    g_i = E_j exp((d_ij − ζ_j) / τ),      objective  τ log (ε_i + g_i) + ζ_i,      ε_i = exp(−ζ_i / τ) / (N − 1)

ε_i stands for the pair itself in the sum over the data set. ζ_j follows its own gradient with a moving average z_j:

    G_j = 1 − N/(N−1) mean_i [ exp((d_ij − ζ_j)/τ) / (ε_i + u_i) ]      over the batch's anchors i, with j itself
    z_j ← (1 − θ) z_j + θ G_j,      ζ_j ← ζ_j − η z_j

Texts have a ζ as negatives of images, images one as negatives of texts. Rows 0 and 1 of a table are images and texts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from disttempnet.losses.objective import ObjectiveContext
from disttempnet.losses.sample_state import SampleState, mean_over_equal_ids


class Popularity(nn.Module):
    """ζ and z of every sample, as an image and as a text.

    Args:
        context: gives N.
        zeta: ζ of every sample at the start.
        zeta_lr: η.
        zeta_theta: θ.
        zeta_start_epoch: ζ stays as it is until then.

    State: ζ and z, in a table.

    Example:
        >>> popularity = Popularity(ObjectiveContext(num_samples=10, embed_dim=4), zeta=-0.05, zeta_lr=0.1)
        >>> ids = torch.tensor([3, 5])
        >>> popularity.learn(ids, torch.tensor([[0.9, 0.0], [0.0, 1.8]]), torch.tensor([True, True]))
        >>> popularity.read(ids, torch.float32, training=True)
        tensor([[-0.0500, -0.1500],
                [-0.1500,  0.0500]])
    """

    def __init__(
        self,
        context: ObjectiveContext,
        *,
        zeta: float = -0.05,
        zeta_lr: float = 5e-6,
        zeta_theta: float = 0.9,
        zeta_start_epoch: int = 5,
    ) -> None:
        super().__init__()
        if zeta_lr < 0 or not 0 < zeta_theta <= 1 or zeta_start_epoch < 0:
            raise ValueError(
                "need zeta_lr >= 0, zeta_theta in (0, 1] and zeta_start_epoch >= 0, got "
                f"{zeta_lr}, {zeta_theta} and {zeta_start_epoch}"
            )
        self.start, self.rate, self.theta, self.start_epoch = zeta, zeta_lr, zeta_theta, zeta_start_epoch
        self.others = max(context.num_samples - 1, 1)  # N − 1
        self.state = SampleState(context.num_samples, {"zeta": zeta, "z": 0.0}, context.shard_state)

    def read(self, ids: Tensor, dtype: torch.dtype, training: bool) -> Tensor:
        """Return ζ [2, B] of images and texts; in evaluation, where ids may be others', the start value."""
        if not training:
            return torch.full((2, len(ids)), self.start, dtype=dtype, device=ids.device)
        return self.state.read(ids, checked=True)[:2].to(dtype)

    def log_eps(self, zeta: Tensor, tau: Tensor) -> Tensor:
        """Return log ε [2, B] of image and text anchors: with ζ of the partner."""
        return -zeta.flip(0) / tau - math.log(self.others)

    def learns_in(self, epoch: float) -> bool:
        """Return True from `zeta_start_epoch` on."""
        return epoch >= self.start_epoch

    @torch.no_grad()
    def learn(self, ids: Tensor, weight: Tensor, counted: Tensor) -> None:
        """Move ζ of the batch's samples.

        Args:
            ids: int64 [B].
            weight: of images and texts as negatives [2, B]: mean_i [exp((d_ij − ζ_j)/τ) / (ε_i + u_i)].
            counted: bool [B], false for rows without negatives, which stay.
        """
        rows = self.state.read(ids, checked=True).to(weight.dtype)
        zeta, z = rows[:2], rows[2:]
        gradient = 1 - (self.others + 1) / self.others * mean_over_equal_ids(ids, weight)
        z = torch.where(z == 0, gradient, (1 - self.theta) * z + self.theta * gradient)
        self.state.write(ids, torch.where(counted, torch.cat([zeta - self.rate * z, z]), rows))
