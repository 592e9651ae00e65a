"""Contrast of local rows with all columns, in blocks: statistics of the anchors and the closed-form feature gradient.

Shapes: b local rows, B global columns, D width. Only blocks of the b × B similarities s_ij = row_i · column_j exist at
a time, so memory grows with the batch, not with its square; where all of them fit into `KEPT_BYTES` they are kept for
the gradient. Nothing here is differentiated: the gradient is a formula.

A row i is an anchor (an image, or a text) whose exponents are e_ij = (s_ij − s_ii) / τ_i. Where this rank's rows are
all rows (one process), the columns are the other side's anchors, and both sides share one block: 8·B²·D FLOP a step,
6·B²·D with kept similarities. Else each side has blocks of its own: 12·b·B·D FLOP a rank, 8·b·B·D with kept ones.

A second implementation for NVIDIA GPUs is in pairwise_triton.py; `use_kernel` says which one runs.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from disttempnet import distributed
from disttempnet.errors import UserError
from disttempnet.losses.sample_state import multiplicity

BLOCKS = {"cpu": (512, 1024), "cuda": (4096, 4096)}  # rows and columns: what a core's cache holds, what fills a GPU
KEPT_BYTES = 64 << 20  # of similarities that are kept for the gradient rather than computed again
EXCLUDED = -1e20  # similarity of what does not count: its exp is 0, and 0 · −1e20 is 0 where 0 · −inf would be NaN
LOG2E = math.log2(math.e)  # exponents are in base 2: torch's exp2 takes a third of the time of its exp on a CPU
KERNEL_SETTING = "DISTTEMPNET_KERNEL"  # environment: auto, torch, triton


class Statistics(NamedTuple):
    """Of anchors [b]: ℓ_i = log mean_j exp(e_ij) over the negatives, m_i = Σ_j softmax_ij e_ij (0 where not asked)."""

    log_mean: Tensor
    mean_exponent: Tensor


class Anchors(NamedTuple):
    """Weights of anchors as p = exp(s · slope + offset): slope 1/τ, offset −s_ii/τ − log u − log n; both [rows]."""

    slope: Tensor
    offset: Tensor

    @classmethod
    def of(cls, tau: Tensor, positive: Tensor, log_u: Tensor, negatives: Tensor) -> Anchors:
        offset = -positive / tau - log_u - negatives.log()
        return cls(1 / tau, torch.where(negatives > 0, offset, EXCLUDED))

    def rows(self, piece: slice) -> Anchors:
        return Anchors(self.slope[piece], self.offset[piece])


class Pairs(NamedTuple):
    """What is contrasted: this rank's unit features [b, D] with those of all ranks [B, D], of one dtype.

    Attributes:
        own: place of the first local row among all.
        ids: int64 [B], of all. Columns whose id equals the row's are no negatives and are left out; None: all count.
        distinct: ids are known to differ, so that only the pair itself is left out; False is always right.
        kernel: whether the GPU kernels compute (`use_kernel`).
    """

    image: Tensor
    text: Tensor
    all_image: Tensor
    all_text: Tensor
    own: int = 0
    ids: Tensor | None = None
    distinct: bool = False
    kernel: bool = False

    @classmethod
    def of(
        cls, local: tuple[Tensor, Tensor], everyone: tuple[Tensor, Tensor], ids: Tensor | None, kernel: bool
    ) -> tuple[Pairs, Tensor]:
        """Pairs of this rank's (image, text) and all ranks' features, and n of every row of the batch [B]."""
        size, own = len(everyone[0]), distributed.rank() * len(local[0])
        columns = everyone[0].new_full((size,), size)
        if ids is None:
            return cls(*local, *everyone, own, kernel=kernel), columns
        times = multiplicity(ids)
        # on a GPU the look would cost a synchronisation a step
        distinct = ids.device.type == "cpu" and bool((times == 1).all())
        return cls(*local, *everyone, own, ids, distinct, kernel), columns - times

    @property
    def mine(self) -> slice:
        """This rank's rows among all."""
        return slice(self.own, self.own + len(self.image))

    @property
    def whole(self) -> bool:
        """Whether the local rows are all rows."""
        return len(self.image) == len(self.all_image)


def use_kernel(embeddings: Tensor) -> bool:
    """Whether the GPU kernels of pairwise_triton.py compute this step: DISTTEMPNET_KERNEL says auto, torch or triton.

    auto: on a GPU that can run them, where the run is in half precision anyway (autocast, or half embeddings): the
    kernels round features to bf16. Call it before autocast is switched off.

    Raises:
        UserError: an unknown setting, or triton where it cannot run.
    """
    setting = os.environ.get(KERNEL_SETTING) or "auto"
    if setting not in ("auto", "torch", "triton"):
        raise UserError(f"{KERNEL_SETTING} must be auto, torch or triton, got '{setting}'")
    if setting == "torch" or (setting == "auto" and not embeddings.is_cuda):
        return False
    reason = _unusable(embeddings)
    if setting == "triton" and reason:
        raise UserError(f"{KERNEL_SETTING}=triton: {reason}")
    half = embeddings.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(embeddings.device.type)
    return not reason and (half or setting == "triton")


def _unusable(embeddings: Tensor) -> str:
    """Why the kernels cannot run here; empty where they can."""
    if not _triton_installed():
        return "triton is not installed"
    from disttempnet.losses import pairwise_triton

    return pairwise_triton.unusable(embeddings)


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def rounded(features: Tensor, kernel: bool) -> Tensor:
    """The features that are contrasted, no gradient: as they are, or as the kernels see them, in bf16."""
    return features.detach().bfloat16() if kernel else features.detach()


def statistics(
    pairs: Pairs, positive: Tensor, taus: Tensor, negatives: Tensor, *, moments: bool, keep: bool
) -> tuple[list[Statistics], list[Tensor]]:
    """Statistics of this rank's image and text anchors, and what `pulls` may use again.

    Args:
        positive, negatives: s_ii and n_i [b].
        taus: [2, b], of image and text anchors; [1, b] where only those of images are wanted.
        moments: whether m is wanted.
        keep: whether a gradient will be asked for.

    A row without negatives has ℓ = −inf, m = 0.
    """
    sides = [_Running(tau, moments) for tau in taus]
    kept: list[Tensor] = []
    if pairs.kernel:
        from disttempnet.losses import pairwise_triton

        features = (pairs.image, pairs.all_text), (pairs.text, pairs.all_image)
        for side, (rows, others) in zip(sides, features, strict=False):
            side.largest, side.total, side.moment = pairwise_triton.row_statistics(rows, others, side.slope, pairs)
    else:
        size = pairs.image.element_size() * len(pairs.image) * len(pairs.all_image) * (1 if pairs.whole else 2)
        keep = keep and size <= KEPT_BYTES
        scratch = [_block_memory(pairs) for _ in range(1 + moments)]
        for r, c, s in _similarities(pairs.image, pairs.all_text, pairs, [], kept if keep else None):
            sides[0].add(s, 1, r, scratch)
            if pairs.whole and len(sides) == 2:
                sides[1].add(s, 0, c, scratch)
        if not pairs.whole and len(sides) == 2:
            for r, _, s in _similarities(pairs.text, pairs.all_image, pairs, [], kept if keep else None):
                sides[1].add(s, 1, r, scratch)
    return [side.result(positive, negatives) for side in sides], kept


def pulls(pairs: Pairs, image: Anchors, text: Anchors, push: Tensor, kept: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Σ_j (p_ij + p'_ji) column_j − push_i · partner_i for every local row, image side and text side, each [b, D].

    p_ij is the weight that anchor i (a local row) gives to column j; p'_ji the weight that anchor j of the other
    modality, on whichever rank, gives to row i. Both come from the same similarity s_ij.

    Args:
        image, text: anchors of the global batch [B].
        push: [b], what the positive pair weighs.
        kept: from `statistics`.
    """
    if pairs.kernel and pairs.ids is None:  # the pair's own weight nearly cancels: not through bf16
        push = push - _own_weight(pairs, image) - _own_weight(pairs, text)
    image_pull, text_pull = pairs.text * -push[:, None], pairs.image * -push[:, None]
    if pairs.kernel:
        from disttempnet.losses import pairwise_triton

        pairwise_triton.pull(pairs.image, pairs.all_text, image.rows(pairs.mine), text, pairs, image_pull)
        pairwise_triton.pull(pairs.text, pairs.all_image, text.rows(pairs.mine), image, pairs, text_pull)
        return image_pull, text_pull
    scratch = [_block_memory(pairs) for _ in range(2)]
    half = len(kept) // (1 if pairs.whole else 2)
    own = image.rows(pairs.mine)
    for r, c, s in _similarities(pairs.image, pairs.all_text, pairs, kept[:half], None):
        weight = _weights(s, own.rows(r), text.rows(c), scratch)
        image_pull[r].addmm_(weight, pairs.all_text[c])
        if pairs.whole:
            text_pull[c].addmm_(weight.T, pairs.all_image[r])
    if not pairs.whole:
        own = text.rows(pairs.mine)
        for r, c, s in _similarities(pairs.text, pairs.all_image, pairs, kept[half:], None):
            text_pull[r].addmm_(_weights(s, own.rows(r), image.rows(c), scratch), pairs.all_image[c])
    return image_pull, text_pull


def _own_weight(pairs: Pairs, anchors: Anchors) -> Tensor:
    """p_ii of this rank's anchors [b]."""
    own = anchors.rows(pairs.mine)
    return ((pairs.image * pairs.text).sum(1) * own.slope + own.offset).exp()


def blocks(rows: Tensor, columns: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of the rows and of the columns that cover all pairs, row after row."""
    high, wide = BLOCKS.get(rows.device.type, BLOCKS["cuda"])
    for top in range(0, len(rows), high):
        for left in range(0, len(columns), wide):
            yield slice(top, min(top + high, len(rows))), slice(left, min(left + wide, len(columns)))


def _block_memory(pairs: Pairs) -> Tensor:
    high, wide = BLOCKS.get(pairs.image.device.type, BLOCKS["cuda"])
    return pairs.image.new_empty(min(high, len(pairs.image)) * min(wide, len(pairs.all_image)))


def _similarities(
    rows: Tensor, columns: Tensor, pairs: Pairs, kept: list[Tensor], keep: list[Tensor] | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of s, excluded pairs at EXCLUDED; read from `kept`, or appended to `keep`, or all in the same memory."""
    memory = None if kept or keep is not None else _block_memory(pairs)
    for number, (r, c) in enumerate(blocks(rows, columns)):
        if kept:
            yield r, c, kept[number]
            continue
        out = None if memory is None else _shaped(memory, r, c)
        s = torch.mm(rows[r], columns[c].T, out=out)
        if pairs.ids is not None and pairs.distinct:
            s.diagonal(pairs.own + r.start - c.start).fill_(EXCLUDED)
        elif pairs.ids is not None:
            s.masked_fill_(pairs.ids[pairs.mine][r, None] == pairs.ids[c], EXCLUDED)
        if keep is not None:
            keep.append(s)
        yield r, c, s


def _shaped(memory: Tensor, r: slice, c: slice) -> Tensor:
    high, wide = r.stop - r.start, c.stop - c.start
    return memory[: high * wide].view(high, wide)


def _weights(s: Tensor, rows: Anchors, columns: Anchors, scratch: list[Tensor]) -> Tensor:
    """p_ij + p'_ji of a block; two passes and an exp2 each."""
    mine, theirs = (memory[: s.numel()].view(s.shape) for memory in scratch)
    torch.mul(s, LOG2E * rows.slope[:, None], out=mine).add_(LOG2E * rows.offset[:, None]).exp2_()
    torch.mul(s, LOG2E * columns.slope, out=theirs).add_(LOG2E * columns.offset).exp2_()
    return mine.add_(theirs)


class _Running:
    """Log-sum-exp and moment of anchors [n], block after block: exponents (s − largest) / τ, in base 2."""

    def __init__(self, tau: Tensor, moments: bool) -> None:
        self.tau, self.moments, self.slope = tau, moments, LOG2E / tau
        self.largest = torch.full_like(tau, EXCLUDED)
        self.total, self.moment = torch.zeros_like(tau), torch.zeros_like(tau)

    def add(self, s: Tensor, dim: int, piece: slice, scratch: list[Tensor]) -> None:
        """A block of s whose anchors are the given piece; they are summed over dimension `dim`."""
        before, slope, total = self.largest[piece], self.slope[piece], self.total[piece]
        largest = torch.maximum(before, s.amax(dim))
        step = (before - largest) * slope
        factor = step.exp2()
        exponent, weight = (memory[: s.numel()].view(s.shape) for memory in (scratch[0], scratch[-1]))
        torch.sub(s, largest.unsqueeze(dim), out=exponent).mul_(slope.unsqueeze(dim))
        torch.exp2(exponent, out=weight)
        added = weight.sum(dim)
        if self.moments:
            shifted = factor * (self.moment[piece] + step * total)
            self.moment[piece] = shifted + weight.mul_(exponent).sum(dim)
        self.total[piece] = factor * total + added
        self.largest[piece] = largest

    def result(self, positive: Tensor, negatives: Tensor) -> Statistics:
        alone, ahead = negatives == 0, (self.largest - positive) / self.tau
        log_mean = ahead + self.total.log() - negatives.log()
        mean = ahead + self.moment / self.total / LOG2E if self.moments else torch.zeros_like(ahead)
        return Statistics(torch.where(alone, -torch.inf, log_mean), torch.where(alone, 0.0, mean))
