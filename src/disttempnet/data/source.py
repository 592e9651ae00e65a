"""Interface of a data source: samples with dense ids, in groups that are stored together.

Sample id = position in the source: the same in every epoch, every run and at every world size. A source is pickled into
loader workers, so it holds paths and memory maps, not content.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

OK = 0  # the status of a usable sample
MAX_TEXT = 1 << 24  # bytes of a caption or a .json; larger files are neither
BYTE_ORDER_MARK = "\ufeff"
# zero-width space and joiners, text directions, soft hyphen: a caption of these alone is empty
INVISIBLE = f"{BYTE_ORDER_MARK}\u200b\u200c\u200d\u200e\u200f\u2060\u00ad"


class UnreadableCaption(ValueError):
    """Sample without a usable caption; the message gives the reason."""


class Source(ABC):
    """Samples: image bytes and captions by id.

    Attributes:
        where: folder, file or pattern, for messages.
        status: uint8 [N]; 0 = usable, else a code for the reason. A source made of other sources has none and
            overrides `status_of`, `usable`, `usable_in`, `usable_counts` and `__len__`.
        first: int64 [G + 1], id of the first sample of each group (a shard, a row group, a run of rows), then N.
            Samples of a group are read together: the epoch plan shuffles groups, then windows of samples.
        digest: hex; equal digests mean equal samples under equal ids.
    """

    where: str
    status: NDArray[np.uint8]
    first: NDArray[np.int64]

    @property
    @abstractmethod
    def digest(self) -> str: ...

    @property
    def digests(self) -> frozenset[str]:
        """Digests of this source and of every source that it is made of."""
        return frozenset({self.digest})

    @abstractmethod
    def image_bytes(self, sample: int) -> bytes:
        """Return the encoded image. Raises UserError if the indexed data is gone."""

    @abstractmethod
    def captions(self, sample: int) -> tuple[str, ...]:
        """Return the captions of a sample, at least one, none empty. Raises UnreadableCaption."""

    @abstractmethod
    def name(self, sample: int) -> str:
        """Return the name of a sample in its file, for messages: `SHARD.tar:KEY`."""

    @abstractmethod
    def problems(self, names: int = 3) -> str:
        """Return a line for each reason why samples are left out, with the first names; empty if all are usable."""

    @abstractmethod
    def reason(self, sample: int) -> str:
        """Return the reason why a sample is not usable, in words."""

    @abstractmethod
    def hashes(self) -> NDArray[np.uint64]:
        """Return a hash of the identity of each sample, uint64 [N]: independent of the order of samples."""

    def notes(self) -> list[str]:
        """Return a line for each property of the data that was detected, not configured."""
        return []

    def metadata(self, sample: int) -> dict[str, Any] | None:
        """Return the other fields of a sample; None if it has none."""
        return None

    def close(self) -> None:  # noqa: B027 (a source without open files has nothing to do)
        """Close open files; a later read opens them again."""

    @property
    def shares(self) -> tuple[tuple[int, float], ...]:
        """(groups, weight) of each part, in order of ids; weight: reads of a sample in an epoch, on average."""
        return ((len(self.first) - 1, 1.0),)

    def __len__(self) -> int:
        return len(self.status)

    def status_of(self, sample: int) -> int:
        """Return the status of one sample, without a look at all others."""
        return int(self.status[sample])

    @cached_property
    def usable_counts(self) -> NDArray[np.int64]:
        """Number of usable samples of each group, int64 [G]."""
        counts = [np.count_nonzero(self.status[a:b] == OK) for a, b in pairwise(self.first)]
        return np.array(counts, dtype=np.int64)

    @property
    def usable(self) -> NDArray[np.int64]:
        """Ids of all usable samples, ascending, int64."""
        return np.flatnonzero(self.status == OK)

    def usable_in(self, group: int) -> NDArray[np.int64]:
        """Return the ids of the usable samples of a group, ascending, int64."""
        first, end = self.first[group : group + 2]
        return np.flatnonzero(self.status[first:end] == OK) + first

    def group_of(self, sample: int) -> int:
        """Return the group of a sample. Raises IndexError."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample id {sample} is not in [0, {len(self)})")
        return int(np.searchsorted(self.first, sample, side="right")) - 1


class IndexedSource(Source):
    """Source that one index describes: its status is a code for each sample.

    Attributes:
        reasons: the reason in words for each code.
    """

    reasons: ClassVar[Sequence[str]]

    def reason(self, sample: int) -> str:
        return self.reasons[self.status[sample]]

    def left_out(self, names: int = 3) -> list[tuple[str, int, list[str]]]:
        """Return (reason, number of samples, first names) of unusable samples, by code."""
        found = []
        for code in np.unique(self.status[self.status != OK]):
            samples = np.flatnonzero(self.status == code)
            found.append((self.reasons[code], len(samples), [self.name(int(sample)) for sample in samples[:names]]))
        return found

    def problems(self, names: int = 3) -> str:
        lines = []
        for reason, samples, shown in self.left_out(names):
            more = ", …" if samples > len(shown) else ""
            lines.append(f"{samples:,} samples left out, {reason}: {', '.join(shown)}{more}")
        return "\n".join(lines)


def visible_text(text: str) -> str:
    """Return a caption without surrounding white space and byte-order marks; empty if no character is visible."""
    text = text.strip()
    if text.isascii():
        return text
    while text != (less := text.strip(BYTE_ORDER_MARK).strip()):
        text = less
    return text if text.strip(INVISIBLE) else ""


def hash_of(text: str) -> int:
    """Return 64 pseudo-random bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def mix_bits(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return 64 pseudo-random bits for each value, a bijection (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def usable_captions(texts: Sequence[bytes | str]) -> tuple[str, ...]:
    """Return the captions with visible text, stripped. Raises UnreadableCaption: not UTF-8, or none is left."""
    try:
        # a .json can hold half of a surrogate pair, which no tokenizer accepts: encoding raises
        encoded = [text if isinstance(text, bytes) else text.encode("utf-8") for text in texts]
        found = [visible_text(text.decode("utf-8")) for text in encoded]
    except UnicodeError:
        raise UnreadableCaption("caption is not UTF-8") from None
    if not any(found):
        raise UnreadableCaption("empty caption")
    return tuple(text for text in found if text)
