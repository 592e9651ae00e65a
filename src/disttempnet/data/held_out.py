"""Source without the samples that are held out for validation.

A hash of a sample's identity decides whether it is held out; order, seed, epoch and world size do not. So their number
is random: of 200 samples a tenth is 20 ± 4. In shards the identity is the shard's name and the sample's byte offset, in
a listing the image that the row names, so that rows of one image stay together. Ids, and with them per-sample state,
are those of the whole source. Held-out samples are never drawn, like unusable ones.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from disttempnet.data.source import Source
from disttempnet.errors import UserError

HELD_OUT = 255  # a status; the codes of the sources are lower


class HeldOut(Source):
    """Training samples of a source, without the held-out ones.

    Args:
        base: all samples.
        share: fraction of the usable samples to hold out, about: each sample is decided by its own hash.

    Attributes:
        held_out: ids of the held-out samples, int64.

    Raises:
        UserError: no sample is held out, or none is left.
    """

    def __init__(self, base: Source, share: float) -> None:
        self.base, self.share = base, share
        self.where, self.first = base.where, base.first
        usable = base.usable
        self.held_out = usable[base.hashes()[usable] < np.uint64(share * 2.0**64)]
        left = len(usable) - len(self.held_out)
        if not len(self.held_out) or not left:
            few = "none" if left else "all"
            raise UserError(
                f"data.validation = {share:g} holds out {few} of the {len(usable):,} usable samples of "
                f"{self.where}: {'raise' if left else 'lower'} it, or name a source of its own"
            )
        self._is_held_out = np.zeros(len(base), dtype=bool)
        self._is_held_out[self.held_out] = True

    def __len__(self) -> int:
        return len(self.base)

    def status_of(self, sample: int) -> int:
        return HELD_OUT if self._is_held_out[sample] else self.base.status_of(sample)

    @cached_property
    def usable_counts(self) -> NDArray[np.int64]:
        held_out = np.diff(np.searchsorted(self.held_out, self.first))  # int64 [G]
        return self.base.usable_counts - held_out

    @property
    def usable(self) -> NDArray[np.int64]:
        return self._training_part(self.base.usable)

    def usable_in(self, group: int) -> NDArray[np.int64]:
        return self._training_part(self.base.usable_in(group))

    def _training_part(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return ids[~self._is_held_out[ids]]

    @property
    def digest(self) -> str:
        """Digest of all samples: ids mean the same samples as without validation."""
        return self.base.digest

    @property
    def digests(self) -> frozenset[str]:
        return self.base.digests

    @property
    def shares(self) -> tuple[tuple[int, float], ...]:
        return self.base.shares

    def hashes(self) -> NDArray[np.uint64]:
        return self.base.hashes()

    def image_bytes(self, sample: int) -> bytes:
        return self.base.image_bytes(sample)

    def captions(self, sample: int) -> tuple[str, ...]:
        return self.base.captions(sample)

    def name(self, sample: int) -> str:
        return self.base.name(sample)

    def metadata(self, sample: int) -> dict[str, Any] | None:
        return self.base.metadata(sample)

    def reason(self, sample: int) -> str:
        return "held out for validation" if self._is_held_out[sample] else self.base.reason(sample)

    def notes(self) -> list[str]:
        held, usable = len(self.held_out), int(self.base.usable_counts.sum())
        how = "each image is drawn by a hash of its own, so that more data move none"
        share = f"{held:,} of {usable:,} ({100 * held / usable:.1f} %)"
        return [*self.base.notes(), f"data.validation = {self.share:g} holds out {share}: {how}"]

    def problems(self, names: int = 3) -> str:
        return self.base.problems(names)

    def close(self) -> None:
        self.base.close()
