"""Ranking metrics with their exact chance levels.

Everything measured here comes from one number a query: the place of its best-placed right answer among all
candidates. Accuracy is the case of one right answer a query (its class).

Legend: q queries, n candidates, D width, p (query, right candidate) pairs.
Order: by similarity, and between equal ones by index, so that a model that maps everything to one point is at
chance level, not perfect.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 512  # queries scored at once: bounds memory to TILE × n similarities


def first_hit(queries: Tensor, candidates: Tensor, query_of: Tensor, candidate_of: Tensor) -> Tensor:
    """Place of each query's best-placed right answer, 0 = top.

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


def recall_at(places: Tensor, k: int) -> float:
    """Share of queries with a right answer among their first k."""
    return (places < k).double().mean().item()


def recall_chance(right_answers: Tensor, candidates: int, k: int) -> float:
    """Expected recall@k of a uniformly random order: the mean of 1 − C(n−m, k) / C(n, k).

    Args:
        right_answers: int64 [q], m of each query.
        candidates: n.
    """
    miss = torch.ones(len(right_answers), dtype=torch.float64)
    for i in range(min(k, candidates)):  # the quotient of binomials as a product: the i-th draw misses too
        miss *= (candidates - right_answers.cpu().double() - i).clamp_min(0) / (candidates - i)
    return 1.0 - miss.mean().item()


def mean_per_class_recall(places: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy of each class that occurs in `labels` [q], averaged over these classes."""
    _, group, counts = torch.unique(labels.cpu(), return_inverse=True, return_counts=True)
    hits = torch.bincount(group, weights=(places.cpu() == 0).double())
    return (hits / counts).mean().item()
