"""VICReg: pairs agree, every dimension varies, dimensions are uncorrelated (arXiv 2105.04906).

    minimise   λ (1/BD) Σ_i ‖x_i − y_i‖² + μ ½ [ v(X) + v(Y) ] + ν [ c(X) + c(Y) ]

    v(Z) = (1/D) Σ_d max(0, 1 − √(C_dd + ε))      c(Z) = (1/D) Σ_{d≠e} C_de²      C = Z̄ᵀZ̄ / (B − 1),  Z̄ = Z − mean

on embeddings that are not normalised. There are no negatives, and no temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from disttempnet import distributed
from disttempnet.losses.objective import (
    Features,
    IdsLike,
    LossOutput,
    Objective,
    ObjectiveContext,
    compute_dtype,
    exact_arithmetic,
    with_gradient,
)

EPSILON = 1e-4  # under the root of the variance


class VicRegLoss(Objective):
    """Variance, invariance and covariance of the global batch; no negatives, no temperature.

    λ (1/BD) Σ_i ‖x_i − y_i‖² + μ ½ [v(X) + v(Y)] + ν [c(X) + c(Y)]

    v(Z) = (1/D) Σ_d max(0, 1 − √(C_dd + ε)),   c(Z) = (1/D) Σ_{d≠e} C_de²,   C = covariance of Z over the batch

    A global batch of one row has variance and covariance 0: only the invariance term has a gradient.

    Args:
        context: not used.
        invariance, variance, covariance: λ, μ, ν.

    Shape:
        features: this rank's embeddings [b, D] before normalising, as many on every rank. ids are not needed.
        total: 0-d.

    Example:
        >>> from disttempnet import Features, build_loss
        >>> def plain(image, text):
        ...     total = 25 * (image - text).square().mean()
        ...     for z in (image, text):
        ...         cov = z.T.cov()  # [D, D]
        ...         total += 25 / 2 * (1 - (cov.diagonal() + 1e-4).sqrt()).relu().mean()
        ...         total += (cov - cov.diagonal().diag()).square().sum() / len(cov)
        ...     return total
        >>> image, text = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4)
        >>> loss = build_loss("vicreg", num_samples=100, embed_dim=4)
        >>> total, expected = loss(Features.of(image, text)).total, plain(image, text)
        >>> torch.allclose(total, expected, rtol=1e-4)
        True
        >>> gradient, wanted = (torch.autograd.grad(value, image)[0] for value in (total, expected))
        >>> torch.allclose(gradient, wanted, atol=1e-4)
        True

    Reference:
        VICReg: variance-invariance-covariance regularization, arXiv 2105.04906.
    """

    def __init__(
        self, context: ObjectiveContext, *, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0
    ) -> None:
        super().__init__()
        if min(invariance, variance, covariance) < 0:
            raise ValueError(
                f"invariance {invariance}, variance {variance} and covariance {covariance} must not be negative"
            )
        self.invariance, self.variance, self.covariance = invariance, variance, covariance

    def forward(self, features: Features, ids: IdsLike | None = None) -> LossOutput:
        """Return the loss; metrics: loss, and the three terms without their weights."""
        ids = self.checked(features, ids)
        with exact_arithmetic(features.image.device):
            return self._step(features.image_embedding, features.text_embedding)

    def _step(self, image: Tensor, text: Tensor) -> LossOutput:
        # embeddings of this rank, centred with the mean of the global batch: [2, b, D]
        dtype, (b, width) = compute_dtype(image), image.shape
        batch = b * distributed.world_size()
        both = torch.stack([image.detach(), text.detach()]).to(dtype)
        gap = both[0] - both[1]
        *sums, gaps = distributed.all_sum(torch.stack([*both.sum(1), gap.square().sum(0)]))
        centred = both - torch.stack(sums)[:, None] / batch

        # covariances [2, D, D] and standard deviations [2, D] of the global batch
        freedom = max(batch - 1, 1)
        cov = distributed.all_sum(centred.mT @ centred) / freedom
        spread = (cov.diagonal(dim1=1, dim2=2) + EPSILON).sqrt()
        off_diagonal = cov - torch.diag_embed(cov.diagonal(dim1=1, dim2=2))

        # the three terms, 0-d
        invariance = gaps.sum() / (batch * width)
        variance = (1 - spread).relu().mean()  # over both sides: ½ of each
        covariance = off_diagonal.square().sum() / width
        value = self.invariance * invariance + self.variance * variance + self.covariance * covariance

        # ∂value/∂C [2, D, D]. Through C the gradient of a centred row is 2 Z̄ (∂C) / (B − 1). Through the mean it is the
        # mean of that over the rows of the batch, which is 0: the rows of Z̄ sum to 0.
        by_variance = torch.where(spread < 1, -self.variance / (4 * width * spread), 0.0)
        by_cov = 2 * self.covariance / width * off_diagonal + torch.diag_embed(by_variance)

        # gradient of the embeddings [2, b, D]; it must be summed over ranks, and DDP takes the mean
        ranks = batch // b
        gradient = 2 * ranks / freedom * (centred @ by_cov)
        pair = 2 * self.invariance / (b * width) * gap
        total = with_gradient(value, image, text, gradient[0] + pair, gradient[1] - pair)
        metrics = {"loss": value, "invariance": invariance, "variance": variance, "covariance": covariance}
        return LossOutput(total, metrics)
