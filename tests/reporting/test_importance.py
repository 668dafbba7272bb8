"""Which key explains the differences between runs, and when that cannot be said."""

from __future__ import annotations

import importlib.util
import itertools

import pytest

from qlora.reporting.importance import measure_importance, spans_decades, to_numbers

GRID = [
    {"lora.r": r, "lr": lr, "model": model}
    for r, lr, model in itertools.product(["4", "8", "16", "32"], ["1e-4", "1e-3"], ["a", "b"])
]


def test_the_key_that_decides_has_the_largest_share() -> None:
    pytest.importorskip("optuna")
    objectives = [float(point["lora.r"]) + 0.1 * (point["lr"] == "1e-3") for point in GRID]
    shares, note = measure_importance(GRID, objectives)
    assert next(iter(shares)) == "lora.r"
    assert shares["lora.r"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)
    assert "over 16 finished runs" in note


def test_a_choice_of_words_can_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    shares, note = measure_importance(GRID, [1.0 if point["model"] == "a" else 2.0 for point in GRID])
    assert next(iter(shares)) == "model"
    assert "PED-ANOVA" in note


@pytest.mark.parametrize(
    ("values", "objectives", "note"),
    [
        ([], [], "fewer than two are varied"),
        ([{"r": str(r)} for r in range(9)], [float(r) for r in range(9)], "fewer than two are varied"),
        (GRID[:7], [1.0] * 7, "at least 8 finished runs; so far there are 7"),
        (GRID, [1.0] * 16, "all finished runs have the same objective"),
    ],
)
def test_without_enough_to_go_by_one_sentence_says_so(
    values: list[dict[str, str]], objectives: list[float], note: str
) -> None:
    shares, said = measure_importance(values, objectives)
    assert shares == {}
    assert note in said
    assert said.count(".") == 1


def test_without_optuna_one_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    shares, said = measure_importance(GRID, [float(number) for number in range(16)])
    assert (shares, said) == ({}, "Importance needs Optuna: pip install 'qlora[optuna]'.")


def test_numbers_are_told_from_words() -> None:
    assert to_numbers(["1e-4", "3"]) == [1e-4, 3.0]
    assert to_numbers(["1", "nf4"]) is None
    assert to_numbers(["1", "nan"]) is None
    assert spans_decades([1e-4, 1e-3])
    assert not spans_decades([4, 8, 16])
    assert not spans_decades([0, 1, 100])
