"""Nearest images of queries, over features that come a shard at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor


class Hit(NamedTuple):
    """An image of a ranking: its sample id, and its cosine with the query."""

    sample: int
    cosine: float


def nearest(parts: Iterable[tuple[NDArray, Tensor]], queries: Tensor, top: int) -> list[list[Hit]]:
    """Return the nearest images of each query, the nearest first; of equal cosines the smaller id first.

    Memory is that of a part and of the hits.

    Args:
        parts: ids, int64 [n], ascending over all parts, and unit features [n, D].
        queries: unit features [q, D].
        top: how many images of each query.

    Example:
        >>> import numpy as np
        >>> images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> nearest([(np.arange(3), images)], torch.tensor([[0.0, 1.0]]), top=2)
        [[Hit(sample=1, cosine=1.0), Hit(sample=2, cosine=0.800000011920929)]]
    """
    best = queries.new_empty(len(queries), 0)  # cosines [q, k], k ≤ top, falling
    ids = torch.empty(len(queries), 0, dtype=torch.int64)
    for part, features in parts:
        # earlier hits come first: a stable order keeps them before equal ones of this part
        cosines = torch.cat([best, queries @ features.T], dim=1)
        samples = torch.cat([ids, torch.from_numpy(part).expand(len(queries), -1)], dim=1)
        order = cosines.argsort(dim=1, descending=True, stable=True)[:, :top]
        best, ids = cosines.gather(1, order), samples.gather(1, order)
    return [
        [Hit(sample, cosine) for sample, cosine in zip(row, values, strict=True)]
        for row, values in zip(ids.tolist(), best.tolist(), strict=True)
    ]
