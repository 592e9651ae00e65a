"""Pairs of a batch, and the weights and statistics of their anchors.

Shapes: b local rows, B global columns, D width. A row i is an anchor (an image, or a text) whose exponents are
e_ij = d_ij / τ_i, d_ij = s_ij − s_ii, with the similarity s_ij = row_i · column_j. In the hinge form of margin m they
are e_ij = [d_ij + m]₊² / τ_i, and a weight p_ij pulls with 2 [d_ij + m]₊ p_ij.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from disttempnet import distributed
from disttempnet.losses.sample_state import multiplicity

EXCLUDED = -1e20  # similarity of an excluded pair: its exp is 0, and 0 · −1e20 is 0 where 0 · −inf would be NaN
LOG2E = math.log2(math.e)  # exponents are in base 2: torch's exp2 takes a third of the time of its exp on a CPU


class Statistics(NamedTuple):
    """Statistics of anchors [b] over their negatives j.

    Attributes:
        log_mean: ℓ_i = log mean_j exp(e_ij).
        mean_exponent: m_i = Σ_j softmax_ij e_ij; 0 where it was not requested.
        mean_pull: Σ_j softmax_ij 2 [d_ij + m]₊ of the hinge form; None of the linear one, where it is 1.
    """

    log_mean: Tensor
    mean_exponent: Tensor
    mean_pull: Tensor | None = None


class Anchors(NamedTuple):
    """Weights of anchors in the form p = exp(s · slope + offset), with [d + m]₊² for s in the hinge form.

    Attributes:
        slope: 1/τ, [rows]; with `of`, [2, rows] holds image and text anchors.
        offset: −s_ii/τ − log u − log n, of the same shape; in the hinge form without s_ii.
    """

    slope: Tensor
    offset: Tensor

    @classmethod
    def of(cls, tau: Tensor, positive: Tensor, log_u: Tensor, negatives: Tensor) -> Anchors:
        """Build from τ, s_ii, log u and n, which broadcast; anchors without negatives get weight 0."""
        offset = -positive / tau - log_u - negatives.log()
        return cls(1 / tau, torch.where(negatives > 0, offset, EXCLUDED))

    def rows(self, piece: slice) -> Anchors:
        """Return the anchors of some rows."""
        return Anchors(self.slope[piece], self.offset[piece])


class Columns(NamedTuple):
    """Consecutive columns of the global batch: features of both sides [n, D], and the index of the first.

    They are of the dtype that they were sent in; a block of them is converted where it is multiplied.
    """

    image: Tensor
    text: Tensor
    start: int = 0

    def rows(self, piece: slice) -> slice:
        """Return the rows of the global batch that a slice of these columns stands for."""
        return slice(self.start + piece.start, self.start + piece.stop)


class BatchPairs(NamedTuple):
    """Unit features of this rank [b, D] and of all ranks [B, D], and the pairs that count.

    Attributes:
        image, text: of this rank.
        all_image, all_text: of all ranks; None where they come round block by block (`columns`).
        first_row: index of the first local row in the global batch.
        ids: int64 [B], of the global batch. Columns whose id equals the row's are no negatives and are left out;
            None: all columns count.
        distinct: ids are known to differ, so that only the pair itself is left out. False is always correct.
        kernel: whether the Triton kernels compute (`backend.use_kernel`).
        margin: m of the hinge form; None: the linear form.
        positive: s_ii of the global batch [B], where a gradient of the hinge form is computed.
        pulled: images and texts of all ranks [B, D'] that the weights multiply in the gradient, where these are not the
            features that are compared.
    """

    image: Tensor
    text: Tensor
    all_image: Tensor | None
    all_text: Tensor | None
    first_row: int = 0
    ids: Tensor | None = None
    distinct: bool = False
    kernel: bool = False
    margin: float | None = None
    positive: Tensor | None = None
    pulled: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(
        cls,
        local: tuple[Tensor, Tensor],
        everyone: tuple[Tensor | None, Tensor | None],
        ids: Tensor | None,
        kernel: bool,
        margin: float | None = None,
    ) -> tuple[BatchPairs, Tensor]:
        """Return the pairs of this rank's and all ranks' (image, text), and n of every row of the global batch [B].

        Args:
            local: this rank's features.
            everyone: those of all ranks; (None, None): the ranks hand them round.
            ids, kernel, margin: as the attributes.
        """
        gathered = everyone[0]
        size = distributed.world_size() * len(local[0]) if gathered is None else len(gathered)
        first_row = distributed.rank() * len(local[0])
        columns = local[0].new_full((size,), size)
        if ids is None:
            return cls(*local, *everyone, first_row, kernel=kernel, margin=margin), columns
        times = multiplicity(ids)
        # on a GPU this check would cost a synchronisation a step
        distinct = ids.device.type == "cpu" and bool((times == 1).all())
        return cls(*local, *everyone, first_row, ids, distinct, kernel, margin), columns - times

    @property
    def local(self) -> slice:
        """This rank's rows of the global batch."""
        return slice(self.first_row, self.first_row + len(self.image))

    @property
    def own_pull(self) -> tuple[Tensor, Tensor]:
        """Images and texts of this rank that the weights multiply in the gradient."""
        if self.pulled is None:
            return self.image, self.text
        image, text = (side[self.local].to(self.image.dtype) for side in self.pulled)
        return image, text

    @property
    def size(self) -> int:
        """B, the rows of the global batch."""
        return distributed.world_size() * len(self.image) if self.all_image is None else len(self.all_image)

    @property
    def single_rank(self) -> bool:
        """True where the local rows are the global batch."""
        return len(self.image) == self.size

    def columns(self) -> Iterator[Columns]:
        """Yield all columns: at once where they were gathered, else each rank's in turn, which every rank asks for."""
        if self.all_image is not None and self.all_text is not None:
            yield Columns(self.all_image, self.all_text)
            return
        for rank, (image, text) in distributed.ring(rounded(torch.stack([self.image, self.text]), self.kernel)):
            yield Columns(image, text, rank * len(self.image))


def rounded(features: Tensor, kernel: bool) -> Tensor:
    """Return detached features as they are contrasted: unchanged, or in bf16 where the kernels compute."""
    return features.detach().bfloat16() if kernel else features.detach()
