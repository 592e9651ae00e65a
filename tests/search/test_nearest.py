"""The nearest images, part by part, against a sort of all of them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from disttempnet.search.nearest import nearest


@pytest.mark.parametrize("sizes", [[50], [1, 20, 9, 20], [10] * 5])
@pytest.mark.parametrize("top", [1, 7, 50])
def test_hits_are_those_of_a_sort(sizes: list[int], top: int) -> None:
    generator = torch.Generator().manual_seed(0)
    features = normalize(torch.randn(50, 6, dtype=torch.float64, generator=generator), dim=1)
    queries = normalize(torch.randn(3, 6, dtype=torch.float64, generator=generator), dim=1)
    ids = np.arange(50) * 2  # a part has no unreadable ones: ids have gaps
    ends = np.cumsum([0, *sizes])
    parts = [(ids[a:b], features[a:b]) for a, b in pairwise(ends)]
    found = nearest(parts, queries, top)
    for query, hits in zip(queries, found, strict=True):
        cosines = [float(query @ row) for row in features]
        expected = sorted(range(50), key=lambda i: -cosines[i])[:top]
        assert [hit.sample for hit in hits] == [2 * i for i in expected]
        np.testing.assert_allclose([hit.cosine for hit in hits], [cosines[i] for i in expected], rtol=1e-12)


def test_of_equal_cosines_the_smaller_id_is_first_in_any_part() -> None:
    same = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    parts = [(np.array([0, 1, 2]), same), (np.array([5, 6, 7]), same), (np.array([8]), torch.tensor([[0.0, 1.0]]))]
    [hits] = nearest(parts, torch.tensor([[1.0, 0.0]]), 5)
    assert [hit.sample for hit in hits] == [0, 1, 2, 5, 6]


def test_fewer_images_than_wanted() -> None:
    [hits] = nearest([(np.array([3]), torch.tensor([[0.6, 0.8]]))], torch.tensor([[1.0, 0.0]]), 9)
    assert [(hit.sample, round(hit.cosine, 6)) for hit in hits] == [(3, 0.6)]
