"""Charts over groups of seeds: what they draw."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from disttempnet.report.seeds import plots as comparison_plots
from disttempnet.report.seeds.comparison import compare_groups
from disttempnet.report.seeds.groups import Column, families
from disttempnet.report.seeds.intervals import t_quantile
from disttempnet.report.seeds.page import comparison_page
from disttempnet.report.seeds.plots import batch_series, frequency_panel, learning_series
from tests.report.invented import result
from tests.report.pages import Page
from tests.report.seeds.seeds import CLIP, TASK, runs


def test_curves_and_batches_are_means_over_seeds() -> None:
    made = [
        result("clip", s, {TASK: {"acc1": v + batch / 1000}}, batch=batch, varied=f"--global_batch-{batch}")
        for batch in (32, 128)
        for s, v in enumerate(CLIP)
    ]
    groups = compare_groups(made).groups
    column = Column(TASK, "acc1")
    curve = learning_series(groups[0], column)
    np.testing.assert_allclose(curve.x, [1, 2, 3, 4])
    np.testing.assert_allclose(curve.mean, 100 * (np.mean(CLIP) + 0.032) * curve.x / 4)
    np.testing.assert_allclose(curve.reach, 100 * np.std(CLIP, ddof=1) * curve.x / 4)
    line = batch_series(families(groups)[0], column)
    np.testing.assert_allclose(line.x, [32, 128])
    np.testing.assert_allclose(line.mean, [22 + 3.2, 22 + 12.8])
    np.testing.assert_allclose(line.reach, 100 * t_quantile(2) * np.std(CLIP, ddof=1) / 3**0.5)
    assert "Accuracy against batch size" in Page(comparison_page(compare_groups(made))).text


def drawn_by(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    monkeypatch.setattr(comparison_plots, "svg", lambda figure: figures.append(figure) or "")
    return figures


def test_differences_are_drawn_with_their_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn_by(monkeypatch)
    comparison = compare_groups(runs(), [f"{TASK}/acc1"])
    comparison_plots.difference_panels(comparison)
    (axis,) = figures[0].axes
    lines = [line.get_segments()[0][:, 0].tolist() for line in axis.collections]
    assert lines == [pytest.approx([100 * one.interval.low, 100 * one.interval.high]) for one in comparison.intervals]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["A_B & τ|<b>", "SogCLR"]


def test_intervals_of_two_seeds_leave_the_means_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn_by(monkeypatch)
    values = {"acc1_head": 0.3, "acc1_middle": 0.2, "acc1_tail": 0.1}
    made = [result("clip", s, {TASK: {key: v * s for key, v in values.items()}}) for s in (1, 2)]
    comparison_plots.parts_chart(compare_groups(made))
    (axis,) = figures[0].axes
    assert axis.get_xlim() == (0, pytest.approx(1.6 * 45))


def test_a_concept_that_was_never_trained_on_is_on_the_chart() -> None:
    made = result("clip", 1, {TASK: {"acc1": 0.1}})
    made.tau_by_frequency.update(frequency=[0, 1, 10, 1000], image=[0.02] * 4, text=[0.03] * 4)
    axis = Figure().subplots()
    frequency_panel(axis, compare_groups([made]).groups[0])
    axis.autoscale_view()
    x = axis.transAxes.inverted().transform(axis.transData.transform([(f, 0.02) for f in (0, 1, 10, 1000)]))[:, 0]
    assert (x > 0).all()
    assert (x < 1).all()
    assert (np.diff(x) > 0.05).all()
    assert x[3] - x[2] == pytest.approx(2 * (x[2] - x[1]))  # logarithmic from 1 on


def test_every_panel_shows_all_of_its_temperatures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The panels share one axis: a later one's higher τ must not fall outside it."""
    drawn = []
    monkeypatch.setattr(comparison_plots, "svg", lambda figure: drawn.append(figure) or "")
    groups = compare_groups(runs()).groups
    for i, group in enumerate(groups):
        for one in group.results:
            one.tau_curve["max"][:] = [0.1 * (i + 1)] * len(one.tau_curve["max"])
            one.tau_by_frequency["image"][:] = [0.1 * (i + 1)] * 2
    comparison_plots.tau_chart(groups)
    comparison_plots.frequency_chart(groups)
    for figure in drawn:
        low, high = figure.axes[0].get_ylim()
        assert low == 0
        assert high >= 0.1 * len(groups)
