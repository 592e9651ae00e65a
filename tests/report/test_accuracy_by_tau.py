"""Accuracy by τ: bins that hold every image once, and Wilson's interval."""

from __future__ import annotations

import base64
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from disttempnet.report.accuracy_by_tau import accuracy_by_tau, wilson
from disttempnet.report.runs import plots
from disttempnet.report.runs.examples import accuracy_bins


def test_wilson_against_known_values() -> None:
    """Of Newcombe (1998), table I: 81/263, 15/148, 0/20, 1/29."""
    known = ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718))
    for right, count, low, high in known:
        assert wilson(right, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson(20, 20)[1] == 1.0


def test_bins_hold_every_image_once_in_order_of_tau() -> None:
    tau = np.random.default_rng(0).permutation(np.linspace(0.01, 0.05, 403))
    right = tau > 0.03
    bins = accuracy_by_tau(tau, right)
    assert len(bins) == 8
    assert sum(one.images for one in bins) == 403
    assert max(one.images for one in bins) - min(one.images for one in bins) <= 1
    assert all(before.high < after.low for before, after in pairwise(bins))
    assert [one.accuracy for one in bins][0::7] == [0.0, 1.0]
    assert sum(one.right for one in bins) == right.sum()


def test_few_images_and_equal_temperatures_have_no_bins() -> None:
    assert accuracy_by_tau(np.linspace(0, 1, 39), np.ones(39, bool)) == []
    assert len(accuracy_by_tau(np.linspace(0, 1, 40), np.ones(40, bool))) == 2
    assert accuracy_by_tau(np.full(200, 0.07), np.ones(200, bool)) == []
    assert accuracy_by_tau(0.07 + 1e-9 * np.arange(200), np.ones(200, bool)) == []
    half = accuracy_by_tau(np.repeat([0.01, 0.02], 100), np.repeat([True, False], 100))
    assert [(one.low, one.images, one.accuracy) for one in half] == [(0.01, 100, 1.0), (0.02, 100, 0.0)]


def test_of_a_model_and_its_result() -> None:
    """Images right where τ of the image is low; τ of the captions is constant and has no bins."""
    labels = torch.arange(80) % 2
    images = torch.eye(2)[torch.where(torch.arange(80) < 40, labels, 1 - labels)]
    tau = torch.stack([torch.linspace(0.01, 0.05, 80), torch.full((80,), 0.07)])
    result = SimpleNamespace(
        image_features=images, text_features=images, class_features=torch.eye(2), labels=labels, chance={"acc1": 0.5}
    )
    run = SimpleNamespace(loss=SimpleNamespace(temperatures=lambda image, text, ids: tau))
    found = accuracy_bins(run, result)
    assert list(found) == ["image"]
    assert [one.accuracy for one in found["image"]] == [1.0, 1.0, 0.0, 0.0]
    chart = plots.accuracy_chart([("a task", found, 0.5)])
    svg = base64.b64decode(chart.partition("base64,")[2]).decode()
    assert all(words in svg for words in ("a task", "chance", "by τ of the image"))
    constant = SimpleNamespace(loss=SimpleNamespace(temperatures=lambda image, text, ids: None))
    assert accuracy_bins(constant, result) == {}
