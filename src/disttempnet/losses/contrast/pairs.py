"""What is contrasted: this rank's rows with all columns, and the weights and statistics of anchors.

Shapes: b local rows, B global columns, D width. A row i is an anchor (an image, or a text) whose exponents are
e_ij = (s_ij − s_ii) / τ_i, with the similarity s_ij = row_i · column_j.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from disttempnet import distributed
from disttempnet.losses.sample_state import multiplicity

EXCLUDED = -1e20  # similarity of what does not count: its exp is 0, and 0 · −1e20 is 0 where 0 · −inf would be NaN
LOG2E = math.log2(math.e)  # exponents are in base 2: torch's exp2 takes a third of the time of its exp on a CPU


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


class BatchPairs(NamedTuple):
    """What is contrasted: this rank's unit features [b, D] with those of all ranks [B, D], of one dtype.

    Attributes:
        own: place of the first local row among all.
        ids: int64 [B], of all. Columns whose id equals the row's are no negatives and are left out; None: all count.
        distinct: ids are known to differ, so that only the pair itself is left out; False is always right.
        kernel: whether the GPU kernels compute (`backend.use_kernel`).
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
    ) -> tuple[BatchPairs, Tensor]:
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


def rounded(features: Tensor, kernel: bool) -> Tensor:
    """The features that are contrasted, no gradient: as they are, or as the kernels see them, in bf16."""
    return features.detach().bfloat16() if kernel else features.detach()
