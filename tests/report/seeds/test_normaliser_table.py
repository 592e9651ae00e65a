"""The table of normaliser errors, in every format, and again from a compact file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from disttempnet.report.compact import read_results, write_compact
from disttempnet.report.seeds.comparison import compare_groups
from disttempnet.report.seeds.normaliser_table import normaliser_table
from disttempnet.report.seeds.page import comparison_page
from disttempnet.report.seeds.tables import latex_table, markdown_table
from tests.report.seeds.seeds import runs


def test_errors_of_those_that_measured_them(tmp_path: Path) -> None:
    measured = [
        replace(
            one,
            normaliser_error={"batch_log_rms": 0.5 + 0.1 * one.seed, "image_mean": -0.25, "image_log_rms": 0.125}
            if one.name.startswith("clip")
            else {"batch_log_rms": 1.0, "text_mean": 12.5}
            if one.name.startswith("sogclr")
            else {},
        )
        for one in runs()
    ]
    path = tmp_path / "all.jsonl"
    path.write_text(write_compact(measured))
    comparison = compare_groups(read_results([path]))
    table = normaliser_table(comparison)
    assert table is not None
    assert [row[0] for row in table.rows] == ["CLIP", "SogCLR"]
    clip, sogclr = (row[1:] for row in table.rows)
    assert clip == ["−25 (0)", "–", "0.12 (0.00)", "–", "0.60 (0.10)"]
    assert sogclr == ["–", "over 1,000", "–", "–", "1.00 (0.00)"]
    assert "| CLIP | −25 (0) | – |" in markdown_table(comparison)
    assert "CLIP & $-$25 (0) & -- &" in latex_table(comparison)
    page = comparison_page(comparison)
    assert 'id="normalisers"' in page
    assert "<td>0.60 (0.10)</td>" in page


def test_none_where_nothing_was_measured() -> None:
    assert normaliser_table(compare_groups(runs())) is None
    assert "normalisers" not in comparison_page(compare_groups(runs()))
