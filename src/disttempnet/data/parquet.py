"""Parquet files with images in them, as Hugging Face's data sets have them: a column of bytes, a column of captions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from disttempnet.data.decoding import UnreadableImage
from disttempnet.data.fields import Fields
from disttempnet.data.patterns import expand_braces
from disttempnet.data.rows import Layout, Part
from disttempnet.data.shards import fingerprint
from disttempnet.errors import UserError

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

CACHE_BYTES = 256 << 20  # images of row groups that a process keeps
OPEN_FILES = 16


class Parquet(Layout):
    """Rows of parquet files, in the order of their names; a group is a row group.

    Images are read when they are asked for, not here: a row's `image` is `FILE:ROW`.

    Args:
        where: a file, a folder of files, or a pattern with `*` or a range in braces in its file name.
        image_column: of binary, or of struct {bytes, path}; empty = the only one there is.
    """

    image_key = "image"

    def __init__(self, where: Path, image_column: str = "") -> None:
        self.where, self.parts = where, {}
        need_pyarrow(where)
        self.paths = find_files(where)
        self.total = len(self.paths)
        self.column = image_column
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
        return fingerprint(self.path(name))  # a file's end tells where each of its columns lies

    def identity(self) -> str:
        return self.column + "".join(part.fingerprint for _, part in sorted(self.parts.items()))

    def notes(self) -> dict[str, Any]:
        return {"column": self.column, "row_groups": self.file_groups}

    def groups(self, rows: int) -> list[int]:
        return self.group_rows

    def rows(self) -> Iterator[tuple[Fields | None, int]]:
        for number, path in enumerate(self.paths):
            try:
                self.parts[path.name] = Part(self.stamp(path.name), self.fingerprint(path.name))
                for fields in self._rows_of(path):
                    yield fields, number
            except (OSError, ValueError) as error:  # pyarrow's own errors are of both kinds
                raise UserError(f"{path}: cannot be read as parquet: {one_line(error)}") from None

    def _rows_of(self, path: Path) -> Iterator[Fields]:
        from pyarrow.parquet import ParquetFile

        with ParquetFile(path) as file:
            schema = file.schema_arrow
            self.column = image_column(schema, self.column, path)
            plain = [field.name for field in schema if _is_plain(field.type)]
            self.file_groups.append(file.num_row_groups)
            count = 0
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=plain, use_threads=False)
                columns = {name: _values(table.column(name)) for name in plain}
                self.group_rows.append(file.metadata.row_group(group).num_rows)
                for row in range(self.group_rows[-1]):
                    fields = {name: values[row] for name, values in columns.items()}
                    yield fields | {self.image_key: f"{path.name}:{count}"}
                    count += 1


def need_pyarrow(where: Path) -> None:
    """Raise UserError where pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError(f"{where}: Parquet needs pyarrow: pip install 'disttempnet[parquet]'") from None


def find_files(where: Path) -> list[Path]:
    """The files that a folder, a pattern or a name stands for, sorted by name, at least one. Raises UserError."""
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


def image_column(schema: pyarrow.Schema, chosen: str, path: Path) -> str:
    """The column of images that a config names, or the only one of bytes. Raises UserError."""
    images = [field.name for field in schema if _is_image(field.type)]
    if chosen in images:
        return chosen
    if not chosen and len(images) == 1:
        return images[0]
    what = f"'{chosen}' is no column of images" if chosen else f"{len(images) or 'no'} columns of images"
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    raise UserError(f"{path}: {what}; its columns are {columns}; name one of bytes with image_key")


def _is_image(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_text(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind)


def _is_plain(kind: pyarrow.DataType) -> bool:
    """What captions and facts may be: text, lists of text, numbers."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        return _is_text(kind.value_type)
    return _is_text(kind) or types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)


def _values(column: pyarrow.ChunkedArray) -> list[Any]:
    """Values of a column; text as bytes first, as parquet does not check that it is UTF-8."""
    import pyarrow

    if _is_text(column.type):
        column = column.cast(pyarrow.large_binary())
    elif not pyarrow.types.is_primitive(column.type):
        column = column.cast(pyarrow.large_list(pyarrow.large_binary()))
    return [_text(value) for value in column.to_pylist()]


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return [_text(item) for item in value] if isinstance(value, list) else value


class ParquetImages:
    """Encoded images by sample id. A row group is read as a whole, and kept while memory for it lasts.

    Args:
        paths: the files, in the order of their rows.
        column: of the images.
        row_groups: how many each file has.
        first: int64 [G + 1], first id of each row group.
    """

    def __init__(self, paths: list[Path], column: str, row_groups: list[int], first: NDArray[np.int64]) -> None:
        self.paths, self.column, self.first = paths, column, first
        self.first_group = np.cumsum([0, *row_groups])  # of each file
        self._files: OrderedDict[int, ParquetFile] = OrderedDict()
        self._groups: OrderedDict[int, pyarrow.ChunkedArray] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_files": OrderedDict(), "_groups": OrderedDict()}  # open files stay in their process

    def read(self, sample: int, _: str) -> bytes:
        """Raises UnreadableImage: no bytes in this row, or its row group is damaged; UserError: the file is gone."""
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
            # one thread: this may be a forked process
            table = self._file(number).read_row_group(local, columns=[self.column], use_threads=False)
        except FileNotFoundError:
            raise UserError(f"{path}: is gone; restore the file") from None
        except (OSError, ValueError) as error:  # pyarrow's own errors are of both kinds
            raise UnreadableImage(f"its row group cannot be read: {one_line(error)}") from None
        self._groups[group] = table.column(self.column)
        while len(self._groups) > 1 and sum(column.nbytes for column in self._groups.values()) > CACHE_BYTES:
            self._groups.popitem(last=False)
        return self._groups[group]

    def _file(self, number: int) -> ParquetFile:
        from pyarrow.parquet import ParquetFile

        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        if len(self._files) >= OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        self._files[number] = ParquetFile(self.paths[number])
        return self._files[number]

    def close(self) -> None:
        self._groups.clear()
        while self._files:
            self._files.popitem()[1].close()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
