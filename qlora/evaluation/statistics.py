"""How sure a mean of single answers is: 95 % intervals, and the paired difference to another model's answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Z = 1.959963984540054
"""The 97.5th percentile of the normal distribution."""


class Estimate(NamedTuple):
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """What each item of a test earned, for example 1 where the answer is right and 0 where it is wrong."""

    values: Sequence[float]
    groups: Sequence[str] | None = None
    """The subject of each item; then the mean is that of the subjects' means (macro average)."""
    may_be_share: bool = True
    """Whether items that all earned 0 or 1 are right and wrong ones; not where a measure may happen to be 0."""

    def estimate(self) -> Estimate:
        """Returns the mean with its interval: Wilson's for fractions of one group, else a normal one.

        The fraction in a group's variance is that of Agresti and Coull (1998), nearer to a half, so that a group
        without a mistake does not look certain.
        """
        if self.groups is None and self._is_share:
            return _wilson(sum(self.values), len(self.values))
        variance = _variance_of_share if self._is_share else _variance
        parts = self._parts(np.asarray(self.values, float))
        limits = (0.0, 1.0) if self._is_share else (-math.inf, math.inf)
        return _normal([float(part.mean()) for part in parts], [variance(part) for part in parts], limits)

    def gain(self, base: Score) -> Estimate:
        """Returns how much more than `base`, on the same items, was earned: the paired difference with its interval.

        For answers that are right or wrong it is the interval of Agresti and Min (2005, doi 10.1002/sim.1781): half a
        pair is added to each of the four cases, so that equal answers do not look certain. Over groups the interval
        stands around the mean that was observed, and its variance is the sum of theirs, for shrunken differences of
        small groups would all err in the same direction.
        """
        difference = np.asarray(self.values, float) - np.asarray(base.values, float)
        is_share = self._is_share and base._is_share
        if self.groups is None and is_share:
            return _agresti_min(difference)
        variance = _variance_of_pairs if is_share else _variance
        limits = (-1.0, 1.0) if is_share else (-math.inf, math.inf)
        parts = self._parts(difference)
        return _normal([float(part.mean()) for part in parts], [variance(part) for part in parts], limits)

    def to_dict(self) -> dict[str, Any]:
        """Returns the score in JSON's types, for `from_dict`."""
        saved: dict[str, Any] = {
            "values": list(self.values),
            "groups": None if self.groups is None else list(self.groups),
        }
        return saved if self.may_be_share else saved | {"may_be_share": False}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Score:
        """Returns the score that `to_dict` wrote."""
        return cls(saved["values"], saved["groups"], saved.get("may_be_share", True))

    @property
    def _is_share(self) -> bool:
        return self.may_be_share and all(value in (0, 1) for value in self.values)

    def _parts(self, values: np.ndarray) -> list[np.ndarray]:
        if self.groups is None:
            return [values]
        names = np.asarray(self.groups)
        return [values[names == name] for name in dict.fromkeys(self.groups)]


def _normal(means: list[float], variances: list[float], limits: tuple[float, float]) -> Estimate:
    value, spread = sum(means) / len(means), Z * math.sqrt(sum(variances)) / len(means)
    return Estimate(value, max(value - spread, limits[0]), min(value + spread, limits[1]))


def _wilson(right: float, count: int) -> Estimate:
    fraction, square = right / count, Z**2
    middle = (fraction + square / (2 * count)) / (1 + square / count)
    spread = Z / (1 + square / count) * math.sqrt(fraction * (1 - fraction) / count + square / (4 * count**2))
    # The ends of none and all are exact, and must not be what rounding leaves of them.
    low, high = 0.0 if right == 0 else middle - spread, 1.0 if right == count else middle + spread
    return Estimate(fraction, low, high)


def _agresti_min(differences: np.ndarray) -> Estimate:
    better, worse, count = _pairs(differences)
    middle, spread = (better - worse) / count, Z * math.sqrt(_variance_of_pairs(differences))
    return Estimate(float(differences.mean()), max(middle - spread, -1.0), min(middle + spread, 1.0))


def _pairs(differences: np.ndarray) -> tuple[float, float, int]:
    """Returns how many pairs got better, how many worse, and how many there are, half a pair added to each case."""
    return float((differences > 0).sum()) + 0.5, float((differences < 0).sum()) + 0.5, len(differences) + 2


def _variance(values: np.ndarray) -> float:
    """Returns the variance of the mean."""
    return float(values.var(ddof=1)) / len(values) if len(values) > 1 else 0.0


def _variance_of_share(values: np.ndarray) -> float:
    fraction = (values.sum() + 2) / (len(values) + 4)
    return float(fraction * (1 - fraction)) / len(values)


def _variance_of_pairs(differences: np.ndarray) -> float:
    better, worse, count = _pairs(differences)
    return (better + worse - (better - worse) ** 2 / count) / count**2
