"""Measures of all rows together equal those of scikit-learn and SciPy, and have intervals."""

from __future__ import annotations

import numpy as np
import pytest

from qlora.evaluation.row_statistics import STATISTICS, RowStatistic


def test_macro_f1_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    stream = np.random.RandomState(0)
    said, truth = stream.randint(0, 5, 60), stream.choice([0, 1, 2, 4], 60)
    assert STATISTICS["macro_f1"](said, truth) == pytest.approx(metrics.f1_score(truth, said, average="macro"))


@pytest.mark.parametrize(("name", "function"), [("pearson", "pearsonr"), ("spearman", "spearmanr")])
def test_correlations_are_those_of_scipy_with_equal_numbers_too(name: str, function: str) -> None:
    stats = pytest.importorskip("scipy.stats")
    stream = np.random.RandomState(0)
    said = stream.randint(0, 6, 40).astype(float)
    truth = said + stream.randn(40)
    expected = getattr(stats, function)(said, truth).statistic
    assert STATISTICS[name](said, truth) == pytest.approx(expected)
    two = STATISTICS[name](np.stack([said, said], 1), np.stack([truth, -truth], 1))
    assert two == pytest.approx(0, abs=1e-9)  # the mean of both


def test_an_interval_holds_the_measure_and_a_gain_is_paired() -> None:
    truth = list(range(50))
    better = RowStatistic("pearson", [value + (value % 3) for value in truth], truth)
    worse = RowStatistic.from_dict(RowStatistic("pearson", [0.0] * 50, truth).to_dict())
    estimate = better.estimate()
    assert estimate.low <= estimate.value <= estimate.high < 1
    assert worse.estimate() == (0, 0, 0)
    assert better.gain(worse).low > 0.9
    assert better.gain(better) == (0, 0, 0)
