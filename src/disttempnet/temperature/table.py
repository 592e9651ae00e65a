"""Rows of temperatures → CSV, or Parquet where pyarrow is installed. The file is written atomically."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from disttempnet.data.listings.parquet import need_pyarrow
from disttempnet.errors import UserError
from disttempnet.io.files import atomic, unwritable_named
from disttempnet.sanitize import csv_cell
from disttempnet.temperature.measure import TemperatureChunk

NUMBERS = ("tau_image", "tau_text", "log_u_image", "log_u_text")
TABLE_COLUMNS = ("id", "key", "caption", *NUMBERS)


class TemperatureTable(Protocol):
    def write(self, columns: dict[str, list[Any]]) -> None:
        """Append rows, given as columns; None is empty."""


def columns_of(chunk: TemperatureChunk, facts: Sequence[str]) -> dict[str, list[Any]]:
    """Return the rows of a chunk as columns: `TABLE_COLUMNS`, then the facts, as text (JSON where they are not)."""
    columns: dict[str, list[Any]] = {
        "id": [item.id for item in chunk.items],
        "key": [item.key for item in chunk.items],
        "caption": [item.captions[0] or None for item in chunk.items],
    }
    for name, values in zip(NUMBERS, (*chunk.tau, *chunk.log_u), strict=True):
        columns[name] = [None if math.isnan(value) else value for value in values.tolist()]
    return columns | {name: [fact_text(item.facts.get(name)) for item in chunk.items] for name in facts}


def fact_text(value: Any) -> str | None:
    """Return a value of a sample's .json as text; None stays None."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def check_table(path: Path, facts: Sequence[str]) -> None:
    """Raise UserError where `open_table` could not write such a table: before hours of work, not after."""
    for name in facts:
        if name in TABLE_COLUMNS:
            raise UserError(f"--columns {name}: the table has a column of that name already")
    if path.suffix == ".parquet":
        need_pyarrow(path, ", or write to a .csv file")
    elif path.suffix != ".csv":
        raise UserError(f"{path}: the table must be a .csv or a .parquet file")


@contextmanager
def open_table(path: Path, facts: Sequence[str]) -> Iterator[TemperatureTable]:
    """Open a table to write to; the file is renamed into place when the block ends without an error.

    Errors of the block itself, which reads what is measured, pass as they are.

    Raises:
        UserError: the table cannot be written.
    """
    writer = _parquet if path.suffix == ".parquet" else _csv
    with ExitStack() as opened:
        with unwritable_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = opened.enter_context(atomic(path))
            table = opened.enter_context(writer(temporary, (*TABLE_COLUMNS, *facts)))
        yield _NamedTable(table, path)
        with unwritable_named(path):
            opened.close()


class _NamedTable:
    """Table whose errors name its path."""

    def __init__(self, table: TemperatureTable, path: Path) -> None:
        self.table, self.path = table, path

    def write(self, columns: dict[str, list[Any]]) -> None:
        with unwritable_named(self.path):
            self.table.write(columns)


@contextmanager
def _csv(path: Path, names: Sequence[str]) -> Iterator[TemperatureTable]:
    class Csv:
        def write(self, columns: dict[str, list[Any]]) -> None:
            shown = [map(_seven_digits if n in NUMBERS else csv_cell, columns[n]) for n in names]
            writer.writerows(zip(*shown, strict=True))

    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(map(csv_cell, names))
        yield Csv()


@contextmanager
def _parquet(path: Path, names: Sequence[str]) -> Iterator[TemperatureTable]:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    kinds = {"id": pyarrow.int64(), **dict.fromkeys(NUMBERS, pyarrow.float32())}
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in names])

    class Parquet:
        def write(self, columns: dict[str, list[Any]]) -> None:
            writer.write_table(pyarrow.Table.from_pydict(columns, schema))

    with ParquetWriter(path, schema) as writer:
        yield Parquet()


def _seven_digits(value: float | None) -> str | None:
    """Format a float32 with the digits that it has."""
    return None if value is None else f"{value:.7g}"
