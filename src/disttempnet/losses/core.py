"""What every objective shares: its output, exact arithmetic, and a value that carries a closed-form gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Features(NamedTuple):
    """This rank's rows of a global batch of pairs, all [b, D]; make one with `of` or `unit`.

    Attributes:
        image, text: unit rows, which the contrastive objectives compare.
        image_embedding, text_embedding: the same rows before normalising, which VICReg compares.
    """

    image: Tensor
    text: Tensor
    image_embedding: Tensor
    text_embedding: Tensor

    @classmethod
    def of(cls, image_embedding: Tensor, text_embedding: Tensor) -> Features:
        """Features of what the towers give, of any norm; half precision is normalised in float32."""
        image, text = (side.to(compute_dtype(side)) for side in (image_embedding, text_embedding))
        return cls(F.normalize(image, dim=-1), F.normalize(text, dim=-1), image_embedding, text_embedding)

    @classmethod
    def unit(cls, image: Tensor, text: Tensor) -> Features:
        """Features of rows that have norm 1 already; nothing is normalised again."""
        return cls(image, text, image, text)


class Context(NamedTuple):
    """What a run gives to every objective: N samples (ids lie in [0, N)), feature width D, the run's seed."""

    num_samples: int
    embed_dim: int
    seed: int = 0


class LossOutput(NamedTuple):
    """`total`: 0-d, its backward is this rank's share of the gradient; `metrics`: detached 0-d tensors."""

    total: Tensor
    metrics: dict[str, Tensor]


class Objective(nn.Module):
    """What training, evaluation and reports ask of an objective."""

    def set_epoch(self, epoch: float) -> None:
        """Called at the start of every epoch; objectives with schedules override it."""

    def forward(self, features: Features, ids: Tensor) -> LossOutput:
        """This rank's rows and their sample ids, int64 [b] → loss and metrics."""
        raise NotImplementedError

    def temperatures(self, image: Tensor, text: Tensor, ids: Tensor | None = None) -> Tensor | None:
        """τ of image and text anchors [2, n] as in evaluation, without gradient.

        Args:
            image, text: unit features [n, D] of any pairs.
            ids: int64 [n], where the pairs are training samples. Every rank gives the same ones.

        Returns:
            None where there is no τ, or where only training samples have one (of their own) and ids are not given.
        """
        return None

    def tracked_temperatures(self) -> Tensor | None:
        """τ [2, n] that this rank keeps for training samples it has seen; None where τ is not kept a sample."""
        return None


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Autocast off and float32 products in float32 (no TF32): at τ = .01 a bf16 similarity errs by 0.27 nat."""
    precision = torch.get_float32_matmul_precision()
    if precision != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)


def compute_dtype(features: Tensor) -> torch.dtype:
    """float64 stays float64; everything narrower is computed in float32."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def check_features(features: Features, ids: Tensor) -> None:
    """Raise ValueError where shapes or types cannot be a batch of pairs."""
    image, text = features.image, features.text
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(f"features must both be [b, D], got {tuple(image.shape)} and {tuple(text.shape)}")
    if ids.shape != image.shape[:1] or ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64 [{image.shape[0]}], got {ids.dtype} {list(ids.shape)}")


LaterGradient = Callable[..., tuple[Tensor, Tensor]]


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, image: Tensor, text: Tensor, image_gradient: Tensor, text_gradient: Tensor
    ) -> Tensor:
        ctx.save_for_backward(image_gradient, text_gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        image_gradient, text_gradient = ctx.saved_tensors
        return (
            None,
            (upstream * image_gradient).to(image_gradient.dtype),
            (upstream * text_gradient).to(text_gradient.dtype),
            None,
            None,
        )


def with_gradient(value: Tensor, image: Tensor, text: Tensor, image_gradient: Tensor, text_gradient: Tensor) -> Tensor:
    """`value`, with the given gradients with respect to `image` and `text` [b, D] (cast to their dtype)."""
    result = _WithGradient.apply(value, image, text, image_gradient.to(image.dtype), text_gradient.to(text.dtype))
    assert isinstance(result, Tensor)
    return result


class _WithLaterGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, image: Tensor, text: Tensor, gradient: LaterGradient, *kept: Tensor | None
    ) -> Tensor:
        ctx.gradient = gradient
        ctx.save_for_backward(image, text, *kept)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        image, text, *kept = ctx.saved_tensors
        with exact_arithmetic(image.device):
            image_gradient, text_gradient = ctx.gradient(upstream, image.detach(), text.detach(), *kept)
        given = image_gradient.to(image.dtype), text_gradient.to(text.dtype)
        return (None, *given, None, *(None for _ in kept))


def with_later_gradient(
    value: Tensor, image: Tensor, text: Tensor, gradient: LaterGradient, *kept: Tensor | None
) -> Tensor:
    """`value`, whose gradient is computed in the backward pass, so that memory for it is taken only there.

    gradient(upstream, image, text, *kept) gives those with respect to `image` and `text` [b, D], times `upstream`; it
    holds no tensors of its own: what it needs is `kept`, which autograd frees.
    """
    result = _WithLaterGradient.apply(value, image, text, gradient, *kept)
    assert isinstance(result, Tensor)
    return result


def tau_metrics(tau: Tensor) -> dict[str, Tensor]:
    """mean, min, max and std of τ [2, B] of image and text anchors."""
    metrics: dict[str, Tensor] = {}
    for side, name in zip(tau.detach(), ("image", "text"), strict=True):
        metrics |= {
            f"tau/{name}_mean": side.mean(),
            f"tau/{name}_min": side.amin(),
            f"tau/{name}_max": side.amax(),
            f"tau/{name}_std": side.std(correction=0),
        }
    return metrics


def only_gradient(term: Tensor) -> Tensor:
    """Zero in value, `term` in gradient."""
    return term - term.detach()
