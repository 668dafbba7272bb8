"""Intervals and paired differences against published values and simulation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from qlora.evaluation.statistics import Score


def test_wilson_interval_of_a_share():
    # Newcombe (1998), table I: 15 of 148 and 0 of 20
    assert Score([1] * 15 + [0] * 133).estimate() == pytest.approx((15 / 148, 0.0624, 0.1605), abs=5e-5)
    assert Score([0] * 20).estimate() == pytest.approx((0, 0, 0.1611), abs=5e-5)


@pytest.mark.parametrize("count", [1, 7, 300, 1003])
def test_none_and_all_end_at_the_ends_and_not_beside_them(count):
    assert Score([0] * count).estimate().low == 0
    assert Score([1] * count).estimate().high == 1


def test_the_mean_of_groups_weighs_each_group_the_same():
    score = Score([1, 0, 0, 0, 1, 1], ["a", "a", "a", "a", "b", "b"])
    assert score.estimate().value == pytest.approx((0.25 + 1) / 2)
    assert 0 <= score.estimate().low < 0.625 < score.estimate().high <= 1


def test_a_group_without_a_mistake_is_not_certain():
    score = Score([1] * 10 + [0] * 10, ["a"] * 10 + ["b"] * 10).estimate()
    assert score.low < 0.5 < score.high


def test_numbers_that_are_no_shares_have_a_normal_interval():
    score = Score([1.0, 2.0, 3.0, 4.0]).estimate()
    assert score == pytest.approx((2.5, 2.5 - 1.96 * 0.6455, 2.5 + 1.96 * 0.6455), abs=1e-3)


def test_the_gain_is_paired():
    base, tuned = Score([0, 1, 0, 1] * 50), Score([1, 1, 0, 1] * 50)
    gain = tuned.gain(base)
    assert gain.value == 0.25
    assert 0.18 < gain.low < 0.25 < gain.high < 0.32
    same = tuned.gain(tuned)
    assert same.value == 0
    assert -0.02 < same.low < 0 < same.high < 0.02


@pytest.mark.parametrize(
    ("both", "worse", "better", "neither"),
    [(1, 7, 1, 12), (59, 16, 6, 80), (40, 0, 0, 0), (0, 0, 3, 0)],
    ids=["one cell is rare", "many pairs", "equal answers", "all better"],
)
def test_the_gain_of_shares_is_that_of_agresti_and_min(both, worse, better, neither):
    base = [1] * (both + worse) + [0] * (better + neither)
    tuned = [1] * both + [0] * worse + [1] * better + [0] * neither
    # "Add 0.5 to each cell, then take the Wald interval" (2005, section 4)
    b, c, n = worse + 0.5, better + 0.5, both + worse + better + neither + 2
    error = 1.959964 * math.sqrt((b + c) - (c - b) ** 2 / n) / n
    expected = max((c - b) / n - error, -1), min((c - b) / n + error, 1)
    gain = Score(tuned).gain(Score(base))
    assert gain.value == pytest.approx((better - worse) / (n - 2))
    assert (gain.low, gain.high) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("groups", [None, 5], ids=["one group", "five groups"])
def test_intervals_hold_the_truth_about_19_times_in_20(groups):
    draw = np.random.default_rng(0)
    names = None if groups is None else [str(index % groups) for index in range(100)]
    truth, gain, hits, gains = 0.3, 0.1, 0, 0
    for _ in range(2000):
        base = draw.random(100) < truth
        tuned = np.where(draw.random(100) < gain / (1 - truth), True, base)
        score = Score((base * 1).tolist(), names)
        estimate, difference = score.estimate(), Score((tuned * 1).tolist(), names).gain(score)
        hits += estimate.low <= truth <= estimate.high
        gains += difference.low <= gain <= difference.high
    assert 0.93 < hits / 2000 < 0.98
    assert 0.93 < gains / 2000 < 0.985


def test_a_stored_score_is_read_back():
    score = Score([1, 0], ["a", "b"])
    assert Score.from_dict(json.loads(json.dumps(score.to_dict()))) == score
