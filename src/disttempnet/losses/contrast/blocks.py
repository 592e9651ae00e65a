"""Contrast in blocks, on any device: statistics of the anchors and the closed-form feature gradient.

Only blocks of the b × B similarities exist at a time, so memory grows with the batch and not with its square. Where all
of them fit into `KEPT_BYTES` they are kept for the gradient. Autograd records nothing here: the gradient is a formula.

With one rank the columns are the other side's anchors, and both sides share one block: 8·B²·D FLOP a step, 6·B²·D with
kept similarities. With more ranks each side has blocks of its own: 12·b·B·D FLOP a rank, 8·b·B·D with kept ones. The
columns of all ranks are there at once, or come round rank by rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from disttempnet.losses.contrast.pairs import EXCLUDED, LOG2E, Anchors, BatchPairs, Columns, Statistics

BLOCKS = {"cpu": (512, 1024), "cuda": (4096, 4096)}  # rows and columns: what a core's cache holds, what fills a GPU
KEPT_BYTES = 64 << 20  # of similarities that are kept for the gradient rather than computed again


def block_statistics(
    pairs: BatchPairs, positive: Tensor, taus: Tensor, negatives: Tensor, *, moments: bool, keep: bool
) -> tuple[list[Statistics], list[Tensor]]:
    """Implement `backend.anchor_statistics`."""
    single_rank = pairs.single_rank
    sides = [
        RunningStatistics(tau, moments, own, pairs.margin)
        for tau, own in zip(taus, positive.expand_as(taus), strict=True)
    ]
    scratch = [_block_memory(pairs) for _ in range(1 + moments + (0 if pairs.margin is None else 2))]

    # similarities are kept where the matrix, or both of them, fit
    kept: list[Tensor] = []
    matrices = 1 if single_rank else 2
    size = matrices * pairs.image.element_size() * len(pairs.image) * pairs.size
    keep_in = kept if keep and size <= KEPT_BYTES else None

    for columns in pairs.columns():
        # blocks of images × texts: rows are image anchors, and with one rank columns are text anchors
        for r, c, s in _similarities(pairs.image, columns.text, columns, pairs, None, keep_in):
            sides[0].add(s, 1, r, scratch)
            if single_rank and len(sides) == 2:
                sides[1].add(s, 0, c, scratch)

        # with more ranks, blocks of texts × images for the text anchors
        if not single_rank and len(sides) == 2:
            for r, _, s in _similarities(pairs.text, columns.image, columns, pairs, None, keep_in):
                sides[1].add(s, 1, r, scratch)
    return [side.result(negatives) for side in sides], kept


def add_block_gradients(
    pairs: BatchPairs, image: Anchors, text: Anchors, image_gradient: Tensor, text_gradient: Tensor, kept: list[Tensor]
) -> None:
    """Add Σ_j (p_ij + p'_ji) column_j of every local row to both sides' gradients [b, D]."""
    single_rank = pairs.single_rank
    scratch = [_block_memory(pairs) for _ in range(2 if pairs.margin is None else 3)]
    similarities = iter(kept) if kept else None  # in the order in which they were computed
    own_image, own_text = image.rows(pairs.local), text.rows(pairs.local)
    for columns in pairs.columns():
        images, texts = (columns.image, columns.text) if pairs.pulled is None else pairs.pulled
        for r, c, s in _similarities(pairs.image, columns.text, columns, pairs, similarities, None):
            at = columns.rows(c)
            weight = _weights(s, own_image.rows(r), text.rows(at), pairs, r, at, scratch)
            image_gradient[r].addmm_(weight, texts[c].to(weight.dtype))
            if single_rank:
                text_gradient[c].addmm_(weight.T, images[r].to(weight.dtype))
        if single_rank:
            continue
        for r, c, s in _similarities(pairs.text, columns.image, columns, pairs, similarities, None):
            at = columns.rows(c)
            weight = _weights(s, own_text.rows(r), image.rows(at), pairs, r, at, scratch)
            text_gradient[r].addmm_(weight, images[c].to(weight.dtype))


def block_slices(rows: Tensor, columns: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield slices of the rows and of the columns that cover all pairs, row after row."""
    high, wide = BLOCKS.get(rows.device.type, BLOCKS["cuda"])
    for top in range(0, len(rows), high):
        for left in range(0, len(columns), wide):
            yield slice(top, min(top + high, len(rows))), slice(left, min(left + wide, len(columns)))


def _block_memory(pairs: BatchPairs) -> Tensor:
    """Return memory for the largest block, uninitialised."""
    high, wide = BLOCKS.get(pairs.image.device.type, BLOCKS["cuda"])
    return pairs.image.new_empty(min(high, len(pairs.image)) * min(wide, pairs.size))


def _similarities(
    rows: Tensor,
    other: Tensor,
    columns: Columns,
    pairs: BatchPairs,
    kept: Iterator[Tensor] | None,
    keep_in: list[Tensor] | None,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield blocks of s with their rows and their place among the columns; excluded pairs are at EXCLUDED.

    Blocks are taken from `kept` where it is given, else computed: into memory of their own and appended to `keep_in`,
    or all into the same memory.

    Args:
        rows: of this rank [b, D].
        other: the side of the columns that they meet [n, D].
        columns: where these stand in the global batch.
        pairs: which pairs count.
        kept: blocks of an earlier call.
        keep_in: list to keep them in.
    """
    memory = None if kept is not None or keep_in is not None else _block_memory(pairs)
    for r, c in block_slices(rows, other):
        if kept is not None:
            yield r, c, next(kept)
            continue
        out = None if memory is None else _shaped(memory, r, c)
        s = torch.mm(rows[r], other[c].to(rows.dtype).T, out=out)
        at = columns.rows(c)
        if pairs.ids is not None and pairs.distinct:
            s.diagonal(pairs.first_row + r.start - at.start).fill_(EXCLUDED)
        elif pairs.ids is not None:
            s.masked_fill_(pairs.ids[pairs.local][r, None] == pairs.ids[at], EXCLUDED)
        if keep_in is not None:
            keep_in.append(s)
        yield r, c, s


def _shaped(memory: Tensor, r: slice, c: slice) -> Tensor:
    high, wide = r.stop - r.start, c.stop - c.start
    return memory[: high * wide].view(high, wide)


def _weights(
    s: Tensor, rows: Anchors, columns: Anchors, pairs: BatchPairs, r: slice, c: slice, scratch: list[Tensor]
) -> Tensor:
    """Return p_ij + p'_ji of a block, in scratch memory: two passes and an exp2 each.

    In the hinge form each is multiplied by its pull, which is 0 for an excluded pair.
    """
    by_row, by_column, *gaps = (memory[: s.numel()].view(s.shape) for memory in scratch)
    if pairs.margin is None:
        torch.mul(s, LOG2E * rows.slope[:, None], out=by_row).add_(LOG2E * rows.offset[:, None]).exp2_()
        torch.mul(s, LOG2E * columns.slope, out=by_column).add_(LOG2E * columns.offset).exp2_()
        return by_row.add_(by_column)
    assert pairs.positive is not None
    for out, anchors, positive, dim in (
        (by_row, rows, pairs.positive[pairs.local][r], 1),
        (by_column, columns, pairs.positive[c], 0),
    ):
        gap = _gap(s, positive.unsqueeze(dim), pairs.margin, gaps[0])
        torch.mul(gap, gap, out=out).mul_(LOG2E * anchors.slope.unsqueeze(dim))
        out.add_(LOG2E * anchors.offset.unsqueeze(dim)).exp2_().mul_(gap).mul_(2)
    return by_row.add_(by_column)


def _gap(s: Tensor, positive: Tensor, margin: float, out: Tensor) -> Tensor:
    """Return [s − s_ii + m]₊ of a block; 0 for excluded pairs."""
    return torch.sub(s, positive, out=out).add_(margin).clamp_(min=0)


class RunningStatistics:
    """Log-sum-exp and moment of anchors [n], block after block: exponents (s − largest) / τ, in base 2.

    In the hinge form of a margin [d + m]₊² stands in place of s, and the mean pull is added up.
    """

    def __init__(self, tau: Tensor, moments: bool, positive: Tensor, margin: float | None = None) -> None:
        self.tau, self.moments, self.slope = tau, moments, LOG2E / tau
        self.positive, self.margin = positive, margin
        self.largest = torch.full_like(tau, EXCLUDED)
        self.total, self.moment, self.pull = (torch.zeros_like(tau) for _ in range(3))

    def add(self, s: Tensor, dim: int, piece: slice, scratch: list[Tensor]) -> None:
        """Add a block of s for the anchors of a piece, summed over dimension `dim`."""
        if self.margin is not None:
            gap, squares = (memory[: s.numel()].view(s.shape) for memory in scratch[-2:])
            _gap(s, self.positive[piece].unsqueeze(dim), self.margin, gap)
            s = torch.mul(gap, gap, out=squares).masked_fill_(s == EXCLUDED, EXCLUDED)

        # sums so far are rescaled to the new maximum
        before, slope, total = self.largest[piece], self.slope[piece], self.total[piece]
        largest = torch.maximum(before, s.amax(dim))
        step = (before - largest) * slope
        factor = step.exp2()
        exponent, weight = (memory[: s.numel()].view(s.shape) for memory in (scratch[0], scratch[int(self.moments)]))
        torch.sub(s, largest.unsqueeze(dim), out=exponent).mul_(slope.unsqueeze(dim))
        torch.exp2(exponent, out=weight)
        added = weight.sum(dim)
        if self.margin is not None:
            self.pull[piece] = factor * self.pull[piece] + 2 * gap.mul_(weight).sum(dim)
        if self.moments:
            shifted = factor * (self.moment[piece] + step * total)
            self.moment[piece] = shifted + weight.mul_(exponent).sum(dim)
        self.total[piece] = factor * total + added
        self.largest[piece] = largest

    def merge(self, largest: Tensor, total: Tensor, moment: Tensor) -> None:
        """Add the sums of other columns of all anchors, which are relative to their own maximum."""
        before = self.largest
        self.largest = torch.maximum(before, largest)
        own, new = (before - self.largest) * self.slope, (largest - self.largest) * self.slope
        self.moment = own.exp2() * (self.moment + own * self.total) + new.exp2() * (moment + new * total)
        self.total = own.exp2() * self.total + new.exp2() * total

    def result(self, negatives: Tensor) -> Statistics:
        """Return ℓ, m and the mean pull from n; −inf and 0 for anchors without negatives."""
        shift = self.positive if self.margin is None else 0.0
        alone, ahead = negatives == 0, (self.largest - shift) / self.tau
        log_mean = ahead + self.total.log() - negatives.log()
        mean = ahead + self.moment / self.total / LOG2E if self.moments else torch.zeros_like(ahead)
        pull = None if self.margin is None else torch.where(alone, 0.0, self.pull / self.total)
        return Statistics(torch.where(alone, -torch.inf, log_mean), torch.where(alone, 0.0, mean), pull)
