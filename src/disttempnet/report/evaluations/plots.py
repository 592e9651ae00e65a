"""Charts of evaluations on many tasks: scores by task, and differences to a base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from disttempnet.evaluation.tasks import task_title
from disttempnet.report.evaluations.compare import Difference
from disttempnet.report.runs.plots import FAINT, INK, RUN_COLOURS, grid, outer_legend, styled, svg
from disttempnet.report.seeds.groups import AVERAGES, Column, SeedGroup

if TYPE_CHECKING:
    from matplotlib.axes import Axes


MARKERS = ("o", "D", "s", "^", "v", "P")  # of groups in one panel, with RUN_COLOURS


@styled
def task_chart(groups: Sequence[SeedGroup], sections: Sequence[tuple[str, Sequence[Column]]]) -> str:
    """Draw main metrics: a row for each task below the heading of its section, a dot for each group, mean ± std.

    Args:
        groups: at most as many as `RUN_COLOURS`.
    """
    rows: list[tuple[str, Column | None]] = []
    for heading, columns in sections:
        rows += [(heading, None), *((task_title(column.task), column) for column in columns)]
    figure, cells = grid(1, 1, height=1.0 + 0.23 * len(rows))
    axis = cells[0][0]
    for g, group in enumerate(groups):
        known = [(y, c) for y, (_, column) in enumerate(rows) if column and (c := group.cell(column)) is not None]
        offset = 0.5 * ((g + 0.5) / len(groups) - 0.5)  # next to each other, so that none hides another
        axis.errorbar(
            [100 * cell.mean for _, cell in known],
            [y + offset for y, _ in known],
            xerr=[100 * (cell.std or 0.0) for _, cell in known],
            color=RUN_COLOURS[g],
            marker=MARKERS[g],
            markersize=5,
            elinewidth=1.2,
            linestyle="",
            label=group.title,
        )
    _task_rows(axis, [name for name, _ in rows], [column is None for _, column in rows])
    axis.set_xlim(left=-1)  # a dot at 0 is not cut off
    axis.set(xlabel="main metric, %")
    outer_legend(figure, axis, most=3)
    return svg(figure)


@styled
def difference_chart(found: Sequence[Difference]) -> str:
    """Draw other − base in percentage points with confidence intervals, the greatest gain on top.

    Grey bars are not told from zero: their interval includes it, or they have none.
    """
    figure, cells = grid(1, 1, height=0.9 + 0.23 * len(found))
    axis = cells[0][0]
    for y, one in enumerate(found):
        colour = {1: RUN_COLOURS[0], -1: RUN_COLOURS[1]}.get(one.paired.sign, FAINT)
        axis.barh(y, 100 * one.paired.mean, height=0.62, color=colour, alpha=0.8, linewidth=0, zorder=2)
        if one.paired.interval is not None:
            low, high = one.paired.interval
            axis.hlines(y, 100 * low, 100 * high, color=INK, linewidth=1.0, zorder=3)
    axis.axvline(0, color=FAINT, linewidth=1.0, zorder=4)
    names = [one.column.head if one.column.task == AVERAGES else task_title(one.column.task) for one in found]
    _task_rows(axis, names, [one.column.task == AVERAGES for one in found])
    axis.set(xlabel="difference, points of a percentage")
    return svg(figure)


def _task_rows(axis: Axes, names: Sequence[str], bold: Sequence[bool]) -> None:
    """Label the rows from the top down."""
    axis.set_yticks(range(len(names)), names, color=INK, fontsize=9.0)
    axis.tick_params(axis="y", length=0)
    for label, strong in zip(axis.get_yticklabels(), bold, strict=True):
        label.set_fontweight("bold" if strong else "normal")
    axis.set_ylim(len(names) - 0.5, -0.5)
