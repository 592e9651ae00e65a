"""Statistics of a data set by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from disttempnet.report import items
from disttempnet.temperature import measure
from disttempnet.temperature.statistics import TemperatureStatistics


def statistics_of(rows: list[tuple[str, dict[str, object], float]]) -> TemperatureStatistics:
    """Statistics of (caption, facts, τ) with features of no meaning."""

    class Made(items.Items):
        def __len__(self) -> int:
            return len(rows)

    made = [items.Item(str(i), Path(), 0, 0, (text,), "", facts=facts) for i, (text, facts, _) in enumerate(rows)]
    tau = np.array([tau for _, _, tau in rows], dtype=np.float32)
    statistics = TemperatureStatistics(Made(), "group")
    for part in (slice(0, 2), slice(2, None)):  # two chunks
        positions, chosen = np.arange(len(rows))[part], made[part]
        two = np.stack([tau, -tau])[:, part]
        features = dict.fromkeys(("image", "text"), torch.ones(len(chosen), 2))
        statistics.add(measure.TemperatureChunk(positions, chosen, two, two, features, [], len(chosen)))
    return statistics


def test_frequency_ambiguity_and_extremes_by_hand() -> None:
    statistics = statistics_of(
        [
            ("bank", {"label": "river", "group": "a"}, 0.1),
            ("bank", {"label": "money", "group": "b"}, 0.2),
            ("bank", {"label": "money", "group": "b"}, 0.3),
            ("tree", {"label": "tree", "group": "b"}, 0.4),
            ("tree", {}, 0.5),
        ]
    )
    np.testing.assert_array_equal(statistics.frequency(), [1, 3, 3, 3, np.nan])
    np.testing.assert_array_equal(statistics.ambiguity()[0], [2, 2, 2, 1, np.nan])
    assert statistics.extremes("image", 3) == {"lowest": [0, 1, 2], "highest": [4, 3, 2]}
    assert statistics.extremes("text", 3) == {"lowest": [4, 2], "highest": [0, 3]}, "a caption once"
    given = statistics_of([("a", {"ambiguity": 3}, 0.1), ("b", {"ambiguity": 1.5}, 0.2), ("c", {}, 0.3)])
    values, meaning = given.ambiguity()
    np.testing.assert_array_equal(values, [3, 1.5, np.nan])
    assert "gives" in meaning
