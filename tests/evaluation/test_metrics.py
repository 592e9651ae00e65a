"""Metrics against loops that say what they mean, and chance levels against enumeration."""

from __future__ import annotations

from itertools import permutations
from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disttempnet.evaluation import metrics
from disttempnet.evaluation.metrics import first_hit, mean_per_class_recall, recall_at, recall_chance


def slow_first_hit(scores: list[list[float]], right: list[set[int]]) -> list[int]:
    places = []
    for row, answers in zip(scores, right, strict=True):
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))
        places.append(next(place for place, j in enumerate(order) if j in answers))
    return places


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, list[set[int]]]:
    """Integer features, so that similarities are exact and ties are common; ragged right answers."""
    q, n, d = draw(st.integers(1, 12)), draw(st.integers(1, 9)), draw(st.integers(1, 3))
    numbers = st.integers(-2, 2)
    features = draw(st.lists(numbers, min_size=(q + n) * d, max_size=(q + n) * d))
    table = torch.tensor(features, dtype=torch.float32).view(q + n, d)
    right = [draw(st.sets(st.integers(0, n - 1), min_size=1)) for _ in range(q)]
    return table[:q], table[q:], right


@settings(deadline=None)
@given(problems(), st.randoms(use_true_random=False), st.integers(1, 5))
def test_first_hit_equals_sorting(problem, random, tile) -> None:
    queries, candidates, right = problem
    pairs = [(i, j) for i, answers in enumerate(right) for j in answers]
    random.shuffle(pairs)
    query_of, candidate_of = torch.tensor(pairs).T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "TILE", tile)
        places = first_hit(queries, candidates, query_of, candidate_of)
    assert places.tolist() == slow_first_hit((queries @ candidates.T).tolist(), right)


@pytest.mark.parametrize("n", [1, 3, 6])
def test_collapsed_features_score_at_chance(n: int) -> None:
    same = torch.ones(n, 4)
    places = first_hit(same, same, torch.arange(n), torch.arange(n))
    assert recall_at(places, 1) == pytest.approx(1 / n)
    assert recall_at(places, 2) == pytest.approx(min(2, n) / n)


def test_recall_at_by_hand() -> None:
    places = torch.tensor([0, 4, 5, 0])
    assert [recall_at(places, k) for k in (1, 5, 6)] == [0.5, 0.75, 1.0]


@pytest.mark.parametrize("k", [1, 2, 5, 10])
def test_chance_equals_enumeration_of_all_orders(k: int) -> None:
    n, right_answers = 5, [1, 2, 4]
    hits = [
        sum(any(j < m for j in order[:k]) for m in right_answers) / len(right_answers)
        for order in permutations(range(n))
    ]
    assert recall_chance(torch.tensor(right_answers), n, k) == pytest.approx(sum(hits) / len(hits))


@settings(deadline=None)
@given(st.data())
def test_chance_equals_the_quotient_of_binomials(data) -> None:
    n = data.draw(st.integers(1, 60))
    m = data.draw(st.lists(st.integers(1, n), min_size=1, max_size=5))
    k = data.draw(st.integers(1, n))
    expected = sum(1 - comb(n - each, k) / comb(n, k) for each in m) / len(m)
    assert recall_chance(torch.tensor(m), n, k) == pytest.approx(expected, abs=1e-12)


def test_chance_of_the_embedded_sizes() -> None:
    assert recall_chance(torch.ones(1172, dtype=torch.int64), 1172, 10) == pytest.approx(10 / 1172)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=30))
def test_mean_per_class_recall_equals_a_loop(rows) -> None:
    labels = [label for label, _ in rows]
    recalls = []
    for label in set(labels):
        hits = [hit for other, hit in rows if other == label]
        recalls.append(sum(hits) / len(hits))
    places = torch.tensor([0 if hit else 3 for _, hit in rows])
    assert mean_per_class_recall(places, torch.tensor(labels)) == pytest.approx(sum(recalls) / len(recalls))
