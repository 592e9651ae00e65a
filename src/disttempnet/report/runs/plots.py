"""Charts of runs as SVG images in data URIs, and the style of all charts.

The palette suits every common colour blindness (Okabe and Ito). Runs differ in hue and line style; the two sides of a
pair have light hues.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from textwrap import fill
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from disttempnet.evaluation.scores import metric_title, tasks_of
from disttempnet.evaluation.tasks import task_title
from disttempnet.report.accuracy_by_tau import AccuracyBin
from disttempnet.report.bins import evenly_spread
from disttempnet.report.page import TEMPLATES
from disttempnet.report.read import RunRecord, Temperatures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Arguments = ParamSpec("Arguments")
_BLOCKS = (TEMPLATES / "colours.css").read_text(encoding="utf-8").split("@media")  # light, dark
PALETTE, DARK_PALETTE = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in _BLOCKS)
RUN_COLOURS = tuple(colour for name, colour in PALETTE.items() if name.startswith("run-"))
RUN_STYLES = ("-", "--", "-.", ":")
SIDE_COLOURS = {side: PALETTE[side] for side in ("image", "text")}
PAPER, INK, FAINT = PALETTE["paper"], PALETTE["ink"], PALETTE["faint"]
RIDGES = 7  # snapshots shown at most
PANELS = 4  # in a row
TRAINING_CURVES = {
    "gamma": "inner learning rate γ",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tau_gradient/image_mean": "τ gradient, image side",
    "tau_gradient/text_mean": "τ gradient, text side",
    "samples_per_second": "samples per second",
    "data_wait": "waiting for data, % of the time",
}
SIGNED_CURVES = {"tau_gradient/image_mean", "tau_gradient/text_mean"}
PAGE_WIDTH = 11.0  # inches of a chart that fills the page
CHARACTER, LINE = 0.085, 0.22  # inches: a wide character, and a line of text, of 10 points
ROW_LABEL = 44  # characters of a line beside a row
LEGEND_LABEL, LEGEND_HANDLE = 44, 0.65  # characters of a line, inches of its mark and the gaps
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": PALETTE["axis"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": PALETTE["grid"],
    "axes.axisbelow": True,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "text.color": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
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


def page_colour(i: int) -> str:
    """Return the colour of a run for a page's style: it follows the screen from light to dark."""
    return f"var(--run-{i % len(RUN_COLOURS)})"


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
    outer_legend(figure, axes[0][0])
    return svg(figure)


@styled
def training_chart(runs: Sequence[RunRecord], titles: Sequence[str]) -> str:
    """Draw the loss of each run on its own axis (objectives have different units), then what all runs logged."""
    known = [(key, name) for key, name in TRAINING_CURVES.items() if any(len(_curve(run, key)[0]) for run in runs)]
    panels = len(runs) + len(known)
    columns = min(panels, PANELS)
    figure, cells = grid(-(-panels // columns), columns, height=2.5)
    axes = [axis for row in cells for axis in row]
    for unused in axes[panels:]:
        unused.set_visible(False)
    for i, (run, title, axis) in enumerate(zip(runs, titles, axes, strict=False)):
        _line(axis, *run.series("loss"), i, title)
        epoch_axis(axis, fitted(f"loss: {title}", _characters(columns)))
    for axis, (key, name) in zip(axes[len(runs) :], known, strict=False):
        for i, (run, title) in enumerate(zip(runs, titles, strict=True)):
            _line(axis, *_curve(run, key), i, title)
        epoch_axis(axis, name)
        if key not in SIGNED_CURVES:
            axis.set_ylim(bottom=0)
    return svg(figure)


def _curve(run: RunRecord, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (epochs, values) of one of `TRAINING_CURVES`."""
    epochs, values = run.series(key)
    if key == "data_wait":
        seconds = run.series("step_seconds")[1]
        if len(seconds) != len(values):
            return epochs[:0], values[:0]
        values = 100 * values / seconds
    return epochs, values


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
        epoch_axis(axis, fitted(f"τ: {title}", _characters(len(runs)), lines=3))
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("τ")
    tau_bounds(axes[0], [run.config.loss.arguments for run in runs])
    outer_legend(figure, axes[0][0])
    return svg(figure)


def tau_bounds(axes: Sequence[Axes], arguments: Sequence[Mapping[str, Any]]) -> None:
    """Write the bounds of τ into panels of one y axis, and draw those that lie on it. Call it last.

    Args:
        arguments: of the objective of each panel.
    """
    limits = axes[0].get_ylim()
    for axis, of_panel in zip(axes, arguments, strict=True):
        bounds = [of_panel[key] for key in ("tau_min", "tau_max") if key in of_panel]
        for bound in bounds:
            axis.axhline(bound, color=INK, linestyle=(0, (1, 3)), linewidth=1.0)
        if bounds:
            words = "bounds " + " and ".join(f"{bound:g}" for bound in bounds)
            axis.text(0.98, 0.97, words, transform=axis.transAxes, ha="right", va="top", fontsize=8.0, color=FAINT)
    axes[0].set_ylim(limits)


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
            axis.fill_between(centres, place, height, color=PAPER, zorder=order, linewidth=0)  # hides those behind
            axis.fill_between(centres, place, height, color=colour, alpha=opacity, zorder=order, linewidth=0)
            axis.plot(centres, height, color=INK, linewidth=0.8, zorder=order + 1)
        labels = [f"epoch {snapshot.epoch:.3g}" for snapshot in chosen]
        axis.set_yticks(range(len(chosen)), labels)
        axis.set(title=f"{side} side", xlabel="τ")
        axis.locator_params(axis="x", nbins=6)
        axis.spines["left"].set_visible(False)
        axis.grid(visible=False, axis="y")
    return svg(figure)


@styled
def accuracy_chart(panels: Sequence[tuple[str, Mapping[str, Sequence[AccuracyBin]], float]]) -> str:
    """Draw zero-shot top-1 of images in order of τ: a panel for each run and task, a line for each side, chance dotted.

    The axis is the place in that order and not τ itself, whose distribution may be so skewed that bins lie on each
    other.

    Args:
        panels: (title, side → bins, chance) each.
    """
    columns = min(len(panels), 2)
    figure, cells = grid(-(-len(panels) // columns), columns, height=2.8)
    axes = [axis for row in cells for axis in row]
    for unused in axes[len(panels) :]:
        unused.set_visible(False)
    for axis, (title, sides, chance) in zip(axes, panels, strict=False):
        for side, bins in sides.items():
            ends = np.cumsum([one.images for one in bins])
            centres = 100 * (ends - np.array([one.images for one in bins]) / 2) / ends[-1]
            reach = [[100 * abs(one.accuracy - one.interval[end]) for one in bins] for end in (0, 1)]
            axis.errorbar(
                centres,
                [100 * one.accuracy for one in bins],
                yerr=reach,
                color=SIDE_COLOURS[side],
                linestyle="-" if side == "image" else "--",
                label=f"by τ of the {side}",
                marker="o",
                markersize=3.5,
                capsize=2,
                linewidth=1.4,
            )
        axis.axhline(100 * chance, color=FAINT, linestyle=":", linewidth=1.2, label="chance")
        axis.set(title=fitted(title, _characters(columns)), xlim=(0, 100))
        axis.set(xlabel="images from the lowest to the highest τ, %", ylabel="top-1, %")
        axis.set_ylim(bottom=0)
    outer_legend(figure, max(axes, key=lambda axis: len(axis.get_legend_handles_labels()[1])))
    return svg(figure)


@styled
def scatter_chart(image_tau: np.ndarray, text_tau: np.ndarray) -> str:
    """Draw τ of the image side against τ of the text side, a point for each training pair."""
    figure, axes = grid(1, 1, height=3.6, width=3.9)
    shown = list(evenly_spread(len(image_tau), 4000))
    points = image_tau[shown], text_tau[shown]
    axes[0][0].scatter(*points, s=5, color=SIDE_COLOURS["image"], alpha=0.35, linewidth=0, rasterized=True)
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


def outer_legend(figure: Figure, axis: Axes, loc: str = "outside upper left", most: int = 0) -> None:
    """Put the legend of an axis outside of all axes: as many columns as fit beside each other, and room for
    its rows from the third on.

    Args:
        loc: as matplotlib has it.
        most: columns at most; 0 = no limit.
    """
    handles, labels = axis.get_legend_handles_labels()
    if not handles:
        return
    width, height = figure.get_size_inches()
    labels = [fitted(label, LEGEND_LABEL) for label in labels]
    longest = max(len(line) for label in labels for line in label.split("\n"))
    columns = min(len(labels), most or len(labels), max(1, int(width / (LEGEND_HANDLE + CHARACTER * longest))))
    lines = -(-len(labels) // columns) * max(label.count("\n") + 1 for label in labels)
    figure.set_size_inches(width, height + LINE * max(0, lines - 2))
    figure.legend(handles, labels, loc=loc, ncols=columns, frameon=False, fontsize=10)


def fitted(title: str, width: int, lines: int = 2) -> str:
    """Return a title in lines of `width` characters; what is too long for them is left out in its middle."""
    text, kept = fill(title, width), width * lines
    while text.count("\n") >= lines:
        kept -= 1
        text = fill(f"{title[: kept // 2]}…{title[-(kept // 2) :]}", width)
    return text


def _characters(columns: int) -> int:
    """Return the characters of a title that fit above one of so many panels beside each other."""
    return max(8, int((PAGE_WIDTH / columns - 0.4) / CHARACTER))


def _padded_range(values: np.ndarray) -> tuple[float, float]:
    """Return the range of the values without the outermost 0.1 % at each end, which would flatten the rest."""
    low, high = np.quantile(values, [0.001, 0.999]).tolist()
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _smooth(counts: np.ndarray) -> np.ndarray:
    """Return counts smoothed by a Gaussian of 1.5 bins, so that a ridge shows the shape and not the bins."""
    kernel = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    return np.convolve(counts, kernel / kernel.sum(), mode="same")


def svg(figure: Figure) -> str:
    """Return the figure as an SVG data URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg_text(figure).encode()).decode()


def svg_text(figure: Figure) -> str:
    """Return the figure as SVG, dark on a dark screen; equal data give equal bytes.

    Text stays text in the font of the page.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=150, metadata={"Date": None, "Creator": None})
    text = re.sub(r"'DejaVu Sans'[^;]*sans-serif", "system-ui, sans-serif", buffer.getvalue())
    rules = "".join(
        f'[style*="{what}: {light}"]{{{what}:{DARK_PALETTE[name]}!important}}'
        for name, light in PALETTE.items()
        for what in ("fill", "stroke")
        if f"{what}: {light}" in text
    )
    style = f"<style>@media (prefers-color-scheme: dark){{{rules}}}</style>"
    return re.sub(r"(<svg[^>]*>)", lambda found: found[1] + style, text, count=1)
