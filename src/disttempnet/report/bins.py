"""τ against another number of the items: bins, rank correlation, and an even choice of items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

BINS = 8


def evenly_spread(n: int, most: int) -> np.ndarray:
    """Return at most `most` positions of 0 … n − 1, evenly spaced, first and last included: int64."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(np.int64))


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Return the rank correlation, ties at their average rank; None where a or b is constant."""
    ranks = np.stack([average_ranks(a), average_ranks(b)])
    if len(a) < 2 or not np.ptp(ranks, axis=1).all():
        return None
    return float(np.corrcoef(ranks)[0, 1])


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 0; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[place]


class Binned(NamedTuple):
    """τ against a number, in b bins of that number, over the n' items that have it.

    Attributes:
        names: names of the bins, `3` or `4–7`.
        sizes: number of items in each bin.
        of_item: int [n'], bin of each item.
        tau: side → float [n'].
        quartiles: side → float [3, b].
        correlation: side → Spearman's correlation over items, not over bins.
    """

    names: list[str]
    sizes: list[int]
    of_item: np.ndarray
    tau: dict[str, np.ndarray]
    quartiles: dict[str, np.ndarray]
    correlation: dict[str, float | None]


def binned(values: np.ndarray, tau: Mapping[str, np.ndarray]) -> Binned | None:
    """Return τ in bins of a number: a bin for each value where there are few, else bins of about equal size.

    Args:
        values: float [n], NaN where an item lacks the number.
        tau: side → float [n].

    Returns:
        None where fewer than two different values are known.
    """
    # items that have the number: n'
    known = np.isfinite(values)
    values = values[known]
    distinct = np.unique(values)
    if len(distinct) < 2:
        return None
    # lower edges of the b bins: quantiles where there are many values
    edges = distinct
    if len(distinct) > BINS:
        edges = np.unique(np.sort(values)[np.arange(BINS) * len(values) // BINS])
    of_item = np.searchsorted(edges, values, side="right") - 1
    # name and size of each bin
    names, sizes = [], []
    for b in range(len(edges)):
        inside = values[of_item == b]
        low, high = f"{inside.min():g}", f"{inside.max():g}"
        names.append(low if low == high else f"{low}–{high}")
        sizes.append(len(inside))
    # τ of each side: float [n'] and its quartiles [3, b]
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
