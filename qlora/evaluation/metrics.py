"""Metrics of generated answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora.config.registries.installed import installed_names
from qlora.config.schema import METRIC_LIBRARY, metric_name
from qlora.config.schema.evaluation import METRIC_GROUP
from qlora.config.user_code import import_function
from qlora.errors import ConfigError, ResourceError, RunError

Metric = Callable[[Sequence[str], Sequence[str]], float | Sequence[float] | Mapping[str, Any]]
"""Takes predictions and references; returns a number, a number for each row, or a mapping that holds numbers."""


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Returns 1 for each prediction that equals its reference apart from white space at the ends, else 0."""
    return [
        float(prediction.strip() == reference.strip())
        for prediction, reference in zip(predictions, references, strict=True)
    ]


METRICS: dict[str, Metric] = {"exact_match": exact_match}


def find_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """Returns the functions of `evaluation.metrics` by the names under which their values are reported.

    Raises a `UserError` for a metric that is not available.
    """
    return {metric_name(name): METRICS.get(name) or _load(name) for name in names}


def _load(name: str) -> Metric:
    name = installed_names(METRIC_GROUP).get(name, name)
    module, _, function = name.partition(":")
    return _from_library(function) if module == METRIC_LIBRARY else import_function(name, "evaluation.metrics")


def _from_library(name: str) -> Metric:
    setting = f"evaluation.metrics={METRIC_LIBRARY}:{name}"
    try:
        import evaluate
    except ImportError as error:
        raise ResourceError(f"{setting} needs the package evaluate; pip install 'qlora[eval]'") from error
    check_library_metric(name, setting)
    try:
        metric = evaluate.load(name)
    except ImportError as error:  # the metric needs a package that is missing
        raise ResourceError(f"{setting}: {_first_line(error)}") from error
    except (OSError, ValueError) as error:
        raise ResourceError(
            f"{setting} could not be loaded from the hub: {_first_line(error)}; check the name and the network"
        ) from error

    def compute(predictions: Sequence[str], references: Sequence[str]) -> Mapping[str, Any]:
        return dict(metric.compute(predictions=predictions, references=references))

    return compute


def check_library_metric(name: str, setting: str) -> None:
    """Raises a `UserError` unless `evaluate` loads the metric from its authors' repositories on the hub.

    For other names it would run a script of the working directory, or of anybody's repository.
    """
    if not re.fullmatch(r"\w+", name):
        raise ConfigError(
            f"{setting} names a script of an unknown author; write a function, and name it as module:function with "
            "trusted=[...]"
        )
    kinds = ("metric", "comparison", "measurement")
    for path in (Path(name), *(Path(f"evaluate-{kind}") / name for kind in kinds)):
        if path.exists() or path.with_suffix(".py").exists():
            raise RunError(
                f"{setting}: the library would run the code of {path.absolute()} instead of its own metric; start the "
                "command in another folder, or name a function as module:function with trusted=[...]"
            )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
