"""Intervals for the mean of normally distributed values that stay valid however often one looks at them.

The t-test's confidence sequence with a normal prior on the standardized effect (Lai 1976, "On confidence sequences",
Annals of Statistics 4; as an e-process: Wang and Ramdas 2024, "Anytime-valid t-tests and confidence sequences for
Gaussian means with unknown variance", Sequential Analysis 44, arXiv 2310.03722). With S and V the sum and the sum of
squares of the first n values less a mean m,

    e_n(m) = sqrt(c² / (n + c²)) * (1 - S² / ((n + c²) V))^(-n/2)

is a test martingale in the scale-free data if m is the true mean, whatever the variance. By Ville's inequality it ever
reaches 1/alpha with a probability of at most alpha, so the means m with e_n(m) < 1/alpha hold the true one at all n at
once with a probability of at least 1 - alpha.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

PRIOR = 0.25
"""c²: the prior of the standardized effect has a standard deviation of 1/c = 2, the size of effects that 4 to 10 seeds
tell; it is the same at every n, so that seeds may be added to a sweep that has ended."""


class Interval(NamedTuple):
    """A mean and the interval around it."""

    mean: float
    low: float
    high: float


def confidence_interval(values: Sequence[float], alpha: float, *, variance: float = 0.0) -> Interval:
    """Returns the mean of the values so far, with its interval; the whole line where they are too few for `alpha`.

    `variance` is added to that of the values: what rounding has taken from it.
    """
    mean, count = math.fsum(values) / len(values), len(values)
    scale = _scale(count, alpha)
    if math.isinf(scale):
        return Interval(mean, -math.inf, math.inf)
    half = scale * math.sqrt(statistics.pvariance(values, mean) + variance)
    return Interval(mean, mean - half, mean + half)


def fewest_values(alpha: float) -> int:
    """Returns how many values the first finite interval needs."""
    count = 2
    while math.isinf(_scale(count, alpha)):
        count += 1
    return count


def _scale(count: int, alpha: float) -> float:
    """Returns half the width of the interval in standard deviations (with the divisor n) of the values."""
    total = count + PRIOR
    ratio = (total / (PRIOR * alpha**2)) ** (1 / count)
    room = total - ratio * PRIOR
    return math.sqrt((ratio - 1) * total / room) if room > 0 else math.inf
