"""The end of a run on the screen: its metrics before and after, some answers, its files, what to type next."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora.config.schema import Config
from qlora.runtime import console
from qlora.text import format_range, is_detail

OF_ONE_START = ("task=", "adapter=", "hydra.run.dir=", "name=", "resume=")
"""Overrides that the next command does not take over."""


def print_summary(
    title: str,
    result: Mapping[str, Any],
    predictions: Iterable[Mapping[str, Any]],
    *,
    config: Config,
    folder: Path,
    overrides: Sequence[str],
    left_out: Sequence[str] = (),
) -> None:
    """Prints a result, and the commands that use what was trained; `left_out` overrides are not repeated in them."""
    metrics = result["metrics"]
    names = [key.removeprefix("eval_") for key in metrics if key.startswith("eval_") and not is_detail(key)]
    rows = [
        (name, metrics.get(f"base_eval_{name}"), metrics[f"eval_{name}"], describe_certainty(name, result))
        for name in names
    ]
    chosen = [text for text in overrides if not text.startswith((*OF_ONE_START, *left_out))]
    command = shlex.join(["qlora", *chosen, f"adapter={config.adapter or folder}"])
    console.summary(
        f"{title}: {folder}",
        rows,
        [dict(row) for row in predictions][: config.evaluation.show_predictions],
        list(result["paths"].items()),
        [f"{command} task={task}" for task in ("evaluate", "predict", "chat")],
    )


def describe_certainty(name: str, result: Mapping[str, Any]) -> str:
    """Returns the 95 % interval of a metric as text, with the paired difference to the untuned base."""
    interval, gain = result.get("intervals", {}).get(f"eval_{name}"), result.get("gains", {}).get(name)
    if interval is None:
        return ""
    text = f"95 %: {format_range(name, *interval)}"
    if gain is None:
        return text
    return f"{text}; gain {format_range(name, gain['low'], gain['high'], signed=True)}"
