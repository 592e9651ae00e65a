"""Correlations of τ with concept frequency and caption ambiguity, clusters, and learned parameters.

Shapes: n items, m embedded ones, D width, k clusters, M prototypes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from disttempnet.report.bins import spearman
from disttempnet.report.items import PAIR
from disttempnet.temperature.statistics import TemperatureStatistics

CLUSTERS = 12


def correlation_lines(statistics: TemperatureStatistics) -> list[str]:
    """Return a line each on Spearman's rank correlation of τ with concept frequency and caption ambiguity."""
    ambiguity, meaning = statistics.ambiguity()
    lines = []
    for name, values in (
        (f"how many samples have its {statistics.frequency_by}", statistics.frequency()),
        (f"ambiguity of the caption ({meaning.replace('`', '')})", ambiguity),
    ):
        known = np.isfinite(values)
        found = {
            side: spearman(values[known], statistics.column(side)[known].astype(float)) for side in statistics.sides
        }
        told = ", ".join(f"{side} {value:+.2f}" for side, value in found.items() if value is not None)
        if told:
            lines.append(f"τ and {name}, rank correlation: {told}")
    return lines


class Cluster(NamedTuple):
    """Samples of like features, with τ of each side; `rows` of the statistics, nearest to the centre first."""

    rows: np.ndarray
    tau: dict[str, np.ndarray]


def clusters(statistics: TemperatureStatistics) -> list[Cluster]:
    """Return k-means clusters of the embedded features (of images where there are any), by their median τ."""
    side = statistics.sides[0]
    features = statistics.features(side)
    assigned, centres = k_means(features, min(CLUSTERS, len(features) // 10))
    distance = (features - centres[assigned]).norm(dim=1).numpy()
    rows = np.flatnonzero(statistics.column("embedded"))
    tau = {s: statistics.embedded(s) for s in statistics.sides}
    found = []
    for number in range(len(centres)):
        members = np.flatnonzero(assigned.numpy() == number)
        members = members[np.argsort(distance[members], kind="stable")]
        if len(members):
            found.append(Cluster(rows[members], {s: values[members] for s, values in tau.items()}))
    return sorted(found, key=lambda cluster: float(np.median(cluster.tau[side])))


def k_means(features: Tensor, k: int, rounds: int = 50) -> tuple[Tensor, Tensor]:
    """Return (cluster of each row, int64 [m]; centres [k, D]): k-means++ with a fixed seed, then Lloyd's iterations."""
    k = max(k, 1)
    generator = torch.Generator().manual_seed(0)
    centres = features[torch.randint(len(features), (1,), generator=generator)]
    for _ in range(k - 1):
        nearest = torch.cdist(features, centres).amin(1).square()
        if not nearest.any():
            break
        centres = torch.cat([centres, features[torch.multinomial(nearest, 1, generator=generator)]])
    assigned = torch.cdist(features, centres).argmin(1)
    for _ in range(rounds):
        sums = torch.zeros_like(centres).index_add_(0, assigned, features)
        counts = torch.bincount(assigned, minlength=len(centres))[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
        before, assigned = assigned, torch.cdist(features, centres).argmin(1)
        if torch.equal(before, assigned):
            break
    return assigned, centres


class Projection(NamedTuple):
    """Features and prototypes on their first two principal axes.

    Attributes:
        anchors: [m, 2] of the side's features; tau [m].
        others: [m, 2] of the other side's, or empty.
        prototypes: [M, 2].
        explained: share of the variance on each axis.
    """

    anchors: np.ndarray
    tau: np.ndarray
    others: np.ndarray
    prototypes: np.ndarray
    explained: tuple[float, float]


def projections(statistics: TemperatureStatistics, loss: nn.Module) -> dict[str, Projection]:
    """Return side → its network's prototypes among the features; empty where there is no network with prototypes."""
    learned, found = parameters(loss), {}
    for side in statistics.sides:
        own = [p for p in learned.get(side, []) if p.name == "prototypes"]
        if not own:
            continue
        prototypes = nn.functional.normalize(torch.from_numpy(own[0].values).view(own[0].shape), dim=1)
        anchors = statistics.features(side)
        others = [statistics.features(other) for other in statistics.sides if other != side]
        parts = [anchors, prototypes, *others]
        points, explained = principal_axes(torch.cat(parts))
        split = [part.numpy() for part in points.split([len(part) for part in parts])]
        no_others = np.empty((0, 2), dtype=np.float32)
        found[side] = Projection(
            split[0], statistics.embedded(side), split[2] if others else no_others, split[1], explained
        )
    return found


def principal_axes(rows: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """Return coordinates [m, 2] of rows [m, D] on their first two principal axes, and the variance shares of these."""
    centred = rows.double() - rows.double().mean(0)
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(rows))
    axes = axes[:, [-1, -2]]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # an axis has no sign of its own
    shares = (variances[[-1, -2]] / variances.sum().clamp(min=1e-30)).tolist()
    return (centred @ axes).float(), (shares[0], shares[1])


class Parameter(NamedTuple):
    """One learned tensor: its name, a note where that helps, and its values."""

    name: str
    note: str
    values: np.ndarray
    shape: tuple[int, ...]


_NOTES = {
    "weight": "of the hidden layer",
    "bias": "of the hidden layer",
    "prototypes": "compared with the hidden layer as unit rows",
    "out_weight": "from prototypes (mlp: hidden units) to τ",
    "out_weight_1": "of the attended prototypes",
    "out_weight_2": "of all prototypes",
    "out_bias": "of τ before its sigmoid",
    "scaler": "log of the softmax temperature over prototypes",
    "logit_scale": "log of 1/τ",
}


def parameters(loss: nn.Module) -> dict[str, list[Parameter]]:
    """Return side (or `both`, where they share them) → parameters that an objective has learned."""
    found: dict[str, list[Parameter]] = {}
    for name, tensor in loss.named_parameters():
        *folders, own = name.split(".")
        side = next((folder for folder in folders if folder in PAIR), "both")
        values = tensor.detach().float().cpu().numpy()
        found.setdefault(side, []).append(Parameter(own, _NOTES.get(own, ""), values.ravel(), values.shape))
    return found
