"""Clusters and principal axes of features."""

from __future__ import annotations

import pytest
import torch

from disttempnet.temperature import analysis


def test_clusters_and_axes_of_made_up_features() -> None:
    generator = torch.Generator().manual_seed(1)
    truth = torch.arange(4).repeat_interleave(50)
    rows = 10 * torch.eye(4, 6)[truth] + 0.1 * torch.randn(200, 6, generator=generator)
    assigned, centres = analysis.k_means(rows, 4)
    assert len({(a, b) for a, b in zip(assigned.tolist(), truth.tolist(), strict=True)}) == 4
    torch.testing.assert_close(centres[assigned], torch.stack([rows[truth == t].mean(0) for t in truth]))
    assert len(analysis.k_means(torch.ones(5, 3), 3)[1]) == 1, "equal rows are one cluster"

    rows = rows * torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0, 1.0])  # axes that no rounding can swap
    points, explained = analysis.principal_axes(rows)
    _, values, axes = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    expected = (rows - rows.mean(0)) @ axes[:2].T
    torch.testing.assert_close(points.abs(), expected.abs(), rtol=1e-3, atol=1e-3)
    shares = values.square() / values.square().sum()
    assert explained == pytest.approx(tuple(shares[:2].tolist()), rel=1e-4)
