"""What training and tools ask of data: samples with dense ids, in groups that lie together.

Sample id = position in the source: the same in every epoch, every run and every world size. A source is pickled into
loader workers, so it holds paths and mappings, not content.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

OK = 0  # the status of a usable sample
BYTE_ORDER_MARK = "\ufeff"
# no-width space and joiners, directions, soft hyphen: nothing else is no caption
INVISIBLE = f"{BYTE_ORDER_MARK}\u200b\u200c\u200d\u200e\u200f\u2060\u00ad"


class UnreadableCaption(ValueError):
    """A sample without a caption that could be used; the message says why."""


class Source(ABC):
    """Samples: image bytes and captions by id.

    Attributes:
        where: folder, file or pattern, for messages.
        status: uint8 [N]; 0 = usable, else what is wrong.
        first: int64 [G + 1], id of the first sample of each group (a shard, a row group, all of a folder), then N.
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
        """Those of this and of every source that it is put together from."""
        return frozenset({self.digest})

    @abstractmethod
    def image_bytes(self, sample: int) -> bytes:
        """The encoded image. Raises UserError where what was indexed is gone."""

    @abstractmethod
    def captions(self, sample: int) -> tuple[str, ...]:
        """The captions of a sample, at least one, none empty. Raises UnreadableCaption."""

    @abstractmethod
    def name(self, sample: int) -> str:
        """What a sample is called where it lies, for messages: `SHARD.tar:KEY`."""

    @abstractmethod
    def problems(self, names: int = 3) -> str:
        """One line a reason why samples are left out, with the first few names; empty if all are usable."""

    @abstractmethod
    def reason(self, sample: int) -> str:
        """Why a sample is not usable, in words."""

    @abstractmethod
    def hashes(self) -> NDArray[np.uint64]:
        """uint64 [N], of what each sample is, as far as that can be told without reading it: the same in any order."""

    def notes(self) -> list[str]:
        """How the data was read, where that had to be found out, a line each."""
        return []

    def metadata(self, sample: int) -> dict[str, Any] | None:
        """What else is known of a sample; None where nothing is."""
        return None

    def close(self) -> None:  # noqa: B027 (nothing to do where no files are kept open)
        """Give open files back; a later read opens them again."""

    @property
    def shares(self) -> tuple[tuple[int, float], ...]:
        """(groups, weight) of each place that samples come from, in order of ids: an epoch reads each of its samples
        weight times on average."""
        return ((len(self.first) - 1, 1.0),)

    def __len__(self) -> int:
        return len(self.status)

    @cached_property
    def usable_counts(self) -> NDArray[np.int64]:
        """int64 [G]: usable samples of each group."""
        counts = [np.count_nonzero(self.status[a:b] == OK) for a, b in pairwise(self.first)]
        return np.array(counts, dtype=np.int64)

    @property
    def usable(self) -> NDArray[np.int64]:
        """Ids of all usable samples, ascending."""
        return np.flatnonzero(self.status == OK)

    def usable_in(self, group: int) -> NDArray[np.int64]:
        """Ids of the usable samples of one group, ascending."""
        first, end = self.first[group : group + 2]
        return np.flatnonzero(self.status[first:end] == OK) + first

    def group_of(self, sample: int) -> int:
        """Number of the group that a sample is in. Raises IndexError."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample id {sample} is not in [0, {len(self)})")
        return int(np.searchsorted(self.first, sample, side="right")) - 1


def bare(text: str) -> str:
    """A caption without white space and byte-order marks around it; empty where no character of it can be seen."""
    text = text.strip()
    if text.isascii():
        return text
    while text != (less := text.strip(BYTE_ORDER_MARK).strip()):
        text = less
    return text if text.strip(INVISIBLE) else ""


def hash_of(text: str) -> int:
    """64 bits that look random, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """64 bits each that look random, others for other values (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def usable_captions(texts: Sequence[bytes | str]) -> tuple[str, ...]:
    """Captions, see `bare`, without the empty ones. Raises UnreadableCaption: not UTF-8, or none is left."""
    try:
        # a .json can hold half of a surrogate pair, which no tokenizer takes: encoding finds it
        encoded = [text if isinstance(text, bytes) else text.encode("utf-8") for text in texts]
        found = [bare(text.decode("utf-8")) for text in encoded]
    except UnicodeError:
        raise UnreadableCaption("caption is not UTF-8") from None
    if not any(found):
        raise UnreadableCaption("empty caption")
    return tuple(text for text in found if text)
