"""Parquet files: images in a column of bytes (Hugging Face, img2dataset), or in files that a column names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from disttempnet.data.images import UnreadableImage
from disttempnet.data.listings.fields import (
    ADDRESSES,
    CAPTION_KEYS,
    IMAGE_KEYS,
    Fields,
    NoBytes,
    find_key,
    mistaken_for,
)
from disttempnet.data.listings.readers import Layout, PathState
from disttempnet.data.shards.patterns import expand_braces
from disttempnet.data.shards.store import file_fingerprint
from disttempnet.errors import UserError
from disttempnet.sanitize import brief

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

CACHE_BYTES = 256 << 20  # of cached row groups per process
OPEN_PARQUET_FILES = 16


class ImageColumn(NamedTuple):
    """Column of images; `paths`: it has paths of files instead of bytes."""

    name: str
    paths: bool


class ParquetLayout(Layout):
    """Rows of Parquet files, in the order of their names; a group is a row group if images are in the files.

    Images are not read here: the `image` of a row is `FILE:ROW`, or the path of a file.

    Args:
        where: a file, a folder of files, or a pattern with `*` or a range in braces in its file name.
        image_key: column of binary, of struct {bytes, path}, or of paths; empty = the only one.
        caption_key: column of captions; empty = detected.
    """

    image_key = "image"

    def __init__(self, where: Path, image_key: str = "", caption_key: str = "") -> None:
        self.where, self.parts = where, {}
        need_pyarrow(where)
        self.paths = find_files(where)
        self.total = len(self.paths)
        self.named = image_key, caption_key
        self.column: ImageColumn | None = None
        self.group_rows: list[int] = []  # rows of each group
        self.file_groups: list[int] = []  # groups of each file

    def index_file(self) -> Path:
        if self.where.is_dir():
            return self.where / "parquet.index"
        label = "".join(character for character in self.where.name if character not in "{}*?[]")
        return self.where.with_name(f"{label}.index")

    def names(self) -> set[str]:
        return {path.name for path in self.paths}

    def path(self, name: str) -> Path:
        return self.paths[0].with_name(name)

    def fingerprint(self, name: str) -> str:
        return file_fingerprint(self.path(name))  # the end of the file has the offsets of its columns

    def identity(self) -> str:
        name = self.column.name if self.column else ""
        return name + "".join(part.fingerprint for _, part in sorted(self.parts.items()))

    def notes(self) -> dict[str, Any]:
        name, paths = self.column or ("", False)
        return {"column": name, "row_groups": self.file_groups, "paths": paths}

    def groups(self, rows: int) -> list[int]:
        return super().groups(rows) if self.column and self.column.paths else self.group_rows

    def format_notes(self) -> list[str]:
        paths = self.column is not None and self.column.paths
        return [f"column '{self.column.name}' names image files"] if self.column and paths else []

    def rows(self) -> Iterator[tuple[Fields | None, int]]:
        for number, path in enumerate(self.paths):
            try:
                self.parts[path.name] = PathState(self.stamp(path.name), self.fingerprint(path.name))
                for fields in self._rows_of(path):
                    yield fields, number
            except (OSError, ValueError, NotImplementedError) as error:  # pyarrow raises these kinds
                raise UserError(f"{path}: cannot be read as parquet: {brief(error)}") from None

    def _rows_of(self, path: Path) -> Iterator[Fields]:
        from pyarrow.parquet import ParquetFile

        with ParquetFile(path) as file:
            self.column = self.column or image_column(file, *self.named, path)
            if file.schema_arrow.get_field_index(self.column.name) < 0:
                raise UserError(f"{path}: has no column '{self.column.name}', as {self.paths[0].name} has")
            caption = find_key(_others(file.schema_arrow, self.column.name), self.named[1], CAPTION_KEYS)
            plain = [
                field.name
                for field in file.schema_arrow
                if field.name != self.column.name and (_is_plain(field.type) or field.name == caption)
            ]
            self.file_groups.append(file.num_row_groups)
            count = 0
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=plain, use_threads=False)
                columns = {name: _values(table.column(name)) for name in plain}
                rows = file.metadata.row_group(group).num_rows
                names: Iterable[Any] = (f"{path.name}:{row}" for row in range(count, count + rows))
                if self.column.paths:
                    names = _paths(file, group, self.column.name)
                elif missing := _without_bytes(file, group, self.column.name, columns):
                    names = (NoBytes(name) if none else name for name, none in zip(names, missing, strict=True))
                for row, name in enumerate(names):
                    yield {key: values[row] for key, values in columns.items()} | {self.image_key: name}
                self.group_rows.append(rows)
                count += rows


def need_pyarrow(where: Path, instead: str = "") -> None:
    """Raise UserError if pyarrow is not installed; `instead` says what goes without it."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError(f"{where}: Parquet needs pyarrow: pip install 'disttempnet[parquet]'{instead}") from None


def find_files(where: Path) -> list[Path]:
    """Return the files of a folder, pattern or name, sorted, at least one. Raises UserError."""
    if where.is_dir():
        found = sorted(path for path in where.glob("*.parquet") if not path.name.startswith("."))
    elif where.is_file():
        found = [where]
    elif any(character in where.name for character in "*?["):
        found = sorted(where.parent.glob(where.name))
    else:
        found = sorted(where.with_name(name) for name in expand_braces(where.name))
        missing = next((path for path in found if not path.is_file()), None)
        if missing is not None:
            raise UserError(f"{missing}: no such parquet file")
    if not found:
        raise UserError(f"{where}: no such parquet files")
    return found


def image_column(file: ParquetFile, chosen: str, caption_key: str, path: Path) -> ImageColumn:
    """Return the column of images: the named one, or the only one of bytes, or of paths. Raises UserError."""
    schema = file.schema_arrow
    caption = find_key(schema.names, caption_key, CAPTION_KEYS)
    embedded = [field.name for field in schema if _holds_bytes(field.type)]
    named = [field.name for field in schema if _is_text(field.type) or _is_struct_with(field.type, "path")]
    if not chosen and caption in embedded and len(embedded) > 1 and not _is_struct_with(schema.field(caption).type):
        embedded.remove(caption)
    found = [chosen] if chosen in embedded else [] if chosen else embedded
    if len(found) == 1:
        only_paths = _is_struct_with(schema.field(found[0]).type, "path") and _all_null(file, f"{found[0]}.bytes")
        return ImageColumn(found[0], paths=only_paths)
    if not found and (key := find_key(named, chosen, IMAGE_KEYS)) is not None:
        return ImageColumn(key, paths=True)
    if not found and not chosen and (kind := mistaken_for(schema.names)):
        raise UserError(f"{path}: {kind}")
    if not found and not chosen and {"url", "image_url"} & {name.lower() for name in schema.names}:
        raise UserError(f"{path}: {ADDRESSES}")
    what = f"'{chosen}' is not a column of images" if chosen else f"{len(found) or 'no'} columns of images"
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    advice = "name one of bytes, or of paths, with image_key" if found or chosen or named else "it holds none"
    if caption is None:
        wanted = f"no '{caption_key}'" if caption_key else f"no captions (any of {', '.join(CAPTION_KEYS)})"
        what += f", and {wanted}"
        advice += "; the captions' with caption_key"
    raise UserError(f"{path}: {what}; its columns are {columns}; {advice}")


def _others(schema: pyarrow.Schema, image: str) -> list[str]:
    return [name for name in schema.names if name != image]


def _leaf_nulls(file: ParquetFile, group: int, leaf: str) -> int | None:
    """Return the number of null values of a column in the statistics of the file; None without statistics."""
    metadata = file.metadata.row_group(group)
    for number in range(metadata.num_columns):
        column = metadata.column(number)
        if column.path_in_schema == leaf:
            statistics = column.statistics
            return statistics.null_count if statistics is not None and statistics.has_null_count else None
    return None


def _all_null(file: ParquetFile, leaf: str) -> bool:
    groups = range(file.num_row_groups)
    nulls = [_leaf_nulls(file, group, leaf) for group in groups]
    return file.metadata.num_rows > 0 and nulls == [file.metadata.row_group(group).num_rows for group in groups]


def _without_bytes(file: ParquetFile, group: int, name: str, columns: Mapping[str, Sequence[Any]]) -> list[bool]:
    """Tell for each row of a group whether it has no image bytes; empty if all have, or without statistics.

    The column is read only for groups with such rows, and not for img2dataset's, which have a column `status`.
    """
    import pyarrow.compute

    struct = _is_struct_with(file.schema_arrow.field(name).type)
    leaf = f"{name}.bytes" if struct else name
    if not _leaf_nulls(file, group, leaf):
        return []
    if {"status", "key"} <= columns.keys() and "success" in columns["status"]:
        return [status != "success" for status in columns["status"]]
    column = file.read_row_group(group, columns=[leaf], use_threads=False).column(name)
    nulls = pyarrow.compute.is_null(pyarrow.compute.struct_field(column, "bytes") if struct else column)
    return list(nulls.to_pylist())


def _paths(file: ParquetFile, group: int, name: str) -> list[Any]:
    import pyarrow.compute

    struct = _is_struct_with(file.schema_arrow.field(name).type, "path")
    column = file.read_row_group(group, columns=[f"{name}.path" if struct else name], use_threads=False).column(name)
    return _values(pyarrow.compute.struct_field(column, "path") if struct else column)


def _is_struct_with(kind: pyarrow.DataType, field: str = "bytes") -> bool:
    from pyarrow import types

    return bool(types.is_struct(kind)) and kind.get_field_index(field) >= 0


def _holds_bytes(kind: pyarrow.DataType) -> bool:
    return _is_struct_with(kind) or _is_binary(kind)


def _is_binary(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_text(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):  # categories of pandas
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_list(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    tests = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return any(test(kind) for test in tests)


def _is_plain(kind: pyarrow.DataType) -> bool:
    """Tell whether a type can be a caption or another field: text, lists of text, numbers."""
    from pyarrow import types

    if _is_list(kind):
        return _is_text(kind.value_type)
    return _is_text(kind) or types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)


def _values(column: pyarrow.ChunkedArray) -> list[Any]:
    """Return the values of a column; text goes through bytes, as Parquet does not guarantee UTF-8."""
    import pyarrow

    if _is_text(column.type) or _is_binary(column.type):
        column = column.cast(pyarrow.large_binary())
    elif _is_list(column.type) and (_is_text(column.type.value_type) or _is_binary(column.type.value_type)):
        column = column.cast(pyarrow.large_list(pyarrow.large_binary()))
    return [_text(value) for value in column.to_pylist()]


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return [_text(item) for item in value] if isinstance(value, list) else value


class ParquetImages:
    """Encoded images by sample id. Row groups are read as a whole, and cached up to CACHE_BYTES.

    Args:
        paths: the files, in the order of their rows.
        column: name of the column of images.
        row_groups: number of row groups of each file.
        first: int64 [G + 1], first id of each row group, then N.
    """

    def __init__(self, paths: list[Path], column: str, row_groups: list[int], first: NDArray[np.int64]) -> None:
        self.paths, self.column, self.first = paths, column, first
        self.first_group = np.cumsum([0, *row_groups])  # number of the first group of each file
        self._files: OrderedDict[int, ParquetFile] = OrderedDict()
        self._groups: OrderedDict[int, pyarrow.ChunkedArray] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_files": OrderedDict(), "_groups": OrderedDict()}  # open files stay in their process

    def read(self, sample: int, _: str) -> bytes:
        """Read an image. Raises UnreadableImage: no bytes in the row, or damage; UserError: no such file."""
        group = int(np.searchsorted(self.first, sample, side="right")) - 1
        value = self._group(group)[sample - int(self.first[group])].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            raise UnreadableImage("no bytes of an image in this row")
        return data

    def _group(self, group: int) -> pyarrow.ChunkedArray:
        if group in self._groups:
            self._groups.move_to_end(group)
            return self._groups[group]
        number = int(np.searchsorted(self.first_group, group, side="right")) - 1
        path = self.paths[number]
        try:
            local = group - int(self.first_group[number])
            # one thread, as this may be a forked process
            table = self._file(number).read_row_group(local, columns=[self.column], use_threads=False)
        except FileNotFoundError:
            raise UserError(f"{path}: is gone; restore it") from None
        except (OSError, ValueError) as error:  # pyarrow raises both kinds
            raise UnreadableImage(f"its row group cannot be read: {brief(error)}") from None
        self._groups[group] = table.column(self.column)
        while len(self._groups) > 1 and sum(column.nbytes for column in self._groups.values()) > CACHE_BYTES:
            self._groups.popitem(last=False)
        return self._groups[group]

    def _file(self, number: int) -> ParquetFile:
        from pyarrow.parquet import ParquetFile

        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        if len(self._files) >= OPEN_PARQUET_FILES:
            self._files.popitem(last=False)[1].close()
        self._files[number] = ParquetFile(self.paths[number])
        return self._files[number]

    def close(self) -> None:
        self._groups.clear()
        while self._files:
            self._files.popitem()[1].close()
