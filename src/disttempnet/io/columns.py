"""Memory-mapped columns: one file of named arrays, written atomically, in the format of safetensors.

The file is the length of the header (8 bytes), the header (JSON: metadata, and dtype, shape and bytes of each column),
then the columns one after another. The header is written last, into room reserved for it, so that columns of unknown
length can be streamed. Metadata are strings; `format` names the kind of file and its version.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from disttempnet.errors import UserError
from disttempnet.io.files import UnfitFile, is_device, open_regular, temporary_beside

COLUMN_DTYPES: dict[str, np.dtype[Any]] = {
    "I64": np.dtype("<i8"),
    "U32": np.dtype("<u4"),
    "U8": np.dtype("u1"),
}  # by name in safetensors
_LENGTH = 8  # bytes of the header's length


class ColumnType(NamedTuple):
    """Type of a column: one of `COLUMN_DTYPES`, and the shape of a row."""

    dtype: np.dtype
    row_shape: tuple[int, ...] = ()

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.dtype.itemsize * prod(self.row_shape)


class MappedColumns(NamedTuple):
    """Columns of a file, mapped read-only.

    Attributes:
        metadata: strings by name.
        columns: arrays by name; views of the mapping, which stay valid when the file is gone.
    """

    metadata: dict[str, str]
    columns: dict[str, NDArray[Any]]


def map_columns(path: Path, format: str, verify: bool = False) -> MappedColumns:
    """Map a file of columns into memory.

    Args:
        path: the file.
        format: expected value of the metadata `format`.
        verify: read the whole file and compare it with the checksum in its metadata.

    Raises:
        OSError: the file cannot be opened.
        ValueError: another format, not all of the file is there, or it is damaged; the message says which.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            # the header: metadata, and where each column lies
            size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(_LENGTH), "little")
            begin = _LENGTH + length
            if begin > size:
                raise ValueError("it is cut off, or no file of columns")
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__")
            if metadata["format"] != format:
                raise ValueError(f"its format is {metadata['format']}, not {format}")
            if size != begin + max(entry["data_offsets"][1] for entry in header.values()):
                raise ValueError("it is cut off")

            # the checksum covers the columns, and the header without it
            checksum = metadata.pop("checksum", None)
            if verify and _checksum(file, begin, {"__metadata__": metadata, **header}) != checksum:
                raise ValueError("it is damaged: its sha256 is not what it was when it was written")

            # views of one mapping; frombuffer gives plain arrays, which are faster to index than np.memmap
            mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            columns = {}
            for name, entry in header.items():
                dtype, shape = COLUMN_DTYPES[entry["dtype"]], entry["shape"]
                offset = begin + entry["data_offsets"][0]
                columns[name] = np.frombuffer(mapping, dtype, prod(shape), offset).reshape(shape)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"no header of columns: {error!r}") from None
    return MappedColumns(metadata, columns)


class ColumnWriter:
    """Columns on their way into a file, one after another.

    Args:
        file: open for reading and writing, empty: what it holds after an error is no file of columns.
        reserved: bytes for the header with its length, a multiple of 8.
    """

    def __init__(self, file: BinaryIO, reserved: int) -> None:
        self.file, self.reserved = file, reserved
        self._header: dict[str, dict[str, Any]] = {}
        self._end = 0  # of the last column, from the end of the header on
        file.write(bytes(reserved))

    def end_column(self, name: str, dtype: np.dtype, shape: Sequence[int]) -> None:
        """Declare the bytes that were written to `file` since the last column to be this column.

        Raises:
            ValueError: dtype and shape need another number of bytes.
        """
        begin, end = self._end, self.file.tell() - self.reserved
        needed = prod(shape) * dtype.itemsize
        if end - begin != needed:
            raise ValueError(f"column {name} has {end - begin:,} bytes, not {needed:,}")
        code = next(code for code, known in COLUMN_DTYPES.items() if known == dtype)
        self._header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
        self._end = end

    def add(self, name: str, values: NDArray[Any]) -> None:
        """Write a column at once."""
        self.file.write(np.ascontiguousarray(values).data)
        self.end_column(name, values.dtype, values.shape)

    def finish(self, metadata: Mapping[str, str], checksum: bool = False) -> None:
        """Write the header, and flush all of it to disk.

        Args:
            metadata: strings by name, `format` among them.
            checksum: add the sha256 of columns and header, which `map_columns` verifies.

        Raises:
            ValueError: the header does not fit into the bytes that were reserved for it.
        """
        header: dict[str, Any] = {"__metadata__": dict(metadata), **self._header}
        if checksum:
            header["__metadata__"]["checksum"] = _checksum(self.file, self.reserved, header)
        text = json.dumps(header).encode()
        room = self.reserved - _LENGTH
        if len(text) > room:
            raise ValueError(f"a header of {len(text):,} bytes does not fit into {room:,}")
        self.file.seek(0)
        self.file.write(room.to_bytes(_LENGTH, "little") + text.ljust(room))
        self.file.flush()
        os.fsync(self.file.fileno())


def _checksum(file: BinaryIO, begin: int, header: Mapping[str, Any]) -> str:
    """Return the hex sha256 of all bytes from `begin` on, and of the header without a checksum."""
    file.flush()
    file.seek(begin)
    digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
    digest.update(json.dumps(header).encode())
    return digest.hexdigest()


@contextmanager
def temporary_index(path: Path) -> Iterator[Path]:
    """Give an empty temporary file beside the path of an index; the caller renames it, or it is removed.

    Raises:
        UserError: no index can be written at this path.
    """
    with explain_unwritable_index(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_device(path):
            raise UnfitFile(errno.EINVAL, "not a regular file")  # the index would replace it
        with temporary_beside(path) as temporary:
            yield temporary


@contextmanager
def explain_unwritable_index(path: Path) -> Iterator[None]:
    """Turn an OSError while an index is written into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: the index cannot be written ({error.strerror}); make room, or name another file: "
            "data.train = [{path = …, index = FILE}]"
        ) from None
