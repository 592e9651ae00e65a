"""Zero-shot accuracy against τ of the test pairs: bins of about equal size, each with its 95 % interval (Wilson)."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

LEAST_IN_A_BIN = 20  # images; fewer bins where there are few images
MOST_BINS = 8
LEAST_SPREAD = 1e-6  # of τ; below it a constant is rounded
Z = 1.959964  # of 95 %


class AccuracyBin(NamedTuple):
    """Images whose τ lies in a range.

    Attributes:
        low, high: lowest and highest τ in it.
        images: their number; right: of those classified right.
        interval: of the accuracy, 95 %.
    """

    low: float
    high: float
    images: int
    right: int
    interval: tuple[float, float]

    @property
    def accuracy(self) -> float:
        return self.right / self.images


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, after Wilson: inside [0, 1], also where none or all are right."""
    share, z = right / count, Z * Z / count
    centre = (share + z / 2) / (1 + z)
    reach = Z * math.sqrt(share * (1 - share) / count + z / (4 * count)) / (1 + z)
    return max(0.0, centre - reach), min(1.0, centre + reach)


def accuracy_by_tau(tau: np.ndarray, right: np.ndarray) -> list[AccuracyBin]:
    """Return the bins in order of τ, of about equal size; equal τ share a bin.

    Args:
        tau: float [n].
        right: bool [n].

    Returns:
        Fewer than two bins, as an empty list, say nothing: too few images, or τ without spread.
    """
    bins = min(MOST_BINS, len(tau) // LEAST_IN_A_BIN)
    if bins < 2 or np.ptp(tau) < LEAST_SPREAD:
        return []
    edges = np.unique(np.sort(tau)[np.arange(bins) * len(tau) // bins])
    place = np.searchsorted(edges, tau, side="right") - 1
    found = []
    for b in range(len(edges)):
        inside = place == b
        count, hits = int(inside.sum()), int(right[inside].sum())
        found.append(AccuracyBin(float(tau[inside].min()), float(tau[inside].max()), count, hits, wilson(hits, count)))
    return found if len(found) > 1 else []
