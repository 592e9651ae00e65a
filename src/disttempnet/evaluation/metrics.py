"""Ranking metrics with their exact chance levels, and metrics by class and by group.

Ranking comes from one number a query: the place of its best-placed right answer among all candidates. Accuracy is the
case of one right answer a query (its class).

Legend: q queries, n candidates, D width, p (query, right candidate) pairs.
Order: by similarity, and between equal ones by index, so that a model that maps everything to one point is at
chance level, not perfect.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TILE = 512  # queries scored at once: bounds memory to TILE × n similarities


def first_hit(queries: Tensor, candidates: Tensor, query_of: Tensor, candidate_of: Tensor) -> Tensor:
    """Return the place of each query's best-placed right answer, 0 = top.

    Args:
        queries: finite features [q, D].
        candidates: finite features [n, D].
        query_of, candidate_of: int64 [p]; candidate_of[k] is a right answer of query_of[k].
            Every query has at least one.

    Returns:
        int64 [q] on the device of `queries`.
    """
    order = torch.argsort(query_of, stable=True)
    query_of, candidate_of = query_of[order].to(queries.device), candidate_of[order].to(queries.device)
    index = torch.arange(len(candidates), device=queries.device)
    places = []
    for start in range(0, len(queries), TILE):
        scores = queries[start : start + TILE] @ candidates.T
        inside = (query_of >= start) & (query_of < start + TILE)
        right = torch.zeros_like(scores, dtype=torch.bool)
        right[query_of[inside] - start, candidate_of[inside]] = True
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        # among right answers that score equally the first in order counts
        winner = torch.where(right & (scores == best), index, len(candidates)).amin(1, keepdim=True)
        places.append(((scores > best) | ((scores == best) & (index < winner))).sum(1))
    return torch.cat(places)


class Prediction(NamedTuple):
    """Predictions of zero-shot classification for n images, int64 [n] each.

    Attributes:
        first: the most similar class.
        place: where the true class stands, 0 = top; the number of classes where there is no such class.
    """

    first: Tensor
    place: Tensor


def predict(images: Tensor, classes: Tensor, labels: Tensor) -> Prediction:
    """Classify images [n, D] among classes [C, D].

    Args:
        labels: int64 [n] on the device of `images`; a label that is no class is never hit.
    """
    scores = images @ classes.T
    known = labels < len(classes)
    index = torch.arange(len(classes), device=scores.device)
    target = labels.clamp_max(len(classes) - 1).unsqueeze(1)
    best = scores.gather(1, target)
    place = ((scores > best) | ((scores == best) & (index < target))).sum(1)
    return Prediction(scores.argmax(1), torch.where(known, place, len(classes)))


def recall_at(places: Tensor, k: int) -> float:
    """Return the share of queries with a right answer among their first k."""
    return (places < k).double().mean().item()


def recall_chance(right_answers: Tensor, candidates: int, k: int) -> float:
    """Return the expected recall@k of a uniformly random order: the mean of 1 − C(n−m, k) / C(n, k).

    Args:
        right_answers: int64 [q], m of each query.
        candidates: n.
    """
    miss = torch.ones(len(right_answers), dtype=torch.float64)
    for i in range(min(k, candidates)):  # the quotient of binomials as a product: the i-th draw misses too
        miss *= (candidates - right_answers.cpu().double() - i).clamp_min(0) / (candidates - i)
    return 1.0 - miss.mean().item()


class WeightedHits(NamedTuple):
    """Shares of queries that count towards one metric with a weight.

    Attributes:
        hits: float64 [q], how often each query was answered right.
        cluster: int64 [q], the image that a query belongs to.
        weight: of the mean of the hits in the metric.
    """

    hits: Tensor
    cluster: Tensor
    weight: float = 1.0


def clustered_error(parts: Sequence[WeightedHits], clusters: int) -> float | None:
    """Return the standard error of a weighted sum of means, over the draw of images: an image's queries are one draw.

    A mean is a ratio of sums over images, so an image adds the sum of its queries' distances from the mean, over the
    number of queries. None of a single image.
    """
    if clusters < 2:
        return None
    residual = torch.zeros(clusters, dtype=torch.float64)
    for hits, cluster, weight in parts:
        hits = hits.cpu().double()
        residual.index_add_(0, cluster.cpu(), weight * (hits - hits.mean()) / len(hits))
    return (clusters / (clusters - 1) * residual.square().sum()).sqrt().item()


def mean_per_class_error(places: Tensor, labels: Tensor) -> float | None:
    """Return the standard error of `mean_per_class_recall`, of independent shares; None where a class has one image."""
    _, group, counts = torch.unique(labels.cpu(), return_inverse=True, return_counts=True)
    if (counts < 2).any():
        return None
    shares = torch.bincount(group, weights=(places.cpu() == 0).double()) / counts
    return ((shares * (1 - shares) / (counts - 1)).sum().sqrt() / len(counts)).item()


def mean_per_class_recall(places: Tensor, labels: Tensor) -> float:
    """Return the top-1 accuracy of each class that occurs in `labels` [q], averaged over these classes."""
    _, group, counts = torch.unique(labels.cpu(), return_inverse=True, return_counts=True)
    hits = torch.bincount(group, weights=(places.cpu() == 0).double())
    return (hits / counts).mean().item()


def macro_scores(first: NDArray[np.int64], labels: NDArray[np.int64]) -> tuple[float, float]:
    """Return (F1, recall) of each class that occurs in `labels`, averaged over these classes.

    Args:
        first: predicted classes [n]; labels: the true ones [n].
    """
    present = np.unique(labels)
    size = int(max(first.max(), labels.max())) + 1
    right = np.bincount(labels[first == labels], minlength=size)[present]
    predicted = np.bincount(first, minlength=size)[present]
    true = np.bincount(labels, minlength=size)[present]
    return float((2 * right / (predicted + true)).mean()), float((right / true).mean())


class GroupMeans(NamedTuple):
    """Mean and size of each group, by its name; an empty group's mean is None."""

    means: dict[str, float | None]
    counts: dict[str, int]

    def worst(self, but: Sequence[str] = ()) -> float | None:
        """Return the lowest mean of all groups except empty ones and those of `but`; None if there are none."""
        return min((mean for name, mean in self.means.items() if mean is not None and name not in but), default=None)


def group_means(hits: NDArray[np.bool_], columns: dict[str, NDArray[np.int64]]) -> GroupMeans:
    """Return the share of hits [n] in every combination of group numbers, empty ones too.

    Args:
        columns: name → the number of each sample's group [n]; there are as many groups as the largest number says.
            Several columns make the groups of all combinations, `race:0_gender:1`; the last column runs fastest.
    """
    sizes = [int(values.max()) + 1 for values in columns.values()]
    flat = np.ravel_multi_index(tuple(columns.values()), sizes)
    counts = np.bincount(flat, minlength=int(np.prod(sizes)))
    right = np.bincount(flat[hits], minlength=len(counts))
    names = [
        "_".join(f"{column}:{number}" for column, number in zip(columns, numbers, strict=True))
        for numbers in np.ndindex(*sizes)
    ]
    means = [float(r / n) if n else None for r, n in zip(right.tolist(), counts.tolist(), strict=True)]
    return GroupMeans(dict(zip(names, means, strict=True)), dict(zip(names, counts.tolist(), strict=True)))


def jaccard(chosen: set[int], right: set[int]) -> float:
    """Return the size of the intersection over the size of the union."""
    return len(chosen & right) / len(chosen | right)
