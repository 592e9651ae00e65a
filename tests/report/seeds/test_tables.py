"""Tables and page over seeds: what they say, in every format, and the same again from a compact file."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from disttempnet.report.seeds.comparison import compare_groups
from disttempnet.report.seeds.intervals import paired_difference, t_quantile
from disttempnet.report.seeds.page import comparison_page
from disttempnet.report.seeds.tables import difference_text, latex_table, legend, markdown_table, text_table
from tests.report.invented import result
from tests.report.pages import Page
from tests.report.seeds.seeds import CLIP, OTHER, TASK, TEMPNET, csv_rows, runs


def test_networks_that_never_started_are_named() -> None:
    made = [replace(one, tau_started=one.seed > 0 if one.name.startswith("clip") else True) for one in runs()]
    assert "the temperature network never started in CLIP (1 of 3 seeds): τ stayed" in legend(compare_groups(made))
    assert "never started" not in legend(compare_groups(runs()))


def test_markdown() -> None:
    text = markdown_table(compare_groups(runs()))
    lines = text.splitlines()
    assert lines[0] == (
        "|  | seeds | Unseen concepts: zero-shot top-1 | difference to CLIP, 95 % | Unseen concepts: top-1, head "
        "| Unseen concepts: top-1, tail |"
    )
    assert lines[2] == "| CLIP | 3 | 22.0 (2.0) | baseline | 50.0 (0.0) | 10.0 (0.0) |"
    assert lines[3] == "| A_B & τ\\|&lt;b&gt; | 3 | **25.0 (2.0)** | **+3.0 [3.0, 3.0]** | – | – |"
    # .004 − .20 and .006 − .22: −20.5 ± 12.706 · .9
    assert lines[4] == "| SogCLR | 2 | 0.50 (0.14) | **−20.50 [−31.94, −9.06] n=2** | – | – |"
    assert lines[5] == "| chance |  | 1.0 |  | 1.0 | 1.0 |"
    assert (
        "per cent, mean (sample standard deviation) over the seeds; highest in bold; difference in points, paired by "
        "seed, with its 95 % confidence interval (Student's t); bold where that excludes zero: 2 of 2 (about 0.1 would "
        "if nothing differed)\n"
    ) in text


def test_one_seed_has_no_interval() -> None:
    made = [result(loss, 1, {TASK: {"acc1": value}}) for loss, value in (("clip", 0.2), ("sogclr", 0.3))]
    text = markdown_table(compare_groups(made))
    assert text.splitlines()[:4] == [
        "|  | seeds | Unseen concepts: zero-shot top-1 |",
        "| --- | --: | --: |",
        "| CLIP | 1 | 20.0 |",
        "| SogCLR | 1 | **30.0** |",
    ]
    assert "per cent, one seed each, so no intervals; highest in bold\n" in text


def test_seeds_that_are_not_shared_are_named() -> None:
    made = [result("clip", seed, {TASK: {"acc1": 0.2}}) for seed in (1, 2)]
    made += [result("sogclr", seed, {TASK: {"acc1": 0.3}}) for seed in (3, 4)]
    assert "no differences: two seeds in common, on the same data, are needed" in markdown_table(compare_groups(made))


@pytest.mark.parametrize(
    ("values", "seeds", "text"),
    [
        ((0.01, 0.02, 0.03), 3, "+2.0 [−0.5, 4.5]"),
        ((0.01, 0.02, 0.03), 5, "+2.0 [−0.5, 4.5] n=3"),
        ((0.0, 0.0), 2, "0.0 [0.0, 0.0]"),
        ((0.0002, 0.0003), 2, "0.0 [0.0, 0.1]"),
        ((0.0012, 0.0012), 2, "+0.1 [0.1, 0.1]"),
        ((0.0002, 0.0002), 2, "+0.02 [0.02, 0.02]"),  # not “0.0 [0.0, 0.0]”, which would include zero
        ((-0.03,), 1, "−3.0"),
        ((-0.03,), 3, "−3.0 n=1"),
    ],
)
def test_a_difference_as_text(values: tuple[float, ...], seeds: int, text: str) -> None:
    one = paired_difference(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0))
    assert one is not None
    assert difference_text(one, seeds) == text


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
    assert r"A\_B \& $\tau$|<b> & 3 & \textbf{25.0 (2.0)} & \textbf{+3.0 [3.0, 3.0]} & -- & -- \\" in text
    assert r"SogCLR & 2 & 0.50 (0.14) & \textbf{$-$20.50 [$-$31.94, $-$9.06] n=2} & -- & -- \\" in text
    assert r" & seeds & zero-shot top-1 & difference, 95 \% & top-1, head & top-1, tail \\" in text
    assert r"\multicolumn{4}{c}{Unseen concepts}" in text
    assert r"\cmidrule(lr){3-6}" in text
    scores, *_ = text.split(r"\end{tabular}")
    rows = [line for line in scores.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {line.replace(r"\&", "").count("&") for line in rows} == {5}
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
    assert [single[key] for key in ("std", "low", "high", "baseline", "difference", "pairs")] == [""] * 6


def test_csv_carries_intervals_and_differences() -> None:
    clip, tempnet, other = (row for row in csv_rows(runs()) if row["task"] == TASK)
    assert float(clip["low"]) == pytest.approx(0.22 - t_quantile(2) * 0.02 / 3**0.5, rel=1e-12)
    assert float(clip["high"]) == pytest.approx(0.22 + t_quantile(2) * 0.02 / 3**0.5, rel=1e-12)
    assert clip["baseline"] == clip["difference"] == ""
    assert (tempnet["baseline"], tempnet["pairs"]) == ("CLIP", "3")
    assert float(tempnet["difference"]) == pytest.approx(0.03, rel=1e-12)
    assert float(other["difference"]) == pytest.approx(-0.205, rel=1e-12)
    assert float(other["difference_low"]) == pytest.approx(-0.205 - t_quantile(1) * 0.009, rel=1e-12)
    assert float(other["difference_high"]) == pytest.approx(-0.205 + t_quantile(1) * 0.009, rel=1e-12)


def test_terminal() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(text_table(compare_groups(runs())))
    text = " ".join(console.export_text().split())
    assert "25.0 (2.0)" in text
    assert "+3.0 [3.0, 3.0]" in text
    assert "sample standard deviation" in text
    assert "2 of 2 (about 0.1 would if nothing differed); head, middle and tail are on the page" in text
    assert "50.0" not in text


def test_nothing_is_cut_off_in_a_narrow_terminal() -> None:
    tasks = ("emoji-renderings", "emoji-concepts", "scenes")
    made = [
        result(loss, s, {task: {"acc1": v + s * v / 9, "mean_recall": v} for task in tasks}, title=f"{loss} " * 4)
        for loss, v in (("clip", 0.4), ("sogclr", 0.1))
        for s in (1, 2, 3)
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(text_table(compare_groups(made)))
    text = console.export_text()
    assert text.count("−36.7 [−44.9, −28.4]") == text.count("40.0 (0.0)") == 3
    assert all(title in text for title in ("Unseen renderings", "Unseen concepts", "Scenes"))


def test_runs_without_evaluations_have_every_table() -> None:
    comparison = compare_groups([result("clip", s, {}) for s in (1, 2)])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(text_table(comparison))
    tex = latex_table(comparison)
    for text in (console.export_text(), markdown_table(comparison), tex):
        assert "no task was evaluated: set" in text
    assert " & seeds \\\\\n" in tex
    assert "CLIP & 2 \\\\\n" in tex
