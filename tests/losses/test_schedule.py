"""γ, the inner learning rate: γ(e) = ½(1 + cos(πe/E))(1 − γ_min) + γ_min for e < E, then γ_min; or a constant."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttempnet.losses.schedule import ConstantGamma, CosineGamma
from tests.losses.oracle import inner_rate
from tests.losses.scenario import CONSTANT, NETWORK, make, step, unique_batch

V1 = {key: value for key, value in NETWORK.items() if key != "gamma"} | {"name": "disttempnet-v1", "tau_initial": 0}


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (0, 1.0),
        (5, 0.5 * (1 + math.sqrt(0.5)) * 0.2 + 0.8),
        (10, 0.9),
        (15, 0.5 * (1 - math.sqrt(0.5)) * 0.2 + 0.8),
        (20, 0.8),
        (21, 0.8),
        (1000, 0.8),
    ],
)
def test_published_v1_schedule(epoch: int, expected: float) -> None:
    """1 → .8 over 20 epochs."""
    assert CosineGamma(0.8, 20)(epoch) == pytest.approx(expected, abs=1e-15)
    loss = make(V1, gamma_min=0.8, gamma_decay_epochs=20)
    assert step(loss, unique_batch(1, epoch=epoch)).metrics["gamma"].item() == pytest.approx(expected, abs=1e-7)


@given(epoch=st.integers(0, 60), gamma_min=st.floats(0.01, 1.0), epochs=st.integers(1, 50))
def test_cosine(epoch: int, gamma_min: float, epochs: int) -> None:
    schedule = CosineGamma(gamma_min, epochs)
    assert schedule(epoch) == pytest.approx(inner_rate(epoch, gamma_min, epochs), abs=1e-15)
    assert gamma_min - 1e-15 <= schedule(epoch + 1) <= schedule(epoch) + 1e-15 <= 1 + 2e-15
    assert schedule(0) == pytest.approx(1.0)


@pytest.mark.parametrize("epoch", [0, 7, 500])
def test_constant(epoch: int) -> None:
    assert ConstantGamma(0.3)(epoch) == 0.3
    assert step(make(CONSTANT, gamma=0.3), unique_batch(1, epoch=epoch)).metrics["gamma"].item() == pytest.approx(0.3)


@pytest.mark.parametrize("wrong", [0.0, -0.1, 1.01, math.nan])
def test_rates_outside_0_and_1_are_refused(wrong: float) -> None:
    """γ = 0 would never follow the data, γ > 1 would take a logarithm of a negative weight."""
    with pytest.raises(ValueError, match=r"gamma .*" + str(wrong)):
        ConstantGamma(wrong)
    with pytest.raises(ValueError, match=r"gamma_min .*" + str(wrong)):
        CosineGamma(wrong, 5)


@pytest.mark.parametrize("wrong", [0, -3])
def test_lengths_must_be_positive(wrong: int) -> None:
    with pytest.raises(ValueError, match="gamma_decay_epochs"):
        CosineGamma(0.5, wrong)
