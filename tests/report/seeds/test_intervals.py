"""Intervals against mpmath's incomplete beta function, published quantiles, and their coverage."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest

from disttempnet.report.seeds.intervals import (
    Interval,
    PairedDifference,
    mean_interval,
    paired_difference,
    t_quantile,
)


def outside(t: float, freedom: int) -> mpmath.mpf:
    """Probability of |Student's t| > t, in 40 digits."""
    with mpmath.workdps(40):
        x = freedom / (freedom + mpmath.mpf(t) ** 2)
        return mpmath.betainc(mpmath.mpf(freedom) / 2, mpmath.mpf(1) / 2, 0, x, regularized=True)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 9, 30, 31, 199, 1000])
@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95, 0.99])
def test_quantiles_against_the_incomplete_beta_function(freedom: int, confidence: float) -> None:
    assert float(outside(t_quantile(freedom, confidence), freedom)) == pytest.approx(1 - confidence, abs=2e-14)


def test_quantiles_as_published() -> None:
    """NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2: the upper 2.5 % of Student's t."""
    published = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042, 100: 1.984}
    assert {freedom: round(t_quantile(freedom), 3) for freedom in published} == published


def test_interval_of_a_mean_by_hand() -> None:
    # 1, 2, 3: mean 2, standard deviation 1, error 1 / √3, t of two degrees of freedom √(2 · .95² / (1 − .95²))
    reach = (2 * 0.95**2 / (1 - 0.95**2)) ** 0.5 / 3**0.5
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - reach, 2 + reach), rel=1e-14)
    assert mean_interval([0.5, 0.5]) == Interval(0.5, 0.5)
    assert mean_interval([0.5]) is None
    assert mean_interval([]) is None


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    samples = np.random.default_rng(0).normal(0.3, 0.1, (4000, 5))
    intervals = [mean_interval(sample.tolist()) for sample in samples]
    covered = np.mean([one is not None and one.low <= 0.3 <= one.high for one in intervals])
    assert covered == pytest.approx(0.95, abs=3 * (0.95 * 0.05 / 4000) ** 0.5)


def test_a_paired_difference_is_the_interval_of_the_differences() -> None:
    values = {1: 0.20, 2: 0.32, 3: 0.41, 9: 0.9}
    base = {3: 0.38, 2: 0.30, 1: 0.15, 7: 0.1}
    found = paired_difference(values, base)
    assert found is not None
    assert found.mean == pytest.approx((0.05 + 0.02 + 0.03) / 3)
    assert found.interval == pytest.approx(mean_interval([0.05, 0.02, 0.03]))
    assert found.n == 3


def test_few_shared_seeds() -> None:
    assert paired_difference({1: 0.3}, {2: 0.3}) is None
    assert paired_difference({1: 0.5, 2: 0.1}, {1: 0.25}) == PairedDifference(0.25, None, 1)


@pytest.mark.parametrize(
    ("interval", "sign"),
    [((0.01, 0.2), 1), ((-0.2, -0.01), -1), ((-0.01, 0.2), 0), ((0.0, 0.2), 0), ((1e-15, 1e-15), 0), (None, 0)],
)
def test_the_sign_is_that_of_an_interval_without_zero(interval: tuple[float, float] | None, sign: int) -> None:
    assert PairedDifference(0.1, interval and Interval(*interval), 3).sign == sign
