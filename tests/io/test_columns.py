"""Memory-mapped columns: what is written is read, safetensors reads it too, and damage is found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from disttempnet.io.columns import ColumnType, ColumnWriter, map_columns

START = np.arange(5, dtype=np.int64) * 10**12
SPANS = np.arange(20, dtype=np.uint32).reshape(5, 2, 2)
STATUS = np.array([0, 1, 0, 255, 7], np.uint8)


def write(path: Path, checksum: bool = True, **metadata: str) -> Path:
    with path.open("w+b") as file:
        writer = ColumnWriter(file, 512)
        writer.add("start", START)
        for rows in (SPANS[:2], SPANS[2:]):  # piece by piece
            file.write(rows.tobytes())
        writer.end_column("spans", SPANS.dtype, SPANS.shape)
        writer.add("status", STATUS)
        writer.add("none", np.empty(0, np.uint8))
        writer.finish({"format": "test-1", **metadata}, checksum)
    return path


def test_columns_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = write(tmp_path / "columns", note="ü")
    metadata, columns = map_columns(path, "test-1", verify=True)
    assert metadata == {"format": "test-1", "note": "ü"}
    read_by_others = load_file(path)
    for name, values in {"start": START, "spans": SPANS, "status": STATUS}.items():
        assert columns[name].dtype == values.dtype
        np.testing.assert_array_equal(columns[name], values)
        np.testing.assert_array_equal(read_by_others[name], values)
        assert not columns[name].flags.writeable
    assert len(columns["none"]) == 0
    path.unlink()
    assert columns["spans"][4, 1, 1] == 19, "the mapping stays valid"


def test_damage_is_found_and_said(tmp_path: Path) -> None:
    path = write(tmp_path / "columns")
    whole = path.read_bytes()

    def message(content: bytes, format: str = "test-1", verify: bool = False) -> str:
        path.write_bytes(content)
        try:
            map_columns(path, format, verify)
        except ValueError as error:
            return str(error)
        raise AssertionError("it was read")

    assert message(whole, "test-2") == "its format is test-1, not test-2"
    assert message(whole[:-1]) == "it is cut off"
    assert message(b"") == message(whole[:100]) == "it is cut off, or no file of columns"
    assert message(b"any text at all") == "it is cut off, or no file of columns"
    assert "no header of columns" in message((2).to_bytes(8, "little") + b"{}")
    assert "no header of columns" in message((2).to_bytes(8, "little") + b"[]")
    for place in (520, len(whole) - 1, whole.index(b'"shape": [5]') + 11):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        assert message(bytes(damaged), verify=True), f"byte {place}"
    path.write_bytes(whole)
    map_columns(path, "test-1", verify=True)
    assert "damaged" in message(write(path, checksum=False).read_bytes(), verify=True), "it has no checksum"


def test_a_column_of_another_size_than_declared_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "columns").open("w+b") as file:
        writer = ColumnWriter(file, 256)
        writer.add("x", STATUS)
        file.write(bytes(9))
        with pytest.raises(ValueError, match="column y has 9 bytes, not 16"):
            writer.end_column("y", START.dtype, [2])
        with pytest.raises(ValueError, match=r"a header of .* bytes does not fit into 248"):
            writer.finish({"format": json.dumps(["x" * 300])})
    assert ColumnType(SPANS.dtype, (3, 2)).row_bytes == 24
