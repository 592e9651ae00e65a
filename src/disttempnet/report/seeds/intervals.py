"""Confidence intervals over seeds: of a mean, and of the difference of two groups paired by seed (Student's t)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import cos, pi, sin, sqrt, tan
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
ROUNDING = 1e-12  # of shares: a bound nearer to zero is zero


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class PairedDifference(NamedTuple):
    """The mean difference of two groups over the seeds that both have.

    Attributes:
        interval: None for one seed, whose difference has no known spread.
        n: number of shared seeds.
    """

    mean: float
    interval: Interval | None
    n: int

    @property
    def sign(self) -> int:
        """1 or −1 where the interval lies above or below zero; 0 where it includes zero or is unknown."""
        if self.interval is None:
            return 0
        return int(self.interval.low > ROUNDING) - int(self.interval.high < -ROUNDING)


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Return the confidence interval of a mean: mean ± t · standard deviation / √n, with n − 1 degrees of freedom.

    Args:
        values: one of each seed; the seeds are a sample of all seeds.

    Returns:
        None for fewer than two values.
    """
    n = len(values)
    if n < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / sqrt(n)
    reach = t_quantile(n - 1, confidence) * error
    return Interval(mean - reach, mean + reach)


def paired_difference(values: Mapping[int, float], base: Mapping[int, float]) -> PairedDifference | None:
    """Return values − base over the seeds of both; None where they share no seed.

    Runs of one seed have initial weights and the order of the data in common: what these add to both cancels.

    Args:
        values, base: seed → metric.

    Example:
        >>> paired_difference({1: 0.3, 2: 0.5}, {1: 0.2, 2: 0.3, 3: 0.9}).n
        2
    """
    shared = sorted(values.keys() & base.keys())
    if not shared:
        return None
    differences = [values[seed] - base[seed] for seed in shared]
    return PairedDifference(float(np.mean(differences)), mean_interval(differences), len(shared))


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """Return t for which a Student variable lies in [−t, t] with this probability.

    Args:
        freedom: degrees of freedom, at least 1.
        confidence: in (0, 1).
    """
    # by bisection over θ = atan(t / √freedom), until the two ends are neighbouring floats
    low, high = 0.0, pi / 2
    while low < (middle := (low + high) / 2) < high:
        if _central_probability(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return sqrt(freedom) * tan(low)


def _central_probability(angle: float, freedom: int) -> float:
    """Return the probability of [−t, t] at t = √freedom · tan(angle).

    It is a finite sum of powers of the cosine for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4).
    """
    odd = freedom % 2
    term, total = (cos(angle), 0.0) if odd else (1.0, 0.0)
    for k in range(odd, freedom - 1, 2):
        total += term
        term *= (k + 1) / (k + 2) * cos(angle) ** 2
    return 2 / pi * (angle + sin(angle) * total) if odd else sin(angle) * total
