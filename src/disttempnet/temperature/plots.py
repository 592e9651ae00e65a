"""Charts about the temperatures of a data set, in the style of the report's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from disttempnet.report.bins import Binned, evenly_spread
from disttempnet.report.runs.plots import FAINT, INK, PAGE_WIDTH, PALETTE, SIDE_COLOURS, grid, styled, svg
from disttempnet.temperature.analysis import Cluster, Parameter, Projection

POINTS = 4000  # of a scatter plot
SIDE_STYLES = {"image": "-", "text": "--"}


@styled
def distribution_chart(tau: Mapping[str, np.ndarray]) -> str:
    """Draw the distribution of τ: a histogram, and all values in order."""
    figure, axes = grid(1, 2, height=3.0)
    values = np.concatenate(list(tau.values()))
    edges = _edges(values)
    for side, of_side in tau.items():
        style: dict[str, Any] = {"color": SIDE_COLOURS[side], "linestyle": SIDE_STYLES[side], "label": f"{side} side"}
        axes[0][0].hist(of_side, edges, color=SIDE_COLOURS[side], alpha=0.3)
        axes[0][0].hist(of_side, edges, histtype="step", linewidth=1.5, **style)
        shown = evenly_spread(len(of_side), 1000)
        axes[0][1].plot(100 * shown / max(len(of_side) - 1, 1), np.sort(of_side)[shown], linewidth=1.8, **style)
    axes[0][0].set(title="Histogram", xlabel="τ", ylabel="samples")
    axes[0][1].set(title="In order", xlabel="% of the samples with a lower τ", ylabel="τ")
    axes[0][1].legend(frameon=False)
    return svg(figure)


@styled
def binned_chart(bins: Binned, what: str) -> str:
    """Draw τ against a number: a faint point a sample, median and quartiles a bin."""
    figure, axes = grid(1, len(bins.tau), height=3.2, sharey=True)
    jitter = np.random.default_rng(0).uniform(-0.3, 0.3, len(bins.of_item))
    shown = evenly_spread(len(bins.of_item), POINTS)
    for axis, (side, tau) in zip(axes[0], bins.tau.items(), strict=True):
        colour = SIDE_COLOURS[side]
        places = (bins.of_item + jitter)[shown]
        axis.scatter(places, tau[shown], s=4, color=colour, alpha=0.25, linewidth=0, rasterized=True)
        low, middle, high = bins.quartiles[side]
        x = np.arange(len(bins.names))
        axis.vlines(x, low, high, color=INK, linewidth=2.2)
        axis.plot(x, middle, color=INK, marker="o", markersize=5, linewidth=1.0)
        names = [f"{name}\n({size})" for name, size in zip(bins.names, bins.sizes, strict=True)]
        axis.set_xticks(x, names, fontsize=8)
        correlation = bins.correlation[side]
        told = "does not vary" if correlation is None else f"Spearman {correlation:+.2f}"
        axis.set(title=f"{side} side: {told}", xlabel=what)
        axis.grid(visible=False, axis="x")
    axes[0][0].set_ylabel("τ")
    return svg(figure)


@styled
def cluster_chart(found: Sequence[Cluster]) -> str:
    """Draw τ in each cluster: a box from quartile to quartile, whiskers from 5 to 95 %."""
    sides = list(found[0].tau)
    figure, axes = grid(1, len(sides), height=0.8 + 0.3 * len(found), sharey=True)
    for axis, side in zip(axes[0], sides, strict=True):
        boxes = axis.boxplot(
            [cluster.tau[side] for cluster in found],
            orientation="horizontal",
            whis=(5, 95),
            showfliers=False,
            patch_artist=True,
            widths=0.62,
            medianprops={"color": INK, "linewidth": 1.6},
            whiskerprops={"color": FAINT},
            capprops={"color": FAINT},
            tick_labels=[str(number) for number in range(1, len(found) + 1)],
        )
        for box in boxes["boxes"]:
            box.set(facecolor=SIDE_COLOURS[side], alpha=0.55, edgecolor=FAINT)
        axis.set(title=f"{side} side", xlabel="τ")
        axis.locator_params(axis="x", nbins=6)
        axis.grid(visible=False, axis="y")
    axes[0][0].set_ylabel("cluster")
    axes[0][0].invert_yaxis()
    return svg(figure)


@styled
def projection_chart(found: Mapping[str, Projection]) -> str:
    """Draw features coloured by τ, with the prototypes among them, on two principal axes."""
    figure, axes = grid(1, len(found), height=4.6, width=PAGE_WIDTH if len(found) > 1 else PAGE_WIDTH / 2)
    for axis, (side, projection) in zip(axes[0], found.items(), strict=True):
        shown = evenly_spread(len(projection.anchors), POINTS)
        if len(projection.others):
            x, y = projection.others[shown].T
            axis.scatter(
                x, y, s=4, color=FAINT, alpha=0.25, linewidth=0, rasterized=True, label="the other side's features"
            )
        low, high = np.quantile(projection.tau, [0.02, 0.98])
        x, y = projection.anchors[shown].T
        points = axis.scatter(
            x, y, c=projection.tau[shown], s=7, cmap="viridis", vmin=low, vmax=high, linewidth=0, rasterized=True,
            label="features of this side, coloured by τ",
        )  # fmt: skip
        x, y = projection.prototypes.T
        axis.scatter(x, y, s=22, color=PALETTE["prototype"], marker="x", linewidth=1.0, label="prototypes")
        figure.colorbar(points, ax=axis, label="τ", shrink=0.8)
        first, second = (f"{100 * share:.0f} %" for share in projection.explained)
        axis.set(title=f"{side} side", xlabel=f"first axis ({first} of the variance)", ylabel=f"second axis ({second})")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False)
    return svg(figure)


@styled
def parameter_chart(found: Mapping[str, Sequence[Parameter]]) -> str:
    """Draw a histogram of each learned tensor, both sides in one panel."""
    names = list(dict.fromkeys(p.name for of_side in found.values() for p in of_side if p.values.size > 1))
    columns = min(4, len(names))
    figure, cells = grid(-(-len(names) // columns), columns, height=2.4)
    axes: list[Any] = [axis for row in cells for axis in row]
    for unused in axes[len(names) :]:
        unused.set_visible(False)
    for axis, name in zip(axes, names, strict=False):
        shown = {side: p.values for side, of_side in found.items() for p in of_side if p.name == name}
        values = np.concatenate(list(shown.values()))
        edges = _edges(values)
        for side, of_side in shown.items():
            style: dict[str, Any] = {"color": SIDE_COLOURS.get(side, INK), "linestyle": SIDE_STYLES.get(side, "-")}
            axis.hist(of_side, edges, histtype="step", linewidth=1.4, label=f"{side} side", **style)
        axis.set(title=name, yticks=[])
        axis.locator_params(axis="x", nbins=4)
    axes[0].legend(frameon=False, fontsize=8)
    return svg(figure)


def _edges(values: np.ndarray) -> list[float]:
    """Return the edges of 60 bins; around equal values they are wide enough to read."""
    low, high = float(values.min()), float(values.max())
    margin = 0.0 if high - low > 1e-6 * max(abs(low), abs(high)) else 0.5 * (abs(high) or 1.0)
    return np.linspace(low - margin, high + margin + 1e-12, 61).tolist()
