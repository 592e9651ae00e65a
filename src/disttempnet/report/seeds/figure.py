"""A figure over groups of seeds, an SVG file for a page of your own, in light and dark.

One metric: left the metric, right its difference to the baseline, both with confidence intervals: against the batch
size where the groups differ in that, else a row for each group. Over batches a third panel shows τ at the end.
Several metrics, such as head, middle and tail: a panel of differences for each, a row for each group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from disttempnet.errors import UserError
from disttempnet.evaluation.tasks import task_title
from disttempnet.report.runs.plots import (
    FAINT,
    INK,
    ROW_LABEL,
    RUN_COLOURS,
    RUN_STYLES,
    fitted,
    grid,
    outer_legend,
    styled,
    svg_text,
)
from disttempnet.report.seeds.comparison import GroupComparison
from disttempnet.report.seeds.groups import Column, SeedGroup, batch_label, families
from disttempnet.report.seeds.intervals import CONFIDENCE, Interval, mean_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT, _ROW = 10.0, 3.8, 0.3  # inches
_TITLE = 10.0  # points
_MARKS = "osD^vP"
MOST_PANELS = 4


class Point(NamedTuple):
    """A value with its interval, None for one seed."""

    value: float
    interval: Interval | None


def figure_svg(comparison: GroupComparison) -> str:
    """Return the figure as the text of an SVG file. Its colours follow the reader's light or dark scheme.

    Raises:
        UserError: the table has no column or too many, or several and no differences.
    """
    n = len(comparison.columns)
    if not 1 <= n <= MOST_PANELS:
        raise UserError(f"an .svg shows one to {MOST_PANELS} metrics: name them with --metrics TASK/METRIC …")
    if n > 1:
        if not comparison.intervals:
            raise UserError("an .svg of several metrics shows differences, for which two seeds in common are needed")
        return _differences(comparison)
    same = families(comparison.groups)
    return _over_batches(comparison, same) if same else _rows(comparison)


@styled
def _over_batches(comparison: GroupComparison, same: Sequence[Sequence[SeedGroup]]) -> str:
    column = comparison.columns[0]
    taus = [[_tau(group) for group in family] for family in same]
    has_tau = any(tau is not None for own in taus for tau in own)
    figure, ((*axes,),) = grid(1, 2 + has_tau, height=_HEIGHT, width=_WIDTH)
    for i, family in enumerate(same):
        x = [group.batch for group in family]
        label = family[0].line
        _line(axes[0], x, [_score(group, column) for group in family], i, label)
        _line(axes[1], x, [_difference(comparison, group) for group in family], i, label)
        if has_tau:
            points = [None if tau is None else Point(tau, None) for tau in taus[i]]
            _line(axes[2], x, points, i, label)

    # the axes, and one legend below
    ticks = sorted({group.batch for family in same for group in family})
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{x:,}" for x in ticks])
        axis.minorticks_off()
        axis.set(xlabel=batch_label(same))
    _titles(axes, comparison)
    if has_tau:
        axes[2].set_title("τ\nat the end of training", fontsize=_TITLE)
        axes[2].set_ylim(bottom=0)
    outer_legend(figure, axes[0], "outside lower center", most=4)
    return svg_text(figure)


@styled
def _rows(comparison: GroupComparison) -> str:
    column, groups = comparison.columns[0], comparison.groups
    figure, ((*axes,),) = grid(1, 2, height=1.0 + _ROW * len(groups), width=_WIDTH, sharey=True)
    for place, group in enumerate(groups):
        for axis, point in zip(axes, (_score(group, column), _difference(comparison, group)), strict=True):
            if point is not None:
                reach = None if point.interval is None else _reach([point])
                axis.errorbar([point.value], [place], xerr=reach, color=RUN_COLOURS[0], marker="o", capsize=3)
    axes[0].set_yticks(range(len(groups)), [fitted(group.title, ROW_LABEL) for group in groups], color=INK)
    axes[0].set_ylim(len(groups) - 0.5, -0.5)
    _titles(axes, comparison)
    axes[1].axvline(0, color=FAINT, linewidth=1.1)
    return svg_text(figure)


@styled
def _differences(comparison: GroupComparison) -> str:
    shown = [group for group in comparison.groups if not comparison.is_baseline(group)]
    columns = comparison.columns
    figure, ((*axes,),) = grid(1, len(columns), height=max(2.4, 1.2 + _ROW * len(shown)), width=_WIDTH, sharey=True)
    for c, (axis, column) in enumerate(zip(axes, columns, strict=True)):
        for place, group in enumerate(shown):
            point = _difference(comparison, group, c)
            if point is not None:
                clear = point.interval is not None and not point.interval.low <= 0 <= point.interval.high
                axis.errorbar(
                    [point.value], [place], xerr=None if point.interval is None else _reach([point]),
                    color=RUN_COLOURS[0], marker="o", markerfacecolor=None if clear else "none", capsize=3,
                )  # fmt: skip
        axis.axvline(0, color=FAINT, linewidth=1.1)
        axis.set_title(f"{task_title(column.task)}\n{column.head}", fontsize=_TITLE)
    lows, highs = zip(*(axis.get_xlim() for axis in axes), strict=True)
    for axis in axes:  # one scale
        axis.set_xlim(min(lows), max(highs))
    axes[0].set_yticks(range(len(shown)), [fitted(group.title, ROW_LABEL) for group in shown], color=INK)
    axes[0].set_ylim(len(shown) - 0.5, -0.5)
    base, level = _baseline_title(comparison), f"{100 * CONFIDENCE:g} %"
    figure.supxlabel(f"difference to {base} in points, {level} intervals; filled: they exclude 0", fontsize=_TITLE)
    return svg_text(figure)


def _baseline_title(comparison: GroupComparison) -> str:
    title = next((group.run_title for group in comparison.groups if comparison.is_baseline(group)), "")
    return fitted(title, ROW_LABEL, lines=1)


def _titles(axes: Sequence[Axes], comparison: GroupComparison) -> None:
    column = comparison.columns[0]
    base = _baseline_title(comparison)
    axes[0].set_title(f"{task_title(column.task)}\n{column.head}, %", fontsize=_TITLE)
    axes[1].set_title(f"difference to {base}\npoints, {100 * CONFIDENCE:g} % intervals", fontsize=_TITLE)


def _line(axis: Axes, x: Sequence[int], points: Sequence[Point | None], i: int, label: str) -> None:
    known = [(batch, point) for batch, point in zip(x, points, strict=True) if point is not None]
    if not known:
        return
    shift = 1.0 + 0.03 * (i - 2)  # so that intervals do not lie over each other
    where, values = [shift * batch for batch, _ in known], [point for _, point in known]
    axis.errorbar(
        where, [point.value for point in values], _reach(values), color=RUN_COLOURS[i % len(RUN_COLOURS)],
        linestyle=RUN_STYLES[i % len(RUN_STYLES)], marker=_MARKS[i % len(_MARKS)], markersize=4.5, capsize=2.5,
        linewidth=1.6, label=label,
    )  # fmt: skip


def _reach(points: Sequence[Point]) -> np.ndarray:
    """Return how far each interval reaches below and above its value, [2, n]; zeros without one."""
    ends = [point.interval or Interval(point.value, point.value) for point in points]
    return np.array(
        [
            [point.value - end.low for point, end in zip(points, ends, strict=True)],
            [end.high - point.value for point, end in zip(points, ends, strict=True)],
        ]
    )


def _score(group: SeedGroup, column: Column) -> Point | None:
    values = [100 * value for value in group.values(column)]
    return Point(float(np.mean(values)), mean_interval(values)) if values else None


def _difference(comparison: GroupComparison, group: SeedGroup, column: int = 0) -> Point | None:
    if comparison.is_baseline(group):
        return Point(0.0, None)
    one = comparison.differences[comparison.groups.index(group)][column]
    if one is None:
        return None
    return Point(100 * one.mean, one.interval and Interval(100 * one.interval.low, 100 * one.interval.high))


def _tau(group: SeedGroup) -> float | None:
    """Return τ at the end of training, averaged over the seeds; None where it was not logged."""
    ends = [result.tau_curve["mean"][-1] for result in group.results if result.tau_curve]
    return float(np.mean(ends)) if ends else None
