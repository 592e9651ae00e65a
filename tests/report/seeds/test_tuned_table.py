"""The table of chosen settings, in every format."""

from __future__ import annotations

from dataclasses import replace

from disttempnet.report.compact import Tuned
from disttempnet.report.seeds.comparison import compare_groups
from disttempnet.report.seeds.page import comparison_page
from disttempnet.report.seeds.tables import latex_table, markdown_table
from disttempnet.report.seeds.tuned_table import tuned_table
from tests.report.seeds.seeds import runs


def test_what_was_chosen_by_how_many_trials() -> None:
    chosen = {
        "clip": Tuned({"optim.lr": 3e-3, "loss.temperature": 0.05}, "validation/mean_recall", 0, 7, []),
        "x": Tuned({"optim.lr": 9e-3}, "validation/mean_recall", 0, 4, ["optim.lr"]),
    }
    made = [replace(one, tuned=chosen.get(one.name.partition("--")[0])) for one in runs()]
    comparison = compare_groups(made)
    table = tuned_table(comparison)
    assert table is not None
    assert table.head == ["settings chosen by trials", "trials", "optim.lr", "loss.temperature"]
    assert table.rows == [
        ["CLIP", "7", "0.003", "0.05"],
        ["A_B & τ|<b>", "4", "0.009 *", "–"],
        ["SogCLR", "0", "–", "–"],
    ]
    assert "highest validation/mean_recall, seed 0" in table.note
    assert "* the lowest or highest value" in table.note
    assert "| CLIP | 7 | 0.003 | 0.05 |" in markdown_table(comparison)
    assert r"CLIP & 7 & 0.003 & 0.05 \\" in latex_table(comparison)
    page = comparison_page(comparison)
    assert "<td>0.009 *</td>" in page
    assert table.note in page


def test_none_without_trials() -> None:
    assert tuned_table(compare_groups(runs())) is None
    assert "chosen by trials" not in markdown_table(compare_groups(runs()))
