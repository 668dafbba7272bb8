"""Reads the results of the lm-evaluation-harness: the metrics of tasks and groups, and a record of each item."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from qlora.evaluation.measure import Measurement
from qlora.evaluation.statistics import Score


def find_roots(loaded: Any) -> list[Any]:
    """Returns the tasks and groups that are part of no other group."""
    children = {name for group in loaded["groups"].values() for name in group.child_names}
    named = {**loaded["groups"], **loaded["tasks"]}
    return [item for name, item in named.items() if name not in children]


def read_result(item: Any, output: Any, parent: str | None = None) -> Measurement:
    """Returns the measurement of a task, or of a group with its parts.

    The parts of a group with its own total are named `lm_eval_GROUP_METRIC/PART`, after the pattern `parent`.
    """
    parts = list(item) if hasattr(item, "child_names") else []
    name = item.name if parts else item.task_name
    leaves = [task.task_name for task in item.get_all_tasks()] if parts else [name]
    numbers = {tuple(key.split(",")): value for key, value in output["results"][name].items() if "," in key}
    numbers = {key: value for key, value in numbers.items() if not key[0].endswith("_stderr")}
    metrics = [metric for metric, _ in numbers]
    measured = Measurement()
    for (metric, kind), value in numbers.items():
        label = metric if metrics.count(metric) == 1 else f"{metric}_{kind}"
        full = f"{parent.format(_plain(label))}/{_plain(name)}" if parent else f"lm_eval_{_plain(name)}_{_plain(label)}"
        measured |= _with_items(full, float(value), [_earned(output["samples"][leaf], metric, kind) for leaf in leaves])
    pattern = parent or (f"lm_eval_{_plain(name)}_{{}}" if numbers else None)
    for part in parts:
        measured |= read_result(part, output, pattern)
    return measured


def _with_items(name: str, value: float, parts: list[list[float] | None]) -> Measurement:
    """Returns a number, with the scores of the items if it is their mean or the mean of the parts' means."""
    if None in parts or not any(parts):
        return Measurement({name: value})
    values = [earned for part in parts for earned in part or ()]
    groups = [str(index) for index, part in enumerate(parts) for _ in part or ()]
    for score in (Score(values), Score(values, groups)):
        if math.isclose(score.estimate().value, value, rel_tol=1e-6, abs_tol=1e-9):
            return Measurement({name: value}, {name: score})
    return Measurement({name: value})


def _earned(samples: list[dict[str, Any]], metric: str, kind: str) -> list[float] | None:
    """Returns the score of each item in a metric; None if a score is not a number."""
    try:
        return [float(sample[metric]) for sample in samples if sample["filter"] == kind and metric in sample]
    except (TypeError, ValueError):
        return None


def read_records(samples: dict[str, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yields a record of each item, in JSON's types."""
    for task, items in samples.items():
        for item in items:
            kept = {"task": task, "id": item["doc_id"], "item": item["doc"], "target": item["target"]}
            kept |= {"answers": item["filtered_resps"], "filter": item["filter"]}
            yield json.loads(json.dumps(kept | {name: item[name] for name in item["metrics"]}, default=str))


def _plain(name: str) -> str:
    return re.sub(r"\W+", "_", name)
