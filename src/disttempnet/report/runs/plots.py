"""Charts of runs as SVG images in data URIs, and the style of all charts.

The palette suits every common colour blindness (Okabe and Ito). Runs differ in hue and line style; the two sides of a
pair have light hues.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from disttempnet.evaluation.scores import metric_title, tasks_of
from disttempnet.evaluation.tasks import task_title
from disttempnet.report.bins import evenly_spread
from disttempnet.report.read import RunRecord, Temperatures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Arguments = ParamSpec("Arguments")
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7A5C00", "#555555")
RUN_STYLES = ("-", "--", "-.", ":")
SIDE_COLOURS = {"image": "#2A9FD6", "text": "#E69F00"}
INK, FAINT = "#2b2f36", "#8a919c"
RIDGES = 7  # snapshots shown at most
PANELS = 4  # in a row
PAGE_WIDTH = 11.0  # inches of a chart that fills the page
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": "#c9ced6",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e9ecf0",
    "axes.axisbelow": True,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "text.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "disttempnet",
}


def styled(chart: Callable[Arguments, str]) -> Callable[Arguments, str]:
    """Decorate a chart to use the style of the page. matplotlib is imported with the first chart."""

    @wraps(chart)
    def draw(*args: Arguments.args, **kwargs: Arguments.kwargs) -> str:
        from matplotlib import rc_context

        with rc_context(_STYLE):
            return chart(*args, **kwargs)

    return draw


def run_colour(i: int) -> str:
    return RUN_COLOURS[i % len(RUN_COLOURS)]


@styled
def quality_chart(runs: Sequence[RunRecord], titles: Sequence[str]) -> str:
    """Draw zero-shot top-1 and mean recall over the epochs: a row for each task, a line for each run, chance dotted."""
    tasks = tasks_of([evaluation.scores for run in runs for evaluation in run.evaluations])
    figure, axes = grid(len(tasks), 2, height=2.5)
    for row, task in zip(axes, tasks, strict=True):
        for axis, metric in zip(row, ("acc1", "mean_recall"), strict=True):
            chance = 0.0
            for i, (run, title) in enumerate(zip(runs, titles, strict=True)):
                points = [(e.epoch, e.scores[task]) for e in run.evaluations if task in e.scores]
                points = [(epoch, scores) for epoch, scores in points if metric in scores.metrics]
                if points:
                    chance = points[-1][1].chance.get(metric, 0.0)
                    values = [100 * scores.metrics[metric] for _, scores in points]
                    _line(axis, [epoch for epoch, _ in points], values, i, title, marker="o")
            axis.axhline(100 * chance, color=FAINT, linestyle=":", linewidth=1.2, label="chance")
            epoch_axis(axis, f"{task_title(task)}: {metric_title(metric)}")
            axis.set_ylabel("%")
            axis.set_ylim(bottom=0)
    _legend(figure, axes[0][0])
    return svg(figure)


@styled
def training_chart(runs: Sequence[RunRecord], titles: Sequence[str]) -> str:
    """Draw the loss of each run on its own axis (objectives have different units), then γ and the learning rate."""
    panels, columns = len(runs) + 2, min(len(runs) + 2, PANELS)
    figure, cells = grid(-(-panels // columns), columns, height=2.5)
    axes = [axis for row in cells for axis in row]
    for unused in axes[panels:]:
        unused.set_visible(False)
    for i, (run, title, axis) in enumerate(zip(runs, titles, axes, strict=False)):
        _line(axis, *run.series("loss"), i, title)
        epoch_axis(axis, f"loss: {title}")
    for axis, key, name in (
        (axes[panels - 2], "gamma", "inner learning rate γ"),
        (axes[panels - 1], "lr", "learning rate"),
    ):
        for i, (run, title) in enumerate(zip(runs, titles, strict=True)):
            _line(axis, *run.series(key), i, title)
        epoch_axis(axis, name)
        if key == "gamma":
            axis.set_ylim(0, 1.05)
    return svg(figure)


@styled
def temperature_chart(runs: Sequence[RunRecord], titles: Sequence[str]) -> str:
    """Draw τ of the training batches over the epochs, a panel for each run: mean, minimum and maximum of each side."""
    figure, axes = grid(1, len(runs), height=2.8, sharey=True)
    for run, title, axis in zip(runs, titles, axes[0], strict=True):
        for side, colour in SIDE_COLOURS.items():
            epochs, mean = run.series(f"tau/{side}_mean")
            _, low = run.series(f"tau/{side}_min")
            _, high = run.series(f"tau/{side}_max")
            if len(low) == len(mean) == len(high):
                axis.fill_between(epochs, low, high, color=colour, alpha=0.22, linewidth=0)
            axis.plot(epochs, mean, color=colour, linestyle="-" if side == "image" else "--", label=f"{side} side")
        epoch_axis(axis, f"τ: {title}")
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("τ")
    _legend(figure, axes[0][0])
    return svg(figure)


@styled
def ridge_chart(snapshots: Sequence[Temperatures]) -> str:
    """Draw histograms of τ over time, earliest at the bottom, a column for each side."""
    chosen = [snapshots[i] for i in evenly_spread(len(snapshots), RIDGES)]
    figure, axes = grid(1, 2, height=0.9 + 0.5 * len(chosen))
    for axis, (side, colour) in zip(axes[0], SIDE_COLOURS.items(), strict=True):
        arrays = [getattr(snapshot, side) for snapshot in chosen]
        edges = np.linspace(*_padded_range(np.concatenate(arrays)), 81)
        centres = (edges[1:] + edges[:-1]) / 2
        for place, values in enumerate(arrays):
            density = _smooth(np.histogram(values, edges)[0].astype(float))
            height = place + 1.5 * density / density.max()
            order = 2 * (len(arrays) - place)  # earlier ridges in front of later ones
            opacity = 0.35 + 0.6 * (place + 1) / len(arrays)
            axis.fill_between(centres, place, height, color=_mixed(colour, opacity), zorder=order, linewidth=0)
            axis.plot(centres, height, color=INK, linewidth=0.8, zorder=order + 1)
        labels = [f"epoch {snapshot.epoch:.3g}" for snapshot in chosen]
        axis.set_yticks(range(len(chosen)), labels)
        axis.set(title=f"{side} side", xlabel="τ")
        axis.locator_params(axis="x", nbins=6)
        axis.spines["left"].set_visible(False)
        axis.grid(visible=False, axis="y")
    return svg(figure)


@styled
def scatter_chart(image_tau: np.ndarray, text_tau: np.ndarray) -> str:
    """Draw τ of the image side against τ of the text side, a point for each training pair."""
    figure, axes = grid(1, 1, height=3.6, width=3.9)
    shown = list(evenly_spread(len(image_tau), 4000))
    points = image_tau[shown], text_tau[shown]
    axes[0][0].scatter(*points, s=5, color=RUN_COLOURS[0], alpha=0.25, linewidth=0, rasterized=True)
    axes[0][0].set(xlabel="τ, image side", ylabel="τ, text side")
    return svg(figure)


def grid(
    rows: int, columns: int, height: float, width: float = PAGE_WIDTH, sharey: bool = False
) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure without pyplot's global state, and its axes as rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * rows), layout="constrained")
    axes: np.ndarray = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    return figure, axes.tolist()


def epoch_axis(axis: Axes, title: str) -> None:
    """Set the title and the axis of epochs."""
    axis.set(title=title, xlabel="epoch")
    axis.locator_params(axis="x", nbins=6, integer=True)


def _line(axis: Axes, x: Any, y: Any, i: int, label: str, marker: str = "") -> None:
    if len(x):
        style = RUN_STYLES[i % len(RUN_STYLES)]
        axis.plot(x, y, color=run_colour(i), linestyle=style, marker=marker, markersize=4, linewidth=1.7, label=label)


def _legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False, fontsize=10)


def _padded_range(values: np.ndarray) -> tuple[float, float]:
    """Return the range of the values without the outermost 0.1 % at each end, which would flatten the rest."""
    low, high = np.quantile(values, [0.001, 0.999]).tolist()
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _smooth(counts: np.ndarray) -> np.ndarray:
    """Return counts smoothed by a Gaussian of 1.5 bins, so that a ridge shows the shape and not the bins."""
    kernel = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    return np.convolve(counts, kernel / kernel.sum(), mode="same")


def _mixed(colour: str, strength: float) -> tuple[float, ...]:
    """Return a colour mixed with white. It is opaque, so that a ridge hides the one behind it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return tuple(1 - strength * (1 - part) for part in parts)


def svg(figure: Figure) -> str:
    """Return the figure as an SVG data URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg_text(figure).encode()).decode()


def svg_text(figure: Figure) -> str:
    """Return the figure as SVG. Text stays text in the font of the page; equal data give equal bytes."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=150, metadata={"Date": None, "Creator": None}, transparent=True)
    return re.sub(r"'DejaVu Sans'[^;]*sans-serif", "system-ui, sans-serif", buffer.getvalue())
