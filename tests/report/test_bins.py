"""τ in bins, rank correlation, and an even choice."""

from __future__ import annotations

import numpy as np
import pytest

from disttempnet.report.bins import average_ranks, binned, evenly_spread, spearman


def test_an_even_choice_has_both_ends() -> None:
    assert evenly_spread(10, 4).tolist() == [0, 3, 6, 9]
    assert evenly_spread(8, 3).tolist() in ([0, 3, 7], [0, 4, 7])
    assert evenly_spread(3, 5).tolist() == [0, 1, 2]
    assert evenly_spread(0, 5).tolist() == []


def test_rank_correlation_by_hand() -> None:
    a, b = np.array([1.0, 2.0, 2.0, 3.0]), np.array([4.0, 1.0, 3.0, 2.0])
    assert average_ranks(a).tolist() == [0.0, 1.5, 1.5, 3.0]
    # ranks of a minus 1.5: (−1.5, 0, 0, 1.5); of b: (1.5, −1.5, .5, −.5)
    assert spearman(a, b) == pytest.approx(-3.0 / np.sqrt(4.5 * 5.0))
    assert spearman(a, np.exp(a)) == pytest.approx(1.0)
    assert spearman(a, np.ones(4)) is None


def test_bins() -> None:
    values = np.array([1.0, 1.0, 2.0, np.nan, 4.0])
    bins = binned(values, {"image": np.array([1.0, 3.0, 5.0, 100.0, 7.0])})
    assert bins is not None
    assert (bins.names, bins.sizes, bins.of_item.tolist()) == (["1", "2", "4"], [2, 1, 1], [0, 0, 1, 2])
    assert bins.quartiles["image"].tolist() == [[1.5, 5, 7], [2, 5, 7], [2.5, 5, 7]]
    many = binned(np.arange(1000.0), {"text": -np.arange(1000.0)})
    assert many is not None
    assert many.sizes == [125] * 8
    assert many.names[:2] == ["0–124", "125–249"]
    assert many.correlation["text"] == pytest.approx(-1.0)
    assert binned(np.ones(5), {"image": np.arange(5.0)}) is None
