"""Choice of the implementation that contrasts: blocks of torch on any device, or Triton kernels on an NVIDIA GPU."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from disttempnet.errors import UserError
from disttempnet.losses.contrast import blocks
from disttempnet.losses.contrast.pairs import Anchors, BatchPairs, Statistics

KERNEL_SETTING = "DISTTEMPNET_KERNEL"  # environment: auto, torch, triton


def use_kernel(embeddings: Tensor, hinge: bool = False) -> bool:
    """Return True where the Triton kernels compute this step, as DISTTEMPNET_KERNEL chooses: auto, torch or triton.

    auto: on a GPU that can run them, where the run is in half precision already (autocast, or half embeddings),
    because the kernels round features to bf16. Call it before autocast is switched off.

    Args:
        embeddings: of a tower.
        hinge: whether the hinge form is contrasted, which the kernels do not have.

    Raises:
        UserError: an unknown setting, or triton where it cannot run.
    """
    setting = os.environ.get(KERNEL_SETTING) or "auto"
    if setting not in ("auto", "torch", "triton"):
        raise UserError(f"{KERNEL_SETTING} must be auto, torch or triton, got '{setting}'")
    if setting == "torch" or (setting == "auto" and not embeddings.is_cuda):
        return False
    reason = "the kernels have no hinge form" if hinge else _unusable(embeddings)
    if setting == "triton" and reason:
        raise UserError(f"{KERNEL_SETTING}=triton: {reason}")
    half = embeddings.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(embeddings.device.type)
    return not reason and (half or setting == "triton")


def _unusable(embeddings: Tensor) -> str:
    """Return the reason why the kernels cannot run here; empty where they can."""
    if not _triton_installed():
        return "triton is not installed"
    from disttempnet.losses.contrast import triton

    return triton.unusable(embeddings)


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def anchor_statistics(
    pairs: BatchPairs, positive: Tensor, taus: Tensor, negatives: Tensor, *, moments: bool, keep: bool
) -> tuple[list[Statistics], list[Tensor]]:
    """Return statistics of this rank's image and text anchors, and similarities for `feature_gradients` to reuse.

    Args:
        positive: s_ii [b], or [2, b] where it differs between image and text anchors.
        negatives: n_i [b].
        taus: [2, b], of image and text anchors; [1, b] where only image anchors are wanted.
        moments: whether m is wanted.
        keep: whether a gradient will be computed.

    A row without negatives has ℓ = −inf, m = 0.
    """
    if not pairs.kernel:
        return blocks.block_statistics(pairs, positive, taus, negatives, moments=moments, keep=keep)
    from disttempnet.losses.contrast import triton

    sides = [
        blocks.RunningStatistics(tau, moments, own) for tau, own in zip(taus, positive.expand_as(taus), strict=True)
    ]
    for columns in pairs.columns():
        for side, rows, other in zip(sides, (pairs.image, pairs.text), (columns.text, columns.image), strict=False):
            side.merge(*triton.row_statistics(rows, other, side.slope, columns.start, pairs))
    return [side.result(negatives) for side in sides], []


def feature_gradients(
    pairs: BatchPairs, image: Anchors, text: Anchors, positive_weight: Tensor, similarities: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return Σ_j (p_ij + p'_ji) column_j − positive_weight_i · partner_i of local images and texts, each [b, D].

    p_ij is the weight that anchor i (a local row) gives to column j; p'_ji the weight that anchor j of the other
    modality, on whichever rank, gives to row i. Both come from the same similarity s_ij.

    Args:
        image, text: anchors of the global batch [B].
        positive_weight: weight of the positive pair [b].
        similarities: from `anchor_statistics`.
    """
    # the pair's own weight nearly cancels: bf16 would lose it
    if pairs.kernel and pairs.ids is None and pairs.pulled is None:
        positive_weight = positive_weight - _own_weight(pairs, image) - _own_weight(pairs, text)
    images, texts = pairs.own_pull
    gradients = texts * -positive_weight[:, None], images * -positive_weight[:, None]
    if not pairs.kernel:
        blocks.add_block_gradients(pairs, image, text, *gradients, similarities)
        return gradients
    if pairs.pulled is not None:  # the kernels pull with what they compare, of which this is the beginning
        width = images.shape[1]
        by_image, by_text = feature_gradients(pairs._replace(pulled=None), image, text, positive_weight, similarities)
        return by_image[:, :width], by_text[:, :width]
    from disttempnet.losses.contrast import triton

    own = image.rows(pairs.local), text.rows(pairs.local)
    for columns in pairs.columns():
        at = slice(columns.start, columns.start + len(columns.image))
        triton.add_kernel_gradients(
            pairs.image, columns.text, own[0], text.rows(at), columns.start, pairs, gradients[0]
        )
        triton.add_kernel_gradients(
            pairs.text, columns.image, own[1], image.rows(at), columns.start, pairs, gradients[1]
        )
    return gradients


def _own_weight(pairs: BatchPairs, anchors: Anchors) -> Tensor:
    """Return p_ii of this rank's anchors [b]."""
    own = anchors.rows(pairs.local)
    return ((pairs.image * pairs.text).sum(1) * own.slope + own.offset).exp()
