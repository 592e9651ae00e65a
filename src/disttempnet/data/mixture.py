"""Mixture of sources: their ids one after another, each source read as often as its weight says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from disttempnet.data.source import Source


class MixedSource(Source):
    """Samples of several sources; part p has the ids from `offsets[p]` on, in its own order.

    Args:
        parts: the sources.
        weights: how often an epoch reads each sample of a part, on average.

    Attributes:
        offsets: int64 [P + 1], id of the first sample of each part, then N.
    """

    def __init__(self, parts: Sequence[Source], weights: Sequence[float]) -> None:
        self.parts, self.weights = tuple(parts), tuple(weights)
        self.where = ", ".join(part.where for part in parts)
        self.offsets = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)
        groups = [part.first[:-1] + offset for part, offset in zip(self.parts, self.offsets[:-1], strict=True)]
        self.first = np.concatenate([*groups, self.offsets[-1:]])
        self._groups = np.cumsum([0, *(len(part.first) - 1 for part in parts)], dtype=np.int64)

    @cached_property
    def digest(self) -> str:
        """Hash of the parts' digests and weights: both decide which samples a step has seen."""
        parts = [[part.digest, weight] for part, weight in zip(self.parts, self.weights, strict=True)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def digests(self) -> frozenset[str]:
        return frozenset({self.digest}).union(*(part.digests for part in self.parts))

    @property
    def shares(self) -> tuple[tuple[int, float], ...]:
        return tuple(zip(np.diff(self._groups).tolist(), self.weights, strict=True))

    @cached_property
    def usable_counts(self) -> NDArray[np.int64]:
        return np.concatenate([part.usable_counts for part in self.parts])

    @property
    def usable(self) -> NDArray[np.int64]:
        parts = zip(self.parts, self.offsets[:-1], strict=True)
        return np.concatenate([part.usable + offset for part, offset in parts])

    def status_of(self, sample: int) -> int:
        part, own = self._locate(sample)
        return self.parts[part].status_of(own)

    def image_bytes(self, sample: int) -> bytes:
        part, own = self._locate(sample)
        return self.parts[part].image_bytes(own)

    def captions(self, sample: int) -> tuple[str, ...]:
        part, own = self._locate(sample)
        return self.parts[part].captions(own)

    def name(self, sample: int) -> str:
        part, own = self._locate(sample)
        return self.parts[part].name(own)

    def metadata(self, sample: int) -> dict[str, Any] | None:
        part, own = self._locate(sample)
        return self.parts[part].metadata(own)

    def hashes(self) -> NDArray[np.uint64]:
        return np.concatenate([part.hashes() for part in self.parts])

    def reason(self, sample: int) -> str:
        part, own = self._locate(sample)
        return self.parts[part].reason(own)

    def notes(self) -> list[str]:
        return [f"{part.where}: {note}" for part in self.parts for note in part.notes()]

    def problems(self, names: int = 3) -> str:
        found = [(part.where, part.problems(names)) for part in self.parts]
        return "\n".join(f"{where}: {line}" for where, lines in found for line in lines.splitlines())

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def usable_in(self, group: int) -> NDArray[np.int64]:
        part = int(np.searchsorted(self._groups, group, side="right")) - 1
        return self.parts[part].usable_in(group - int(self._groups[part])) + self.offsets[part]

    def _locate(self, sample: int) -> tuple[int, int]:
        """Return (part, id in the part) of a sample. Raises IndexError."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample id {sample} is not in [0, {len(self)})")
        part = int(np.searchsorted(self.offsets, sample, side="right")) - 1
        return part, sample - int(self.offsets[part])
