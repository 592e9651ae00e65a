"""A source without the samples that validation is measured on.

Which these are depends on what a sample is, not on order, seed, epoch or world size: in shards on the shard's name and
the byte at which the sample begins, in a listing on the image that its row names, so that rows of one image go
together. Ids, and with them per-sample state, stay what they are without validation; those that are held out are never
drawn, like samples that cannot be used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from disttempnet.data.source import OK, Source
from disttempnet.errors import UserError

HELD_OUT = 255  # a status; the sources' own are below


class HeldOut(Source):
    """The samples of a source that are trained on.

    Args:
        base: all samples.
        share: of its usable samples that are held out, about: each is by its own hash.

    Attributes:
        held_out: int64, their ids.

    Raises:
        UserError: none of so few samples is held out, or none is left.
    """

    def __init__(self, base: Source, share: float) -> None:
        self.base, self.share = base, share
        self.where, self.first = base.where, base.first
        status = base.status
        usable = status == OK
        self.held_out = np.flatnonzero(usable & (base.hashes() < np.uint64(share * 2.0**64)))
        left = int(usable.sum()) - len(self.held_out)
        if not len(self.held_out) or not left:
            few = "none" if left else "all"
            raise UserError(
                f"data.validation = {share:g} holds out {few} of the {int(usable.sum()):,} usable samples of "
                f"{self.where}: {'raise' if left else 'lower'} it, or name a source of its own"
            )
        self.status = status.copy()
        self.status[self.held_out] = HELD_OUT

    @property
    def digest(self) -> str:
        """That of all samples: equal ids mean the same samples as without validation."""
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
        return "held out for validation" if self.status[sample] == HELD_OUT else self.base.reason(sample)

    def notes(self) -> list[str]:
        held = f"{len(self.held_out):,} samples are held out for validation, and not trained on"
        return [*self.base.notes(), f"{held} (data.validation = {self.share:g})"]

    def problems(self, names: int = 3) -> str:
        return self.base.problems(names)

    def close(self) -> None:
        self.base.close()
