"""Measures of all rows together, such as a rank correlation: 95 % intervals by resampling the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora.evaluation.statistics import Estimate

RESAMPLES = 1000
"""How often rows are resampled, with replacement, from a fixed seed (the percentile bootstrap of Efron, 1979)."""


@dataclass(frozen=True)
class RowStatistic:
    """What is said of each row beside what is true of it, and the measure of them all."""

    name: str
    """A name of `STATISTICS`."""
    values: Sequence[Any]
    """What is said: a number for each row, or several."""
    truth: Sequence[Any]

    def estimate(self) -> Estimate:
        """Returns the measure with its interval."""
        measure, said, true = self._arrays()
        resampled = [measure(said[rows], true[rows]) for rows in _resample(len(said))]
        return _interval(measure(said, true), resampled)

    def gain(self, base: RowStatistic) -> Estimate:
        """Returns how much more than `base`, on the same rows, was measured: the difference in equal draws."""
        measure, said, true = self._arrays()
        previous = np.asarray(base.values, float)
        resampled = [
            measure(said[rows], true[rows]) - measure(previous[rows], true[rows]) for rows in _resample(len(said))
        ]
        return _interval(measure(said, true) - measure(previous, true), resampled)

    def to_dict(self) -> dict[str, Any]:
        """Returns the statistic in JSON's types, for `from_dict`."""
        return {"statistic": self.name, "values": list(self.values), "truth": list(self.truth)}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> RowStatistic:
        """Returns the statistic that `to_dict` wrote."""
        return cls(saved["statistic"], saved["values"], saved["truth"])

    def _arrays(self) -> tuple[Callable[[np.ndarray, np.ndarray], float], np.ndarray, np.ndarray]:
        return STATISTICS[self.name], np.asarray(self.values, float), np.asarray(self.truth, float)


def _resample(count: int) -> list[np.ndarray]:
    stream = np.random.RandomState(0)
    return [stream.randint(0, count, count) for _ in range(RESAMPLES)]


def _interval(value: float, resampled: Sequence[float]) -> Estimate:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(value, min(float(low), value), max(float(high), value))


def macro_f1(said: np.ndarray, truth: np.ndarray) -> float:
    """Returns the mean, over the classes that occur, of F1: 2 right / (said + true) of a class."""
    size = int(max(said.max(), truth.max())) + 1
    right = np.bincount(truth[said == truth].astype(int), minlength=size)
    both = np.bincount(said.astype(int), minlength=size) + np.bincount(truth.astype(int), minlength=size)
    return float((2 * right[both > 0] / both[both > 0]).mean())


def pearson(said: np.ndarray, truth: np.ndarray) -> float:
    """Returns the correlation; of several numbers a row the mean of theirs. Where one side is constant it is 0."""
    said, truth = (values.reshape(len(values), -1) for values in (said, truth))
    first, second = said - said.mean(0), truth - truth.mean(0)
    scale = np.sqrt((first**2).sum(0) * (second**2).sum(0))
    return float(np.where(scale > 1e-12, (first * second).sum(0) / np.where(scale > 1e-12, scale, 1), 0).mean())


def spearman(said: np.ndarray, truth: np.ndarray) -> float:
    """Returns the correlation of ranks; equal numbers have the mean of theirs."""
    return pearson(_ranks(said), _ranks(truth))


def _ranks(values: np.ndarray) -> np.ndarray:
    columns = values.reshape(len(values), -1)
    return np.stack([_ranks_of(column) for column in columns.T], 1)


def _ranks_of(column: np.ndarray) -> np.ndarray:
    _, index, counts = np.unique(column, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return (ends - (counts - 1) / 2)[index]


STATISTICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "macro_f1": macro_f1,
    "pearson": pearson,
    "spearman": spearman,
}
"""The measures by name, each of what is said of rows and what is true."""
