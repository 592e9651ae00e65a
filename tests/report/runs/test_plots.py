"""Titles and legends leave the panels their room, however long the names of runs are."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttempnet.report.read import read_run
from disttempnet.report.runs import plots
from disttempnet.report.runs.plots import fitted, grid, outer_legend
from tests.report.synthetic import write_run

LONG = [f"DistTempNet-v1 (a-name-that-says-all-of-its-settings/{'and-more/' * 12}seed-{i})" for i in range(4)]


@pytest.mark.parametrize(("width", "lines"), [(8, 1), (20, 1), (20, 2), (44, 2), (200, 2)])
def test_a_title_is_fitted_by_its_middle(width: int, lines: int) -> None:
    for title in LONG:
        rows = fitted(title, width, lines).split("\n")
        assert len(rows) <= lines
        assert max(map(len, rows)) <= width
        assert rows[0][:3] == title[:3]
        assert rows[-1][-2:] == title[-2:]
    assert fitted("CLIP, batch 16", 20) == "CLIP, batch 16"


def test_a_long_legend_is_inside_the_figure_and_takes_no_room_from_the_axes() -> None:
    figure, ((axis,),) = grid(1, 1, height=2.5)
    for i, title in enumerate(LONG):
        axis.plot([0, 1], [0, i], label=title)
    outer_legend(figure, axis)
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert box.y1 <= figure.bbox.height
    assert axis.get_window_extent().height > 1.5 * figure.dpi  # of 2.5 inches, as with a legend of one row
    assert axis.get_window_extent().y1 <= box.y0


def test_every_chart_takes_long_titles(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / str(i))) for i in range(4)]
    for chart in (plots.quality_chart, plots.training_chart, plots.temperature_chart):
        assert chart(runs, LONG).startswith("data:image/svg")  # constrained layout warns of panels without room
