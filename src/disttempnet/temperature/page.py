"""Builds the page about the temperatures of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from disttempnet.data.images import UnreadableImage
from disttempnet.losses import OBJECTIVES
from disttempnet.report.bins import binned, spearman
from disttempnet.report.page import open_template, publish
from disttempnet.report.runs.examples import picture
from disttempnet.report.runs.plots import scatter_chart
from disttempnet.temperature import analysis, plots
from disttempnet.temperature.analysis import Parameter
from disttempnet.temperature.statistics import TemperatureStatistics
from disttempnet.training.checkpoint import Run

EXTREMES = 20
OF_CLUSTER = 6  # examples
QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
SAME = 1e-6  # a smaller range of τ is one temperature


class ShownItem(NamedTuple):
    """Item as shown: a picture (empty for captions), its words, its τ (NaN where that side is absent)."""

    picture: str
    caption: str
    image: float
    text: float


def write_page(run: Run, statistics: TemperatureStatistics, out: Path) -> Path:
    """Write the page: one HTML file that loads nothing and needs no JavaScript."""
    tau = {side: statistics.column(side).astype(float) for side in statistics.sides}
    own = any(np.ptp(values) > SAME for values in tau.values())
    learned = analysis.parameters(run.loss)
    several = any(p.values.size > 1 for of_side in learned.values() for p in of_side)
    page = open_template("temperature.html").render(
        title=f"Temperatures of {run.config.name}",
        objective=OBJECTIVES[run.config.loss.name].title,
        run=run,
        about=statistics.items.about,
        count=len(statistics),
        skipped=statistics.skipped,
        sides=statistics.sides,
        own=own,
        quantiles={side: np.quantile(values, QUANTILES).tolist() for side, values in tau.items()},
        quantile_names=("lowest", "5 %", "25 %", "median", "75 %", "95 %", "highest"),
        parameters={side: [_about(p) for p in of_side] for side, of_side in learned.items()},
        parameter_chart=plots.parameter_chart(learned) if several else "",
        **(_analyses(run, statistics, tau) if own else {}),
    )
    return publish(out, page)


def _analyses(run: Run, statistics: TemperatureStatistics, tau: dict[str, np.ndarray]) -> dict[str, Any]:
    frequency = binned(statistics.frequency(), tau)
    ambiguity, meaning = statistics.ambiguity()
    ambiguous = binned(ambiguity, tau)
    projected = analysis.projections(statistics, run.loss)
    found = analysis.clusters(statistics)
    pair, by = len(tau) == 2, statistics.frequency_by
    return {
        "distribution_chart": plots.distribution_chart(tau),
        "scatter_chart": scatter_chart(tau["image"], tau["text"]) if pair else "",
        "pair_correlation": spearman(tau["image"], tau["text"]) if pair else None,
        "extremes": [
            (side, end, _tiles(statistics, rows))
            for side in statistics.sides
            for end, rows in statistics.extremes(side, EXTREMES).items()
        ],
        "frequency_by": by,
        "frequency_chart": plots.binned_chart(frequency, f"samples of the same {by}") if frequency else "",
        "ambiguity_chart": plots.binned_chart(ambiguous, "ambiguity of the caption") if ambiguous else "",
        "ambiguity_meaning": meaning,
        "projection_chart": plots.projection_chart(projected) if projected else "",
        "prototypes": {side: len(projection.prototypes) for side, projection in projected.items()},
        "embedded": int(statistics.column("embedded").sum()),
        "cluster_chart": plots.cluster_chart(found),
        "clusters": [
            {
                "size": len(cluster.rows),
                "median": {side: float(np.median(values)) for side, values in cluster.tau.items()},
                "tiles": _tiles(statistics, cluster.rows[:OF_CLUSTER]),
            }
            for cluster in found
        ],
    }


def _tiles(statistics: TemperatureStatistics, rows: Sequence[int] | np.ndarray) -> list[ShownItem]:
    taus = zip(
        statistics.column("image")[list(rows)].tolist(), statistics.column("text")[list(rows)].tolist(), strict=True
    )
    tiles = []
    for item, (image, text) in zip(statistics.read(rows), taus, strict=True):
        shown = ""
        if "image" in statistics.sides:
            try:
                shown = picture(item)
            except UnreadableImage:  # deleted in the meantime
                continue
        tiles.append(ShownItem(shown, item.captions[0] or item.key, image, text))
    return tiles


def _about(parameter: Parameter) -> dict[str, Any]:
    values = parameter.values
    return {
        "name": parameter.name,
        "note": parameter.note,
        "shape": " × ".join(map(str, parameter.shape)) or "one number",
        "norm": float(np.linalg.norm(values)),
        "mean": float(values.mean()),
        "std": float(values.std()),
        "low": float(values.min()),
        "high": float(values.max()),
        "exp": float(np.exp(values[0])) if parameter.name in ("scaler", "logit_scale") else None,
    }
