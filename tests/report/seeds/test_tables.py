"""Tables and page over seeds: what they say, in every format, and the same again from a compact file."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from disttempnet.report.seeds.groups import compare_groups
from disttempnet.report.seeds.page import comparison_page
from disttempnet.report.seeds.tables import latex_table, markdown_table, text_table
from tests.report.invented import result
from tests.report.pages import Page
from tests.report.seeds.seeds import CLIP, OTHER, TASK, TEMPNET, csv_rows, runs


def test_markdown() -> None:
    lines = markdown_table(compare_groups(runs())).splitlines()
    assert lines[0] == (
        "|  | seeds | Unseen concepts: zero-shot top-1 | Unseen concepts: top-1, head | Unseen concepts: top-1, tail |"
    )
    assert lines[2] == "| CLIP | 3 | 22.0 (2.0) | 50.0 (0.0) | 10.0 (0.0) |"
    assert lines[3] == "| A_B & τ\\|&lt;b&gt; | 3 | **25.0 (2.0)** | – | – |"
    assert lines[4] == "| SogCLR | 2 | 0.50 (0.14) | – | – |"
    assert lines[5] == "| chance |  | 1.0 | 1.0 | 1.0 |"
    near = markdown_table(compare_groups([*runs()[:3], result("x", 0, {TASK: {"acc1": 0.235}})]))
    assert "| 3 | 22.0 (2.0)† |" in near
    assert "| x | 1 | **23.5** |" in near


def test_a_cell_of_fewer_seeds_says_so_everywhere() -> None:
    made = [result("clip", s, {TASK: {"acc1": v} | ({"mean_recall": v} if s else {})}) for s, v in enumerate(CLIP)]
    comparison = compare_groups([*made, result("x", 0, {TASK: {"acc1": 0.1, "mean_recall": 0.1}})])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(text_table(comparison))
    tables = [markdown_table(comparison), latex_table(comparison), console.export_text()]
    for text in [*tables, Page(comparison_page(comparison)).text]:
        assert "22.0 (2.0)" in text
        assert "23.0 (1.4) n=2" in text
        assert text.count("n=") == 1


def test_latex_is_escaped_and_complete() -> None:
    text = latex_table(compare_groups(runs()))
    assert r"A\_B \& $\tau$|<b> & 3 & \textbf{25.0 (2.0)} & -- & -- \\" in text
    assert r"\multicolumn{3}{c}{Unseen concepts}" in text
    assert r"\cmidrule(lr){3-5}" in text
    scores, *_ = text.split(r"\end{tabular}")
    rows = [line for line in scores.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {line.replace(r"\&", "").count("&") for line in rows} == {4}
    assert text.count("{") == text.count("}")


def test_csv_carries_raw_numbers() -> None:
    rows = [row for row in csv_rows(runs()) if row["task"] == TASK]
    assert [row["group"] for row in rows] == ["CLIP", "A_B & τ|<b>", "SogCLR"]
    for row, values in zip(rows, (CLIP, TEMPNET, OTHER), strict=True):
        assert float(row["mean"]) == pytest.approx(np.mean(values), rel=1e-14)
        assert float(row["std"]) == pytest.approx(np.std(values, ddof=1), rel=1e-14)
        assert int(row["n"]) == len(values)
        assert float(row["chance"]) == 0.01
    assert [row["mark"] for row in rows] == ["", "best", ""]
    (single,) = (row for row in csv_rows(runs()[:1]) if row["task"] == TASK)
    assert single["std"] == ""


def test_terminal() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(text_table(compare_groups(runs())))
    text = console.export_text()
    assert "25.0 (2.0)" in text
    assert "sample standard deviation" in text


def test_runs_without_evaluations_have_every_table() -> None:
    comparison = compare_groups([result("clip", s, {}) for s in (1, 2)])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(text_table(comparison))
    tex = latex_table(comparison)
    for text in (console.export_text(), markdown_table(comparison), tex):
        assert "no task was evaluated: set" in text
    assert " & seeds \\\\\n" in tex
    assert "CLIP & 2 \\\\\n" in tex
