"""Metrics of generated answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora.config.schema import METRIC_LIBRARY, metric_name
from qlora.errors import ConfigError
from qlora.runtime.user_code import import_function

Metric = Callable[[Sequence[str], Sequence[str]], float | Sequence[float] | Mapping[str, Any]]
"""Gets predictions and references; returns a number, or one a row, or a mapping with numbers in it."""


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Returns 1 for each prediction that equals its reference, apart from white space at the ends, else 0."""
    return [
        float(prediction.strip() == reference.strip())
        for prediction, reference in zip(predictions, references, strict=True)
    ]


METRICS: dict[str, Metric] = {"exact_match": exact_match}


def find_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """Returns the functions of `evaluation.metrics` by the names that their numbers get.

    Raises `ConfigError` for one that cannot be had.
    """
    return {metric_name(name): METRICS.get(name) or _load(name) for name in names}


def _load(name: str) -> Metric:
    module, _, function = name.partition(":")
    return _from_library(function) if module == METRIC_LIBRARY else import_function(name, "evaluation.metrics")


def _from_library(name: str) -> Metric:
    shown = f"evaluation.metrics={METRIC_LIBRARY}:{name}"
    try:
        import evaluate
    except ImportError as error:
        raise ConfigError(f"{shown} needs the package evaluate; pip install 'qlora[eval]'") from error
    check_library_metric(name, shown)
    try:
        metric = evaluate.load(name)
    except ImportError as error:  # of a package that this metric computes with
        raise ConfigError(f"{shown}: {_first_line(error)}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{shown} could not be loaded from the hub: {_first_line(error)}; check the name and the network"
        ) from error

    def compute(predictions: Sequence[str], references: Sequence[str]) -> Mapping[str, Any]:
        return dict(metric.compute(predictions=predictions, references=references))

    return compute


def check_library_metric(name: str, shown: str) -> None:
    """Raises `ConfigError` unless `evaluate` looks for a metric among those of its authors on the hub.

    It would run a script in the working directory, or one of anybody's repository, of the same name.
    """
    if not re.fullmatch(r"\w+", name):
        raise ConfigError(
            f"{shown} names a script of somebody's; write a function, and name it as module:function with trusted=[...]"
        )
    kinds = ("metric", "comparison", "measurement")
    for path in (Path(name), *(Path(f"evaluate-{kind}") / name for kind in kinds)):
        if path.exists() or path.with_suffix(".py").exists():
            raise ConfigError(
                f"{shown}: the library would run code of {path.absolute()} in place of its own metric; start the "
                "command in another folder, or name a function as module:function with trusted=[...]"
            )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
