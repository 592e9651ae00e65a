"""The figure of one metric: what it draws, in which colours, and what it refuses."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from matplotlib.axes import Axes

from disttempnet.cli.main import main
from disttempnet.errors import UserError
from disttempnet.report.compact import read_results, write_compact
from disttempnet.report.seeds import figure
from disttempnet.report.seeds.comparison import compare_groups
from disttempnet.report.seeds.figure import figure_svg
from disttempnet.report.seeds.intervals import t_quantile
from tests.report.invented import result
from tests.report.seeds.seeds import TASK, runs

SVG = "{http://www.w3.org/2000/svg}"
METRIC = f"{TASK}/acc1"


def over_batches() -> list:
    """Two objectives at two batches, three seeds: SogCLR is .01, .02, .03 ahead at 16, and level at 64."""
    made = []
    for batch in (16, 64):
        for seed in range(3):
            ahead = 0.01 * (seed + 1) if batch == 16 else 0.0
            for loss, value in (("clip", 0.2 + 0.1 * seed), ("sogclr", 0.2 + 0.1 * seed + ahead)):
                varied = f"--global_batch-{batch}"
                made.append(result(loss, seed, {TASK: {"acc1": value}}, batch=batch, varied=varied))
    return made


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_points_and_intervals_over_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(figure, "_line", lambda axis, x, points, i, label: drawn.append((label, x, points)))
    figure_svg(compare_groups(over_batches(), [METRIC]))
    lines = {(label, number // 2 % 3): (x, points) for number, (label, x, points) in enumerate(sorted_by_panel(drawn))}
    x, (at_16, at_64) = lines["SogCLR", 1]
    assert x == [16, 64]
    reach = t_quantile(2) * 1.0 / 3**0.5  # of differences of 1, 2, 3 points
    assert at_16.value == pytest.approx(2.0)
    assert at_16.interval == pytest.approx((2 - reach, 2 + reach))
    assert at_64.value == pytest.approx(0, abs=1e-9)
    x, (at_16, at_64) = lines["CLIP", 0]
    reach = t_quantile(2) * 10 / 3**0.5  # of 20, 30, 40 per cent
    assert at_16.value == pytest.approx(30)
    assert at_16.interval == pytest.approx((30 - reach, 30 + reach))
    assert [point.value for point in lines["CLIP", 1][1]] == [0, 0]  # the baseline


def sorted_by_panel(drawn: list) -> list:
    """`_line` is called for each panel of a family; order them panel by panel."""
    panels = len(drawn) // 2
    return [drawn[family * panels + panel] for panel in range(panels) for family in range(2)]


def test_the_file_says_what_it_shows_in_light_and_dark(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text(write_compact(over_batches()))
    out = tmp_path / "figure.svg"
    assert main(["report", str(tmp_path / "results.jsonl"), "--out", str(out), "--metrics", METRIC]) == 0
    svg = out.read_text()
    words = texts(svg)
    for word in (
        "Unseen concepts",
        "zero-shot top-1, %",
        "difference to CLIP",
        "points, 95 % intervals",
        "CLIP",
        "SogCLR",
    ):
        assert word in words, word
    assert {"16", "64", "global batch"} <= set(words)
    assert "@media (prefers-color-scheme: dark)" in svg
    again = read_results([tmp_path / "results.jsonl"])
    assert figure_svg(compare_groups(again, [METRIC])) == svg  # equal data, equal bytes


def test_without_batches_a_row_for_each_group() -> None:
    words = texts(figure_svg(compare_groups(runs(), [METRIC])))
    assert {"CLIP", "A_B & τ|<b>", "SogCLR", "difference to CLIP"} <= set(words)
    assert "global batch" not in words


def test_several_metrics_are_panels_of_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def errorbar(self: Axes, x: list[float], y: list[int], **how: object) -> None:
        drawn.append((self.get_title(), x, y, how["markerfacecolor"]))

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    made = [result("clip", s, {TASK: {"acc1_head": 0.5, "acc1_tail": 0.1}}) for s in range(3)]
    made += [result("x", s, {TASK: {"acc1_head": 0.4, "acc1_tail": 0.1 + 0.1 * s}}, title="X") for s in range(3)]
    words = texts(figure_svg(compare_groups(made, [f"{TASK}/acc1_head", f"{TASK}/acc1_tail"])))
    assert {"X", "top-1, head", "top-1, tail"} <= set(words)
    assert "difference to CLIP in points, 95 % intervals; filled: they exclude 0" in words
    assert [(pytest.approx(x), y) for _, x, y, _ in drawn] == [([-10.0], [0]), ([10.0], [0])]
    (head, tail) = (face for *_, face in drawn)
    assert head is None, "the interval excludes zero: filled"
    assert tail == "none"


def test_a_figure_has_one_to_four_metrics() -> None:
    names = ("acc1", "acc1_head", "acc1_middle", "acc1_tail", "mean_recall")
    five = [result("clip", s, {TASK: dict.fromkeys(names, 0.2)}) for s in range(2)]
    with pytest.raises(UserError, match=r"an .svg shows one to 4 metrics: name them with --metrics TASK/METRIC …"):
        figure_svg(compare_groups(five))
    one_seed = [result(loss, 1, {TASK: {"acc1_head": 0.2, "acc1_tail": 0.1}}) for loss in ("clip", "sogclr")]
    with pytest.raises(UserError, match=r"several metrics shows differences, for which two seeds in common are needed"):
        figure_svg(compare_groups(one_seed, [f"{TASK}/acc1_head", f"{TASK}/acc1_tail"]))
