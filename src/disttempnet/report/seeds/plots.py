"""Charts over groups of seeds: small multiples, each group in colour before the others in grey."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from disttempnet.report.runs.plots import (
    FAINT,
    INK,
    PALETTE,
    RUN_COLOURS,
    SIDE_COLOURS,
    epoch_axis,
    grid,
    styled,
    svg,
    tau_bounds,
)
from disttempnet.report.seeds.comparison import GroupComparison
from disttempnet.report.seeds.groups import HEAD_TO_TAIL, Cell, Column, SeedGroup, cell_of
from disttempnet.report.seeds.tau_tables import tau_series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


PANELS_IN_A_ROW = 5
HEAD_TO_TAIL_MARKS = dict(zip(HEAD_TO_TAIL, (("head", "o"), ("middle", "s"), ("tail", "^")), strict=True))


class Series(NamedTuple):
    """A line over x with the spread of its seeds, in per cent: three float arrays of equal length."""

    title: str
    x: np.ndarray
    mean: np.ndarray
    std: np.ndarray


def learning_series(group: SeedGroup, column: Column) -> Series:
    """Return a metric after each evaluation that all seeds have made."""
    points: dict[float, list[float]] = {}
    for result in group.results:
        for evaluation in result.evaluations:
            scores = evaluation.scores.get(column.task)
            if scores is not None and column.metric in scores.metrics:
                points.setdefault(evaluation.epoch, []).append(scores.metrics[column.metric])
    shared = {epoch: cell_of(values) for epoch, values in points.items() if len(values) == len(group.results)}
    return _series(group.title, shared)


def batch_series(family: Sequence[SeedGroup], column: Column) -> Series:
    """Return a final metric against the global batch."""
    return _series(family[0].line, {group.batch: group.cell(column) for group in family})


def _series(title: str, points: dict[float, Cell | None] | dict[int, Cell | None]) -> Series:
    known = sorted((x, cell) for x, cell in points.items() if cell is not None)
    x = np.array([x for x, _ in known], dtype=float)
    mean = 100 * np.array([cell.mean for _, cell in known], dtype=float)
    std = 100 * np.array([cell.std or 0.0 for _, cell in known], dtype=float)
    return Series(title, x, mean, std)


@styled
def line_chart(series: Sequence[Series], chance: float | None, over_batch: bool) -> str:
    """Draw a panel for each series: it in colour with mean ± std, the others in grey, chance dotted.

    Args:
        chance: share in [0, 1].
        over_batch: x is the global batch (powers of two, error bars), else epochs (bands).
    """
    figure, axes = _panels(len(series), "%")
    for axis, own in zip(axes, series, strict=True):
        for other in series:
            if other is not own:
                axis.plot(other.x, other.mean, color=PALETTE["others"], linewidth=1.0, zorder=1)
        if over_batch:
            axis.errorbar(own.x, own.mean, own.std, color=RUN_COLOURS[0], marker="o", markersize=4, capsize=3, zorder=3)
            axis.set_xscale("log", base=2)
            ticks = sorted({x for one in series for x in one.x})
            axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axis.set(xlabel="global batch")
        else:
            low, high = own.mean - own.std, own.mean + own.std
            axis.fill_between(own.x, low, high, color=RUN_COLOURS[0], alpha=0.25, linewidth=0, zorder=2)
            axis.plot(own.x, own.mean, color=RUN_COLOURS[0], marker="o", markersize=3, linewidth=1.7, zorder=3)
            epoch_axis(axis, "")
        if chance is not None:
            axis.axhline(100 * chance, color=FAINT, linestyle=":", linewidth=1.1)
        _heading(axis, own.title)
    _from_zero(axes)
    return svg(figure)


@styled
def parts_chart(comparison: GroupComparison, task: str) -> str:
    """Draw accuracy on frequent, middling and rare concepts: a row for each group, mean ± std."""
    order = list(range(len(comparison.groups)))
    figure, cells = grid(1, 1, height=1.1 + 0.3 * len(order))
    axis = cells[0][0]
    for (metric, (name, marker)), colour in zip(HEAD_TO_TAIL_MARKS.items(), RUN_COLOURS, strict=False):
        column = Column(task, metric)
        known = [(place, cell) for place in order if (cell := comparison.groups[place].cell(column)) is not None]
        places = np.array([place for place, _ in known], dtype=float)
        mean = np.array([100 * cell.mean for _, cell in known])
        std = np.array([100 * (cell.std or 0.0) for _, cell in known])
        axis.errorbar(
            mean, places, xerr=std, color=colour, marker=marker, markersize=6, linestyle="", capsize=3, label=name
        )
    axis.set_yticks(order, [group.title for group in comparison.groups], color=INK)
    axis.set_ylim(len(order) - 0.5, -0.5)
    axis.set_xlim(left=0)
    axis.set(xlabel="zero-shot top-1, %")
    figure.legend(loc="outside upper right", ncols=3, frameon=False)
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
    axis.set_title(fill(title, 26), fontsize=9.0)


def _tau_panel(axis: Axes, group: SeedGroup) -> None:
    x, mean, low, high = tau_series(group)
    colour = SIDE_COLOURS["image"]
    axis.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)
    axis.plot(x, mean, color=colour, linewidth=1.7)
    epoch_axis(axis, "")
    _heading(axis, group.title)
