"""What the board shows of single runs: their curves, their config, their answers and training rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora.config.saved_config import flatten, read_config
from qlora.errors import DamagedFile
from qlora.reporting.answers import read_answers
from qlora.reporting.examples import read_examples
from qlora.reporting.history import Curve, curves, read_history, with_base
from qlora.reporting.rendering import chart, line, plain_value
from qlora.reporting.run_page import base_metrics
from qlora.runtime.run_folder import RunFolder
from qlora.runtime.saved_run import json_number, read_result

MAX_POINTS = 20_000
"""The points of all curves of a metric."""


def read_curves(folders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Returns a chart for each metric that the runs have logged; a line's group is the index of its run."""
    measured = [_curves(folder) for folder in folders.values()]
    most = max(MAX_POINTS // max(len(measured), 1), 100)
    names = dict.fromkeys(name for run in measured for name in run)
    return [
        {"name": name}
        | chart(name, [line(index, run[name].thin(most), smooth=not name.startswith("eval_"))
                       for index, run in enumerate(measured) if name in run])
        for name in names
    ]  # fmt: skip


def _curves(folder: Path) -> dict[str, Curve]:
    run = RunFolder(folder)
    return with_base(curves(read_history(folder)), base_metrics(run, _metrics(run)))


def read_details(folder: Path) -> dict[str, Any]:
    """Returns config, metrics, answers and training rows of a run; what is damaged is left out."""
    run = RunFolder(folder)
    manifest = _intact(run.stored_manifest) or {}
    config = manifest.get("config") or _intact(lambda: read_config(run.config)) or {}
    preset = manifest.get("preset")
    return {
        "config": {key: plain_value(value) for key, value in flatten(dict(config))},
        "preset": {key: plain_value(value) for key, value in preset.items()} if isinstance(preset, dict) else None,
        "metrics": {name: json_number(value) for name, value in _metrics(run).items()},
        "answers": read_answers(run),
        "examples": _intact(lambda: read_examples(run.examples)) or [],
    }


def _metrics(run: RunFolder) -> dict[str, float]:
    result = _intact(lambda: read_result(run.result("train"))) or {}
    return dict(result.get("metrics", {}))


def _intact(read: Any) -> Any:
    try:
        return read()
    except DamagedFile:
        return None
