"""Features of the samples of a source, in memory-mapped shards on disk.

    FOLDER/SIDE-0123456789abcdef/       named after the digest of all that the features depend on
        about.json                      that, in full, with width, dtype and samples a shard
        shard-00000.safetensors         features [rows, F]; texts: first [n + 1], where a sample's rows begin

A shard holds consecutive sample ids. It appears complete or not at all, so a build that was killed goes on with the
next missing one. Its header has a CRC-32 of everything behind it, and the reason for each unreadable sample.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from disttempnet import distributed
from disttempnet.errors import UserError
from disttempnet.io.files import DISK_IS_FULL, atomic, write_atomically

FORMAT = 1
STORE_ABOUT = "about.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16}
LEAST_ROWS, MOST_ROWS, SHARDS = 512, 16384, 32  # samples a shard: a build that is killed loses one, a batch reads many
VERIFY_BYTES = 8 << 20  # bytes that are read at a time
READERS = 4  # threads that verify

CACHE_ELSEWHERE = "name another folder with train.cache_folder"

Choose = Callable[[int, int], int]  # (sample id, its number of captions) → which of them


class MappedFeatures(NamedTuple):
    """Memory-mapped features [rows, F], and where each sample's rows begin [n + 1]; None: a row a sample."""

    features: NDArray[Any]
    first: NDArray[np.int64] | None


@dataclass(frozen=True)
class FeatureStore:
    """Features by sample id.

    Attributes:
        folder: where the shards are.
        facts: all that the features depend on: plain values.
        samples: N of the source.
        width: F.
        dtype: `float32` or `float16`, on disk; features are handed out in float32.
        rows: samples a shard.
        elsewhere: how a user names another folder, for messages.
    """

    folder: Path
    facts: Mapping[str, Any]
    samples: int
    width: int
    dtype: str
    rows: int
    elsewhere: str = CACHE_ELSEWHERE

    def path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def ids(self, number: int) -> range:
        """Sample ids of a shard."""
        return range(number * self.rows, min((number + 1) * self.rows, self.samples))

    def shards(self, end: int | None = None) -> range:
        """Numbers of the shards that hold the ids below `end`; of all, where that is None."""
        return range(-(-(self.samples if end is None else end) // self.rows))

    @property
    def samples_there(self) -> int:
        """Number of samples whose shards are on disk."""
        return sum(len(self.ids(number)) for number in self.shards() if self.path(number).is_file())

    # writing

    def create(self) -> None:
        """Make the folder; one that is there must be of the same features."""
        about = {"format": FORMAT, "samples": self.samples, "width": self.width, "dtype": self.dtype}
        about |= {"rows": self.rows, "facts": dict(self.facts)}
        path = self.folder / STORE_ABOUT
        with cache_error_named(self.folder, self.elsewhere):
            if not path.is_file():
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(path, json.dumps(about, indent=1) + "\n")
            try:
                found = json.loads(path.read_bytes())
            except ValueError:
                found = None
        if found != json.loads(json.dumps(about)):
            raise UserError(f"{path}: is not what was written: remove {self.folder}, its features are embedded anew")

    def write(self, number: int, features: Tensor, first: Tensor | None, unreadable: Mapping[int, str]) -> None:
        """Write one shard, complete or not at all.

        Args:
            features: [rows, F] of any floating type.
            first: int64 [n + 1], of texts.
            unreadable: sample id → why it has no features.

        Raises:
            UserError: the disk takes no more, or float16 does not hold the features.
        """
        kept = features.to(DTYPES[self.dtype]).contiguous()
        if not kept.isfinite().all():
            why = "the tower gives features that are not finite"
            if features.isfinite().all():
                why = 'its features are too large for float16: set train.cache_dtype = "float32"'
            raise UserError(f"{self.path(number)}: not written: {why}")
        tensors = {"features": kept} | ({} if first is None else {"first": first})
        reasons = json.dumps({str(sample): why for sample, why in unreadable.items()})
        # the same tensors give the same bytes: their checksum can stand in the header before them
        header, data = _parts(save(tensors))
        checksum = _checksum(header, reasons, zlib.crc32(data))
        content = save(tensors, metadata={"unreadable": reasons, "crc32": str(checksum)})
        with cache_error_named(self.path(number), self.elsewhere), atomic(self.path(number)) as temporary:
            temporary.write_bytes(content)

    # reading

    def verify(self, end: int | None = None) -> None:
        """Read all shards of the ids below `end` once; the ranks share the reading, and all raise.

        Raises:
            UserError: a shard is missing or damaged.
        """
        mine = self.shards(end)[distributed.rank() :: distributed.world_size()]

        def read() -> dict[int, str]:
            with ThreadPoolExecutor(READERS) as pool:
                return {sample: why for reasons in pool.map(self._verified, mine) for sample, why in reasons.items()}

        for reasons in distributed.gather_objects(distributed.together(read)):
            self._unreadable.update(reasons)

    @cached_property
    def _unreadable(self) -> dict[int, str]:
        return {}

    @property
    def unreadable(self) -> Mapping[int, str]:
        """Sample id → why it has no features, of the shards that were verified."""
        return self._unreadable

    def _verified(self, number: int) -> dict[int, str]:
        """The unreadable samples of a shard, after every byte of it was compared with its checksum."""
        path = self.path(number)
        again = f"remove it, and it is embedded anew ({self.folder})"
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
                checksum = 0
                while piece := file.read(VERIFY_BYTES):
                    checksum = zlib.crc32(piece, checksum)
            metadata = header.pop("__metadata__")
            whole = str(_checksum(header, metadata["unreadable"], checksum)) == metadata["crc32"]
            whole &= header["features"]["shape"][1] == self.width
            reasons = {int(sample): str(why) for sample, why in json.loads(metadata["unreadable"]).items()}
        except FileNotFoundError:
            raise UserError(f"{path}: is gone: the next start embeds it anew") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, MemoryError):
            raise UserError(f"{path}: damaged: {again}") from None
        if not whole:
            raise UserError(f"{path}: damaged: it is not what was written: {again}")
        return reasons

    def read(self, ids: NDArray[np.int64], choose: Choose | None = None) -> Tensor:
        """Features of samples, float32 [b, F], in the order of `ids`.

        Args:
            ids: sample ids.
            choose: which of the captions, where a sample has several; None takes the first.
        """
        # samples of one shard are read together: positions [b], ordered by shard
        numbers, local = np.divmod(ids, self.rows)
        order = np.argsort(numbers, kind="stable")
        ends = np.flatnonzero(np.diff(numbers[order])) + 1
        result = np.empty((len(ids), self.width), dtype=self.dtype)
        for begin, end in pairwise([0, *ends.tolist(), len(ids)]):
            places = order[begin:end]
            shard = self._shard(int(numbers[places[0]]))
            rows = local[places]
            if shard.first is not None:
                rows = self._caption_rows(shard.first, rows, ids[places], choose)
            result[places] = shard.features[rows]
        return torch.from_numpy(result).float()

    def by_shard(self, usable: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Yield ids [n] and features, float32 [n, F], of the verified samples; no shard stays mapped.

        Args:
            usable: bool [N]; samples that are not, and unreadable ones, are left out.
        """
        for number in self.shards():
            ids = [sample for sample in self.ids(number) if usable[sample] and sample not in self._unreadable]
            if ids:
                order = np.array(ids, np.int64)
                yield order, self.read(order)
                self._open.pop(number, None)

    @staticmethod
    def _caption_rows(
        first: NDArray[np.int64], local: NDArray[np.int64], ids: NDArray[np.int64], choose: Choose | None
    ) -> NDArray[np.int64]:
        """Rows of a shard [n], of one caption of each sample."""
        rows, counts = first[local], first[local + 1] - first[local]
        if choose is not None:
            for place in np.flatnonzero(counts > 1).tolist():
                rows[place] += choose(int(ids[place]), int(counts[place]))
        return rows

    def _shard(self, number: int) -> MappedFeatures:
        shard = self._open.get(number)
        if shard is None:
            try:
                tensors = load_file(self.path(number))  # memory-mapped; the file is closed again
            except (OSError, SafetensorError) as error:
                raise UserError(f"{self.path(number)}: cannot be read: {error}") from None
            first = tensors["first"].numpy() if "first" in tensors else None
            if first is not None and np.array_equal(first, np.arange(len(first))):
                first = None  # one caption each
            shard = self._open[number] = MappedFeatures(tensors["features"].numpy(), first)
        return shard

    @cached_property
    def _open(self) -> dict[int, MappedFeatures]:
        return {}


def store_in(
    parent: Path, facts: Mapping[str, Any], samples: int, width: int, dtype: str, elsewhere: str = CACHE_ELSEWHERE
) -> FeatureStore:
    """The store of these features below a folder; it may not be there yet.

    Args:
        facts: all that the features depend on, with `side`.
        samples, width, dtype, elsewhere: see `FeatureStore`.
    """
    digest = features_digest([facts, samples, width, dtype, FORMAT])
    folder = parent / f"{facts['side']}-{digest}"
    try:  # one that is there stays as it was begun
        rows = int(json.loads((folder / STORE_ABOUT).read_bytes())["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        rows = 1 << (max(LEAST_ROWS, min(MOST_ROWS, samples // SHARDS)) - 1).bit_length()
    return FeatureStore(folder, facts, samples, width, dtype, max(1, rows), elsewhere)


def features_digest(facts: Any) -> str:
    """Hex digest of plain values."""
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()


def _parts(content: bytes) -> tuple[dict[str, Any], memoryview]:
    """Header and data of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), memoryview(content)[8 + length :]


def _checksum(header: Mapping[str, Any], reasons: str, data: int) -> int:
    """CRC-32 of a shard: of its data, its unreadable samples, and where its tensors lie."""
    tensors = json.dumps({name: header[name] for name in sorted(header)}, sort_keys=True)
    return zlib.crc32(tensors.encode(), zlib.crc32(reasons.encode(), data))


def refuse_small_disk(folder: Path, needed: int, about: str, advice: str) -> None:
    """Raise UserError where a folder's disk has no room for so many bytes of features."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"{folder}: {about} take {needed / 1e9:,.2f} GB and {free / 1e9:,.2f} GB are free there: "
            f"free some, {advice}"
        )


@contextmanager
def cache_error_named(path: Path, elsewhere: str) -> Iterator[None]:
    """Inside, an OSError ends in a UserError that says what could not be written, and why."""
    try:
        yield
    except OSError as error:
        full = error.errno in DISK_IS_FULL
        advice = f"free some room (finished shards are kept), or {elsewhere}" if full else elsewhere
        raise UserError(f"{path}: features cannot be written: {error.strerror}: {advice}") from None
