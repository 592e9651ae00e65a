"""Rows of temperatures as CSV."""

from __future__ import annotations

import csv
import errno
import io
import os
from pathlib import Path

import pytest

from disttempnet.errors import UserError
from disttempnet.temperature.table import NUMBERS, open_table
from tests.full_disk import small_files


def test_captions_are_no_formulas_in_a_csv_and_a_full_disk_leaves_no_table(tmp_path: Path) -> None:
    rows = {"id": [0, 1], "key": ["-1", "@x"], "caption": ["=1+2", "a = b"], **{name: [-0.5, None] for name in NUMBERS}}
    with open_table(tmp_path / "t.csv", ()) as table:
        table.write(rows)
    first, second = csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text(encoding="utf-8")))
    assert [first[name] for name in ("id", "key", "caption", "tau_image")] == ["0", "-1", "'=1+2", "-0.5"]
    assert [second[name] for name in ("key", "caption", "tau_image")] == ["'@x", "a = b", ""]

    def write_large(times: int) -> None:
        with small_files(1000), open_table(tmp_path / "other.csv", ()) as table:
            for _ in range(times):
                table.write(rows)

    for times in (50, 5000):  # noticed at the end, and in the middle
        with pytest.raises(UserError, match=r"other.csv: cannot be written: File too large"):
            write_large(times)
        assert os.listdir(tmp_path) == ["t.csv"]


def test_an_error_of_the_input_is_not_one_of_the_table(tmp_path: Path) -> None:
    def lost_disk() -> None:
        with open_table(tmp_path / "t.csv", ()):
            raise OSError(errno.EIO, os.strerror(errno.EIO), "images/1.png")

    with pytest.raises(OSError, match=r"Input/output error: 'images/1.png'"):
        lost_disk()
    assert os.listdir(tmp_path) == []
