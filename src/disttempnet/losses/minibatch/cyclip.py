"""CyCLIP: CLIP plus similarities that agree within and across the modalities (arXiv 2205.14459).

    minimise   CLIP + λ_in (1/B) Σ_ij (x_i·x_j − y_i·y_j)² + λ_cross (1/B) Σ_ij (x_i·y_j − x_j·y_i)²

No B × B matrix is needed. With P = X + Y and M = X − Y [B, D],

    X Xᵀ − Y Yᵀ = ½ (P Mᵀ + M Pᵀ)    and    X Yᵀ − Y Xᵀ = ½ (M Pᵀ − P Mᵀ),

so that the two sums are ½ (a + t) and ½ (a − t) with a = tr(PᵀP MᵀM) and t = tr((MᵀP)²): D × D matrices, which are
summed over ranks. Both are of the order of M², as the sums are: nothing cancels where pairs agree. The Gram matrices of
X and Y would leave the difference of numbers of the order of B², which is noise in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from disttempnet import distributed
from disttempnet.losses.global_contrastive import GlobalContrastiveLoss
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
from disttempnet.losses.temperature.scalar import LearnableTemperature


class CyClipLoss(Objective):
    """CLIP with a learnable logit scale plus the two cyclic terms, on plain similarities.

    CLIP + (λ_in/B) Σ_ij (x_i·x_j − y_i·y_j)² + (λ_cross/B) Σ_ij (x_i·y_j − x_j·y_i)²

    Args:
        context: gives N and D.
        temperature, tau_min, tau_max: of CLIP's logit scale, see `LearnableTemperature`.
        in_modal, cross_modal: λ_in and λ_cross.

    Shape:
        features: this rank's rows [b, D], as many on every rank. ids are not needed. total: 0-d.

    Example:
        The plain form over the full batch, and this one, which needs no B × B matrix and works across ranks:

        >>> from disttempnet import Features, build_loss
        >>> import torch.nn.functional as F
        >>> def plain(image, text, tau):
        ...     logits, target = image @ text.T / tau, torch.arange(len(image))
        ...     clip = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        ...     in_modal = (image @ image.T - text @ text.T).square().sum() / len(image)
        ...     cross_modal = (image @ text.T - text @ image.T).square().sum() / len(image)
        ...     return clip + 0.25 * in_modal + 0.25 * cross_modal
        >>> image, text = (F.normalize(torch.randn(8, 16), dim=1).requires_grad_() for _ in range(2))
        >>> loss = build_loss("cyclip", num_samples=100, embed_dim=16)
        >>> total, expected = loss(Features.unit(image, text)).total, plain(image, text, tau=0.07)
        >>> torch.allclose(total, expected, atol=1e-5)
        True
        >>> gradients, wanted = (torch.autograd.grad(value, (image, text)) for value in (total, expected))
        >>> all(torch.allclose(*pair, atol=1e-5) for pair in zip(gradients, wanted))
        True

    Reference:
        CyCLIP: cyclic contrastive language-image pretraining, arXiv 2205.14459.
    """

    def __init__(
        self,
        context: ObjectiveContext,
        *,
        temperature: float = 0.07,
        tau_min: float = 0.01,
        tau_max: float = 1.0,
        in_modal: float = 0.25,
        cross_modal: float = 0.25,
    ) -> None:
        super().__init__()
        if in_modal < 0 or cross_modal < 0:
            raise ValueError(f"in_modal {in_modal} and cross_modal {cross_modal} must not be negative")
        tau = LearnableTemperature(context, temperature=temperature, tau_min=tau_min, tau_max=tau_max)
        self.clip = GlobalContrastiveLoss(context, tau, None, robust=False)
        self.in_modal, self.cross_modal = in_modal, cross_modal

    def set_epoch(self, epoch: float) -> None:
        self.clip.set_epoch(epoch)

    def forward(self, features: Features, ids: IdsLike | None = None) -> LossOutput:
        """Return the loss; metrics: CLIP's, and in_modal and cross_modal without their weights; `loss` is the sum."""
        clip = self.clip(features, ids)
        with exact_arithmetic(features.image.device):
            cyclic, in_modal, cross_modal = self._cyclic(features.image, features.text)
        loss = clip.metrics["loss"] + cyclic.detach()
        metrics = clip.metrics | {"loss": loss, "in_modal": in_modal, "cross_modal": cross_modal}
        return LossOutput(clip.total + cyclic, metrics)

    def _cyclic(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weighted sum of both terms with its gradient, and each term."""
        # P and M [b, D] of this rank; PᵀP, MᵀM, MᵀP [D, D] of the global batch
        dtype, b = compute_dtype(image), len(image)
        batch = b * distributed.world_size()
        x, y = image.detach().to(dtype), text.detach().to(dtype)
        p, m = x + y, x - y
        pp, mm, mp = distributed.all_sum(torch.stack([p.T @ p, m.T @ m, m.T @ p]))

        # both terms, 0-d
        a, t = (pp * mm).sum(), (mp * mp.T).sum()
        in_modal, cross_modal = (a + t) / (2 * batch), (a - t) / (2 * batch)
        value = self.in_modal * in_modal + self.cross_modal * cross_modal

        # gradient of value = (1/B) (½ (λ_in + λ_cross) a + ½ (λ_in − λ_cross) t) by P and M, then by X and Y [b, D];
        # the mean over ranks of 1/b is the sum over ranks of 1/B
        both, difference = (self.in_modal + self.cross_modal) / b, (self.in_modal - self.cross_modal) / b
        by_p = both * (p @ mm) + difference * (m @ mp.T)
        by_m = both * (m @ pp) + difference * (p @ mp)
        return with_gradient(value, image, text, by_p + by_m, by_p - by_m), in_modal, cross_modal

    def temperatures(self, image: Tensor, text: Tensor, ids: IdsLike | None = None) -> Tensor | None:
        return self.clip.temperatures(image, text, ids)
