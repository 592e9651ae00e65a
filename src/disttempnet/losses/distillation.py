"""Distillation from a reference model: its softmax over the batch as a target (as in DRRho-CLIP's code).

    D = c · mean_i Σ_sides −Σ_j T_ij log softmax_j(s_ij / τ_i),    T_ij = softmax_j(s^ref_ij / .01),    c = ½

over all columns j of the global batch. With P the softmax of s_ij / τ_i, the gradients are

    ∂D/∂x_i = (c/B) Σ_j [ (P1_ij − T1_ij)/τ1_i + (P2_ji − T2_ji)/τ2_j ] y_j
    ∂D/∂τ_i = (c/B) Σ_j (T_ij − P_ij) s_ij / τ_i²

Shapes: b local rows, B global rows, D and R widths of the features and of the reference's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from disttempnet import distributed
from disttempnet.losses.contrast.backend import anchor_statistics, feature_gradients
from disttempnet.losses.contrast.pairs import EXCLUDED, Anchors, BatchPairs
from disttempnet.losses.objective import SIDE_WEIGHT

REFERENCE_TAU = 0.01


class Distilled(NamedTuple):
    """Value and gradients of D.

    Attributes:
        value: D, 0-d, the same on every rank.
        image, text: this rank's share of the feature gradient [b, D]; its mean over ranks is that of D.
        tau: B/c times ∂D/∂τ of all anchors [2, B].
    """

    value: Tensor
    image: Tensor
    text: Tensor
    tau: Tensor


def distill(pairs: BatchPairs, reference: BatchPairs, tau: Tensor) -> Distilled:
    """Return D of two models on the same pairs; every rank calls this.

    Args:
        pairs: features, all columns counted.
        reference: those of the reference, all columns counted.
        tau: of all anchors [2, B].
    """
    b, size = len(pairs.image), tau.shape[1]
    own = tau[:, pairs.local]

    # log-means over all columns and moments of this rank's anchors, then ℓ and s_ii of all: [2, B] and [B]
    ours, theirs = (
        _statistics(one, at) for one, at in ((pairs, own), (reference, torch.full_like(own, REFERENCE_TAU)))
    )
    local = torch.stack([*ours.log_mean, ours.positive, *theirs.log_mean, theirs.positive], dim=1)
    gathered = distributed.all_gather(local).T
    log_mean, positive, their_log_mean, their_positive = gathered[:2], gathered[2], gathered[3:5], gathered[5]
    columns = torch.full_like(positive, size)
    student = Anchors.of(tau, positive, log_mean + tau.log(), columns)
    teacher = Anchors.of(torch.full_like(tau, REFERENCE_TAU), their_positive, their_log_mean + tau.log(), columns)

    # Σ_j P/τ column, and Σ_j T/τ column of each side's anchors alone: its product with the anchor is Σ_j T s/τ
    nothing = torch.zeros_like(positive[pairs.local])
    image, text = feature_gradients(pairs, *_sides(student), nothing, [])
    assert pairs.all_image is not None
    assert pairs.all_text is not None
    target = reference._replace(pulled=(pairs.all_image, pairs.all_text))
    first, second = _sides(teacher)
    silent = Anchors(torch.zeros_like(positive), torch.full_like(positive, EXCLUDED))
    by_image = feature_gradients(target, first, silent, nothing, [])
    by_text = feature_gradients(target, silent, second, nothing, [])
    agreement = torch.stack([(pairs.image * by_image[0]).sum(1), (pairs.text * by_text[1]).sum(1)])

    # cross-entropies and derivatives with respect to τ of this rank's anchors [2, b]
    entropy = ours.log_mean + math.log(size) + ours.positive / own - agreement
    slope = (agreement - ours.moment - ours.positive / own) / own
    value = SIDE_WEIGHT * distributed.all_mean([entropy.sum(0).mean()])[0]
    scale = SIDE_WEIGHT / b
    return Distilled(
        value,
        scale * (image - by_image[0] - by_text[0]),
        scale * (text - by_image[1] - by_text[1]),
        distributed.all_gather(slope.T).T,
    )


class _Statistics(NamedTuple):
    """ℓ, m [2, b] and s_ii [b] of this rank's anchors."""

    log_mean: Tensor
    moment: Tensor
    positive: Tensor


def _statistics(pairs: BatchPairs, tau: Tensor) -> _Statistics:
    positive = (pairs.image * pairs.text).sum(1)
    count = torch.full_like(positive, pairs.size)
    sides, _ = anchor_statistics(pairs, positive, tau, count, moments=True, keep=False)
    return _Statistics(
        torch.stack([side.log_mean for side in sides]), torch.stack([side.mean_exponent for side in sides]), positive
    )


def _sides(anchors: Anchors) -> tuple[Anchors, Anchors]:
    return Anchors(anchors.slope[0], anchors.offset[0]), Anchors(anchors.slope[1], anchors.offset[1])
