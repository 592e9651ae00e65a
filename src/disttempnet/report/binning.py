"""τ against a number that the items have: bins of that number, the rank correlation; and an even choice of items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

BINS = 8


def evenly_spread(n: int, most: int) -> np.ndarray:
    """At most `most` of the positions 0 … n − 1, evenly, the first and the last among them: int64."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(np.int64))


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation, ties at their average rank; None where one of both does not vary."""
    ranks = np.stack([average_ranks(a), average_ranks(b)])
    if len(a) < 2 or not np.ptp(ranks, axis=1).all():
        return None
    return float(np.corrcoef(ranks)[0, 1])


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share their mean."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[place]


class Binned(NamedTuple):
    """τ against a number, in bins of that number.

    Attributes:
        names: of the b bins, `3` or `4–7`.
        sizes: how many items a bin holds.
        of_item: int [n'], the bin of each item that has the number.
        tau: side → float [n'].
        quartiles: side → [3, b].
        correlation: side → Spearman, over items and not over bins.
    """

    names: list[str]
    sizes: list[int]
    of_item: np.ndarray
    tau: dict[str, np.ndarray]
    quartiles: dict[str, np.ndarray]
    correlation: dict[str, float | None]


def binned(values: np.ndarray, tau: Mapping[str, np.ndarray]) -> Binned | None:
    """τ by a number [n]: a bin for each value where there are few, else bins of about equal size.

    None where fewer than two items have the number, or all have the same.
    """
    known = np.isfinite(values)
    values = values[known]
    distinct = np.unique(values)
    if len(distinct) < 2:
        return None
    edges = distinct
    if len(distinct) > BINS:
        edges = np.unique(np.sort(values)[np.arange(BINS) * len(values) // BINS])
    of_item = np.searchsorted(edges, values, side="right") - 1
    names, sizes = [], []
    for place in range(len(edges)):
        inside = values[of_item == place]
        low, high = f"{inside.min():g}", f"{inside.max():g}"
        names.append(low if low == high else f"{low}–{high}")
        sizes.append(len(inside))
    of_side = {side: taus[known] for side, taus in tau.items()}
    return Binned(
        names,
        sizes,
        of_item,
        of_side,
        {
            side: np.stack([np.quantile(t[of_item == b], [0.25, 0.5, 0.75]) for b in range(len(edges))], axis=1)
            for side, t in of_side.items()
        },
        {side: spearman(values, t) for side, t in of_side.items()},
    )
