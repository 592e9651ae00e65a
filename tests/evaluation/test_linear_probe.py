"""Linear probes: the minimum of the objective, the choice of λ, and the same numbers on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from disttempnet.errors import UserError
from disttempnet.evaluation import linear_probe
from disttempnet.evaluation.linear_probe import fit_logistic, fit_probe, held_out_rows, search_exponent, with_one
from disttempnet.evaluation.metrics import predict
from tests.gloo import Pools


def toy(n: int = 90, classes: int = 3, noise: float = 0.6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    centres = torch.randn(classes, 8, generator=generator)
    labels = torch.arange(n) % classes
    return normalize(centres[labels] + noise * torch.randn(n, 8, generator=generator), dim=1), labels


@pytest.mark.parametrize("strength", [1e-2, 1.0, 30.0])
def test_the_fit_is_the_minimum(strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The objective is convex: where autograd's gradient is zero is its only minimum, up to a shift of the biases."""
    monkeypatch.setattr(linear_probe, "ROWS", 37)  # blocks of rows that do not divide n
    features, labels = toy()
    x = with_one(features)
    assert x.dtype == torch.float64
    weights = fit_logistic(x, labels, 4, strength).requires_grad_()  # one class without a sample
    loss = cross_entropy(x @ weights.T, labels, reduction="sum") + strength / 2 * weights[:, :-1].square().sum()
    (gradient,) = torch.autograd.grad(loss, weights)
    assert gradient[:3].abs().max() < 1e-4
    assert weights[:3].abs().max() > 0.05


def test_a_stronger_lambda_shrinks_weights_and_not_the_biases() -> None:
    features, labels = toy()
    labels = (labels > 1).long()  # two thirds and one third
    x = with_one(features)
    norms = [fit_logistic(x, labels, 2, strength)[:, :-1].norm().item() for strength in (0.01, 1.0, 1e6)]
    assert norms[0] > norms[1] > norms[2]
    assert norms[2] < 1e-3
    bias = fit_logistic(x, labels, 2, 1e6)[:, -1]
    assert torch.softmax(bias, 0).tolist() == pytest.approx([2 / 3, 1 / 3], abs=1e-3)


def test_the_search_halves_its_steps_around_the_best() -> None:
    asked: list[float] = []

    def scores(exponents: Sequence[float]) -> list[float]:
        asked.extend(exponents)
        return [-abs(exponent - 1.37) for exponent in exponents]

    assert search_exponent(scores)[0] == 1.375
    assert asked[:7] == [-6, -4, -2, 0, 2, 4, 6]
    assert len(asked) == len(set(asked)) <= 15
    assert search_exponent(lambda every: [0.0] * len(every))[0] == 6.0, "of equal scores the stronger one"
    assert search_exponent(lambda every: list(every))[0] == 6.0, "never beyond the ends"


def test_a_fifth_of_each_class_is_held_out() -> None:
    labels = [0] * 50 + [1] * 3 + [2]
    held = held_out_rows(labels)
    assert held == held_out_rows(labels)
    assert [sum(labels[row] == c for row in held) for c in range(3)] == [10, 1, 0]
    assert held[:10] != list(range(10))


def test_it_classifies_and_generalises() -> None:
    features, labels = toy(240, noise=0.5)
    probe = fit_probe(features[:180], labels[:180], 3)
    found = predict(probe.predict_with(features[180:]), probe.weights, labels[180:])
    assert (found.first == labels[180:]).double().mean() > 0.8
    assert probe.held_out == 36
    assert probe.accuracy > 0.8


def test_nothing_to_hold_out() -> None:
    with pytest.raises(UserError, match="no class with enough samples"):
        fit_probe(torch.eye(3), torch.arange(3), 3)


def probe_on_a_rank() -> tuple[list[list[float]], float]:
    probe = fit_probe(*toy(), 3)
    return probe.weights.tolist(), probe.exponent


def test_two_ranks_give_the_same_bits(gloo: Pools) -> None:
    alone = probe_on_a_rank()
    assert gloo(2, probe_on_a_rank) == [alone, alone]
