"""How much of the differences between runs each varied key explains."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

ENOUGH = 8
"""Fewer runs say more about chance than about keys."""


Importance = tuple[dict[str, float], str]


def measure_importance(values: Sequence[Mapping[str, str]], objectives: Sequence[float]) -> Importance:
    """Returns the fraction of the differences between the objectives that each key explains, the largest first.

    The second value is a sentence that says how it was computed, or why it could not be (then there are no
    fractions). `values` has a mapping for each run: its varied keys as texts.
    """
    keys = [key for key in dict.fromkeys(key for point in values for key in point)
            if len({point.get(key, "") for point in values}) > 1]  # fmt: skip
    if len(keys) < 2:
        return {}, "Importance compares parameters, and fewer than two are varied."
    if len(objectives) < ENOUGH:
        return {}, f"Importance needs at least {ENOUGH} finished runs; so far there are {len(objectives)}."
    if min(objectives) == max(objectives):
        return {}, "Importance cannot be computed: all finished runs have the same objective."
    if importlib.util.find_spec("optuna") is None:
        return {}, "Importance needs Optuna: pip install 'qlora[optuna]'."
    return _evaluate(keys, values, objectives)


def _evaluate(keys: Sequence[str], values: Sequence[Mapping[str, str]], objectives: Sequence[float]) -> Importance:
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    choices = {key: _choices([point.get(key, "") for point in values]) for key in keys}
    for point, objective in zip(values, objectives, strict=True):
        parameters = {key: choices[key][0][point.get(key, "")] for key in keys}
        distributions = {key: choices[key][1] for key in keys}
        study.add_trial(optuna.create_trial(params=parameters, distributions=distributions, value=objective))
    forest = importlib.util.find_spec("sklearn") is not None
    evaluator = FanovaImportanceEvaluator(seed=0) if forest else PedAnovaImportanceEvaluator(target_quantile=0.25)
    shares = get_param_importances(study, evaluator=evaluator)
    name = "fANOVA" if forest else "PED-ANOVA"
    return shares, f"Importance by Optuna's {name} over {len(objectives)} finished runs; few runs make it uncertain."


def _choices(texts: Sequence[str]) -> tuple[dict[str, Any], Any]:
    """Returns what each text is as a parameter, and the distribution that it is of."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    different = sorted(set(texts))
    numbers = to_numbers(different)
    if numbers is None:
        return {text: text for text in different}, CategoricalDistribution(different)
    low, high = min(numbers), max(numbers)
    return dict(zip(different, numbers, strict=True)), FloatDistribution(low, high, log=spans_decades(numbers))


def to_numbers(texts: Sequence[str]) -> list[float] | None:
    """Returns texts as numbers, or None unless all of them are finite ones."""
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        return None
    return numbers if all(abs(number) < float("inf") for number in numbers) else None


def spans_decades(numbers: Sequence[float]) -> bool:
    """Returns whether numbers are read by their ratios: all above 0, the largest eight times the smallest or more."""
    return min(numbers) > 0 and max(numbers) >= 8 * min(numbers)
