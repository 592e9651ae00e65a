"""Charts over groups of seeds: small multiples, each group in colour before the others in grey."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from disttempnet.report.runs.plots import (
    FAINT,
    INK,
    PALETTE,
    ROW_LABEL,
    RUN_COLOURS,
    SIDE_COLOURS,
    epoch_axis,
    fitted,
    grid,
    styled,
    svg,
    tau_bounds,
)
from disttempnet.report.seeds.comparison import GroupComparison
from disttempnet.report.seeds.groups import HEAD_TO_TAIL, Column, SeedGroup
from disttempnet.report.seeds.intervals import mean_interval
from disttempnet.report.seeds.tau_tables import tau_series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


PANELS_IN_A_ROW = 5
HEAD_TO_TAIL_MARKS = dict(zip(HEAD_TO_TAIL, (("head", "o"), ("middle", "s"), ("tail", "^")), strict=True))


class Series(NamedTuple):
    """A line over x with its spread, in per cent: three float arrays of equal length."""

    title: str
    x: np.ndarray
    mean: np.ndarray
    reach: np.ndarray


def learning_series(group: SeedGroup, column: Column) -> Series:
    """Return a metric after each evaluation that all seeds have made; its spread is the standard deviation."""
    points: dict[float, list[float]] = {}
    for result in group.results:
        for evaluation in result.evaluations:
            scores = evaluation.scores.get(column.task)
            if scores is not None and column.metric in scores.metrics:
                points.setdefault(evaluation.epoch, []).append(scores.metrics[column.metric])
    shared = {epoch: values for epoch, values in points.items() if len(values) == len(group.results)}
    return _series(group.title, shared, _deviation)


def batch_series(family: Sequence[SeedGroup], column: Column) -> Series:
    """Return a final metric against the global batch; its spread is the confidence interval of the mean."""
    return _series(family[0].line, {float(group.batch): group.values(column) for group in family}, _half_interval)


def _series(title: str, points: dict[float, list[float]], spread: Callable[[Sequence[float]], float]) -> Series:
    known = [(x, values) for x, values in sorted(points.items()) if values]
    x = np.array([x for x, _ in known], dtype=float)
    mean = np.array([100 * np.mean(values) for _, values in known], dtype=float)
    return Series(title, x, mean, np.array([100 * spread(values) for _, values in known], dtype=float))


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _half_interval(values: Sequence[float]) -> float:
    interval = mean_interval(values)
    return 0.0 if interval is None else (interval.high - interval.low) / 2


@styled
def learning_chart(series: Sequence[Series], chance: float | None) -> str:
    """Draw a panel for each series: it in colour over the epochs, the others in grey, chance dotted.

    Args:
        chance: share in [0, 1].
    """
    figure, axes = _series_panels(series, chance)
    for axis, own in zip(axes, series, strict=True):
        axis.fill_between(
            own.x, own.mean - own.reach, own.mean + own.reach, color=RUN_COLOURS[0], alpha=0.25, linewidth=0, zorder=2
        )
        axis.plot(own.x, own.mean, color=RUN_COLOURS[0], marker="o", markersize=3, linewidth=1.7, zorder=3)
        epoch_axis(axis, "")
        _heading(axis, own.title)
    _from_zero(axes)
    return svg(figure)


@styled
def batch_chart(series: Sequence[Series], chance: float | None) -> str:
    """Draw a panel for each series: it in colour over the global batch (powers of two), the others in grey.

    Args:
        chance: share in [0, 1].
    """
    figure, axes = _series_panels(series, chance)
    for axis, own in zip(axes, series, strict=True):
        axis.errorbar(own.x, own.mean, own.reach, color=RUN_COLOURS[0], marker="o", markersize=4, capsize=3, zorder=3)
        axis.set_xscale("log", base=2)
        ticks = sorted({x for one in series for x in one.x})
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.set(xlabel="global batch")
        _heading(axis, own.title)
    _between(axes[0].set_ylim, max(max(one.mean, default=0.0) for one in series))
    return svg(figure)


def _series_panels(series: Sequence[Series], chance: float | None) -> tuple[Figure, list[Axes]]:
    """Return panels with the lines of the other series and chance."""
    figure, axes = _panels(len(series), "%")
    for axis, own in zip(axes, series, strict=True):
        for other in series:
            if other is not own:
                axis.plot(other.x, other.mean, color=PALETTE["others"], linewidth=1.0, zorder=1)
        if chance is not None:
            axis.axhline(100 * chance, color=FAINT, linestyle=":", linewidth=1.1)
    return figure, axes


def _between(set_limits: Callable[[float, float], Any], highest: float) -> None:
    """Let an axis end a little above the highest mean: intervals of two seeds would leave nothing else to see."""
    set_limits(0, 1.6 * highest or 1.0)


@styled
def parts_chart(comparison: GroupComparison) -> str:
    """Draw accuracy on frequent, middling and rare concepts: a row for each group, mean and confidence interval."""
    order = list(range(len(comparison.groups)))
    figure, cells = grid(1, 1, height=1.1 + 0.3 * len(order))
    axis = cells[0][0]
    highest = 0.0
    for offset, colour, column in zip((-0.2, 0, 0.2), RUN_COLOURS, comparison.columns, strict=False):
        name, marker = HEAD_TO_TAIL_MARKS[column.metric]
        known = [(place, values) for place in order if (values := comparison.groups[place].values(column))]
        mean = np.array([100 * np.mean(values) for _, values in known])
        highest = max([highest, *mean])
        axis.errorbar(
            mean,
            np.array([place for place, _ in known], dtype=float) + offset,  # beside each other
            xerr=np.array([100 * _half_interval(values) for _, values in known]),
            color=colour,
            marker=marker,
            markersize=5,
            linestyle="",
            label=name,
        )
    axis.set_yticks(order, [fitted(group.title, ROW_LABEL) for group in comparison.groups], color=INK)
    axis.set_ylim(len(order) - 0.5, -0.5)
    _between(axis.set_xlim, highest)
    axis.set(xlabel="zero-shot top-1, %")
    figure.legend(loc="outside upper right", ncols=3, frameon=False)
    return svg(figure)


@styled
def difference_panels(comparison: GroupComparison) -> str:
    """Draw differences to the baseline with their intervals: a panel for each column, a row for each other group."""
    columns = [c for c, has in enumerate(comparison.with_difference) if has]
    rows = [g for g, base in enumerate(comparison.baselines) if base is not None]
    figure, cells = grid(1, len(columns), height=1.0 + 0.26 * len(rows), sharey=True)
    for axis, c in zip(cells[0], columns, strict=True):
        axis.axvline(0, color=FAINT, linewidth=1.0)
        for y, g in enumerate(rows):
            one = comparison.differences[g][c]
            if one is not None and one.interval is not None:
                colour = {1: RUN_COLOURS[0], -1: RUN_COLOURS[1]}.get(one.sign, FAINT)
                axis.hlines(y, 100 * one.interval.low, 100 * one.interval.high, color=colour, linewidth=2.0)
                axis.plot(100 * one.mean, y, color=colour, marker="o", markersize=5)
        axis.set_title(comparison.columns[c].head)
        axis.set(xlabel="points")
        axis.locator_params(axis="x", nbins=5)
    titles = [comparison.groups[g].title for g in rows]
    cells[0][0].set_yticks(range(len(rows)), [fitted(title, ROW_LABEL) for title in titles], color=INK)
    cells[0][0].set_ylim(len(rows) - 0.5, -0.5)
    return svg(figure)


@styled
def tau_chart(groups: Sequence[SeedGroup]) -> str:
    """Draw τ of the image side in the training batches: mean over the seeds, band from minimum to maximum."""
    figure, axes = _panels(len(groups), "τ")
    for axis, group in zip(axes, groups, strict=True):
        _tau_panel(axis, group)
    _from_zero(axes)
    tau_bounds(axes, [group.results[0].config["loss"] for group in groups])
    return svg(figure)


@styled
def frequency_chart(groups: Sequence[SeedGroup]) -> str:
    """Draw final τ against the training frequency of a concept: medians of bins, a line for each seed and side."""
    figure, axes = _panels(len(groups), "τ")
    for axis, group in zip(axes, groups, strict=True):
        frequency_panel(axis, group)
    _from_zero(axes)
    return svg(figure)


def frequency_panel(axis: Axes, group: SeedGroup) -> None:
    """Draw one group of `frequency_chart`; concepts without training samples are at 0, left of 1."""
    for result in group.results:
        curve = result.tau_by_frequency
        if not curve:
            continue
        for side in ("image", "text"):
            axis.plot(
                curve["frequency"], curve[side], color=SIDE_COLOURS[side], linewidth=1.1, marker="o", markersize=2.5
            )
    axis.set_xscale("symlog", linthresh=1)  # logarithmic from 1 on
    axis.set_xlabel("training samples", fontsize=9.0)
    _heading(axis, group.title)


def _panels(n: int, unit: str) -> tuple[Figure, list[Axes]]:
    """Return a figure with n panels that share the y axis, at most `PANELS_IN_A_ROW` in a row."""
    figure, cells = grid(-(-n // PANELS_IN_A_ROW), min(PANELS_IN_A_ROW, max(n, 3)), height=2.0, sharey=True)
    axes = [axis for row in cells for axis in row]
    for unused in axes[n:]:
        unused.set_visible(False)
    for row in cells:
        row[0].set_ylabel(unit)
    return figure, axes[:n]


def _from_zero(axes: Sequence[Axes]) -> None:
    """Let the shared y axis begin at 0. Call it last: setting a limit ends autoscaling."""
    axes[0].set_ylim(bottom=0)


def _heading(axis: Axes, title: str) -> None:
    axis.set_title(fitted(title, 26, lines=3), fontsize=9.0)


def _tau_panel(axis: Axes, group: SeedGroup) -> None:
    x, mean, low, high = tau_series(group)
    colour = SIDE_COLOURS["image"]
    axis.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)
    axis.plot(x, mean, color=colour, linewidth=1.7)
    epoch_axis(axis, "")
    _heading(axis, group.title)
