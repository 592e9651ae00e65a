"""Contrast of local rows with all columns: row statistics and the closed-form feature gradient, in tiles.

Shapes: b local rows, B global columns, D width. Only [tile, B] pieces of the b × B similarities exist at a time,
so memory grows with B, not with b · B. Nothing here is differentiated: the gradient is a formula.

A row i is an anchor (an image, or a text) whose exponents are e_ij = (s_ij − s_ii) / τ_i with s_ij = row_i · column_j.
Columns whose sample id equals the row's are no negatives and are left out; with ids None every column counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 20  # of a tile of similarities: 4 MB in float32, about a core's cache
EXCLUDED = -1e30  # exponent of what does not count: exp gives 0, and 0 · −1e30 is 0 where 0 · −inf would be NaN


class RowStatistics(NamedTuple):
    """Of local anchors [b]: ℓ_i = log mean_j exp(e_ij), m_i = Σ_j softmax_ij e_ij, n_i = number of negatives."""

    log_mean: Tensor
    mean_exponent: Tensor
    negatives: Tensor


class Anchors(NamedTuple):
    """Weights of anchors as p = exp(s · slope + offset): slope 1/τ, offset −s_ii/τ − log u − log n; both [rows]."""

    slope: Tensor
    offset: Tensor

    @classmethod
    def of(cls, tau: Tensor, positive: Tensor, log_u: Tensor, negatives: Tensor) -> Anchors:
        offset = -positive / tau - log_u - negatives.log()
        return cls(1 / tau, torch.where(negatives > 0, offset, EXCLUDED))


def row_statistics(
    rows: Tensor, columns: Tensor, positive: Tensor, tau: Tensor, row_ids: Tensor | None, column_ids: Tensor | None
) -> RowStatistics:
    """Statistics of every row over its negatives: rows [b, D], columns [B, D], positive (s_ii) and tau [b].

    A row without negatives has ℓ = −inf, m = 0, n = 0.
    """
    log_mean, moment, count = torch.empty_like(tau), torch.empty_like(tau), torch.empty_like(tau)
    for piece in _tiles(len(rows), len(columns)):
        exponent = (rows[piece] @ columns.T).sub_(positive[piece, None]).div_(tau[piece, None])
        count[piece] = len(columns)
        if row_ids is not None and column_ids is not None:
            equal = row_ids[piece, None] == column_ids
            exponent.masked_fill_(equal, EXCLUDED)
            count[piece] -= equal.sum(1)
        largest = exponent.amax(1, keepdim=True)
        weight = (exponent - largest).exp_()
        total = weight.sum(1)
        moment[piece] = weight.mul_(exponent).sum(1) / total
        log_mean[piece] = largest.squeeze(1) + total.log()
    alone = count == 0
    log_mean = torch.where(alone, -torch.inf, log_mean - count.log())
    return RowStatistics(log_mean, torch.where(alone, 0.0, moment), count)


def pull(
    rows: Tensor,
    columns: Tensor,
    row_anchors: Anchors,
    column_anchors: Anchors,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
) -> Tensor:
    """Σ_j (p_ij + p'_ji) column_j for every row [b, D]: what the negatives do to row i.

    p_ij is the weight that anchor i (a local row) gives to column j; p'_ji the weight that anchor j of the other
    modality, on whichever rank, gives to row i. Both come from the same similarity s_ij.
    """

    def weigh(similarity: Tensor, piece: slice) -> Tensor:
        weight = torch.addcmul(row_anchors.offset[piece, None], similarity, row_anchors.slope[piece, None]).exp_()
        weight += torch.addcmul(column_anchors.offset, similarity, column_anchors.slope).exp_()
        if row_ids is not None and column_ids is not None:
            weight.masked_fill_(row_ids[piece, None] == column_ids, 0.0)
        return weight

    return weighted_columns(rows, columns, weigh)


def weighted_columns(rows: Tensor, columns: Tensor, weigh: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Σ_j w_ij column_j for every row [b, D]; `weigh` makes w [tile, B] of the similarities of a slice of the rows."""
    result = torch.empty_like(rows)
    for piece in _tiles(len(rows), len(columns)):
        torch.mm(weigh(rows[piece] @ columns.T, piece), columns, out=result[piece])
    return result


def _tiles(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, TILE_ELEMENTS // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
