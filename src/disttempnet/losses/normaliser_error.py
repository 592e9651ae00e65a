"""Error of normalisers: what an objective keeps, or predicts, against the exact value over a sample of the data.

With n pairs the exact normaliser of anchor i is ε + g_i, g_i the mean of exp(d_ij / τ_i) over the other n − 1 pairs as
they are embedded now. The error of a kept ε + u_i is (ε + g_i)/(ε + u_i) − 1, NeuCLIP's diagnostic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from disttempnet import distributed
from disttempnet.losses.contrast.backend import anchor_statistics
from disttempnet.losses.contrast.pairs import BatchPairs
from disttempnet.losses.global_contrastive import GlobalContrastiveLoss
from disttempnet.losses.objective import Features, Objective, compute_dtype, exact_arithmetic

GlobalBatch = tuple[Features, Tensor]  # of all ranks: features [B, D] and ids [B]


def has_normalisers(loss: Objective) -> bool:
    """Return True for objectives whose normaliser leaves the pair out, as the exact one does."""
    return isinstance(loss, GlobalContrastiveLoss) and loss.gamma is not None and loss.popularity is None


@torch.no_grad()
def normaliser_errors(loss: GlobalContrastiveLoss, batches: Sequence[GlobalBatch]) -> dict[str, float]:
    """Measure normalisers over the pairs of some global batches; every rank calls this with the same ones.

    Nothing of the objective is changed. Memory: the features, and blocks of similarities.

    Args:
        loss: an objective of the family that leaves the pair out (`has_normalisers`).
        batches: of training samples, such as steps have; their sizes are multiples of the world size.

    Returns:
        Name → value. Of samples that were visited, where the objective keeps or predicts normalisers:
        `normaliser_error/image_mean`, `/text_mean`: mean of (ε + g)/(ε + u) − 1: 0 where u is right on average.
        `/image_log_rms`, `/text_log_rms`: root mean square of log (ε + u) − log (ε + g).
        `/visited`: share of the samples, of both sides.
        And `/batch_log_rms`: the same root mean square of each batch's own g, which needs no table: both sides.

    Example:
        >>> from disttempnet import Features, build_loss
        >>> from torch.nn.functional import normalize
        >>> image, text = (normalize(torch.randn(8, 4), dim=1) for _ in range(2))
        >>> batches = [(Features.unit(image[i : i + 4], text[i : i + 4]), torch.arange(i, i + 4)) for i in (0, 4)]
        >>> sorted(normaliser_errors(build_loss("dcl", num_samples=8, embed_dim=4), batches))
        ['normaliser_error/batch_log_rms']
    """
    features, all_ids = zip(*batches, strict=True)
    dtype, ids = compute_dtype(features[0].image), torch.cat(all_ids)
    with exact_arithmetic(ids.device):
        # features [n, D], and what is compared [n, D] or, with a reference, [n, D + R]; τ [2, n]
        image, text = (torch.cat(sides).to(dtype) for sides in zip(*((f.image, f.text) for f in features), strict=True))
        sides = [torch.cat(parts).to(dtype) for parts in zip(*map(loss.compared, features), strict=True)]
        compared = sides[0], sides[1]
        tau = loss.temperatures(image, text, ids)
        assert tau is not None

        # log (ε + g) over all pairs, each rank a part of the anchors, and over each batch alone: [2, n]
        size = len(ids) // distributed.world_size()
        own = slice(distributed.rank() * size, (distributed.rank() + 1) * size)
        part = _log_g(compared, ids, tau, own, loss.margin)
        exact = loss.with_eps(distributed.all_gather(part.T).T)
        sizes = [len(part) for part in all_ids]
        parts = zip(*(side.split(sizes) for side in compared), all_ids, tau.split(sizes, dim=1), strict=True)
        alone = torch.cat(
            [_log_g((x, y), own_ids, at, slice(0, len(x)), loss.margin) for x, y, own_ids, at in parts], dim=1
        )
        kept = loss.log_normalisers(image, text, ids, tau)

        # differences of the rows that have both
        found: dict[str, float] = {}
        if kept is not None:
            usable = kept.isfinite() & exact.isfinite()
            for side, name in enumerate(("image", "text")):
                log_error = (kept - exact)[side, usable[side]].double()
                if len(log_error):
                    found[f"normaliser_error/{name}_mean"] = float(torch.expm1(-log_error).mean())
                    found[f"normaliser_error/{name}_log_rms"] = _rms(log_error)
            found["normaliser_error/visited"] = float(kept.isfinite().double().mean())
        both = loss.with_eps(alone)
        usable = both.isfinite() & exact.isfinite()
        if usable.any():
            found["normaliser_error/batch_log_rms"] = _rms((both - exact)[usable].double())
        return {name: value for name, value in found.items() if math.isfinite(value)}


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _log_g(compared: tuple[Tensor, Tensor], ids: Tensor, tau: Tensor, rows: slice, margin: float | None) -> Tensor:
    """Return log g [2, r] of some rows of a batch as anchors, over all its columns of other ids."""
    image, text = compared
    pairs, negatives = BatchPairs.of(compared, compared, ids, kernel=False, margin=margin)
    pairs = pairs._replace(image=image[rows], text=text[rows], first_row=rows.start)
    positive = (image * text).sum(1)[rows]
    sides, _ = anchor_statistics(pairs, positive, tau[:, rows], negatives[rows], moments=False, keep=False)
    return torch.stack([side.log_mean for side in sides])
