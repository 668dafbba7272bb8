"""Metrics of generated answers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

from qlora.errors import ConfigError

Metric = Callable[[Sequence[str], Sequence[str]], float]


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Returns the share of predictions that equal their reference, apart from white space at the ends."""
    hits = [
        prediction.strip() == reference.strip() for prediction, reference in zip(predictions, references, strict=True)
    ]
    return sum(hits) / len(hits)


METRICS: dict[str, Metric] = {"exact_match": exact_match}


def find_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """Returns the functions of `evaluation.metrics` by the last part of their names."""
    return {name.rsplit(":")[-1]: METRICS.get(name) or _import(name) for name in names}


def _import(name: str) -> Metric:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"evaluation.metrics: {name!r} cannot be imported ({error}); check the module's name and PYTHONPATH"
        ) from error
    if not callable(found):
        raise ConfigError(f"evaluation.metrics: {name!r} is no function")
    return found
