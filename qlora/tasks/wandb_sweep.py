"""A sweep that wandb's own agents run: `task=wandb-sweep` writes what `wandb sweep` reads."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override

from qlora.config.schema import Config, SweepMethod, WandbMode
from qlora.config.sweep_values import is_logarithmic, swept_values
from qlora.errors import ConfigError
from qlora.runtime.atomic_files import write_text
from qlora.runtime.console import say_rows
from qlora.runtime.needs import Needs
from qlora.runtime.sweep_job import SweepJob
from qlora.runtime.task_result import TaskResult
from qlora.sweep.launcher import NOT_PASSED_ON
from qlora.tasks.protocol import TaskJob
from qlora.text import higher_is_better

FILE = "wandb-sweep.yaml"
DISTRIBUTIONS = {
    (False, False): "uniform",
    (False, True): "log_uniform_values",
    (True, False): "int_uniform",
    (True, True): "q_log_uniform_values",
}
"""wandb's names of intervals, by whether their ends are whole numbers and whether their scale is logarithmic."""


def needs(config: Config) -> Needs:
    """Returns what the description needs; wandb's agents run the jobs."""
    return Needs(folder=False, whole_sweep=True)


def run(job: TaskJob) -> TaskResult:
    """Writes the sweep that the command describes into its folder, and prints what to type next.

    Raises `ConfigError` for a sweep that wandb cannot run.
    """
    config, sweep = job.config, job.whole_sweep
    assert sweep is not None, "the task declares whole_sweep"
    if sweep.has_conditions:
        raise ConfigError("task=wandb-sweep: wandb knows no hydra.sweeper.conditions; leave them out")
    _check_tracking(config, sweep.overrides)
    path = job.folder.path / FILE
    description = describe(config, sweep.overrides, job.folder.path, sweep.config_dir)
    write_text(path, yaml.safe_dump(description, sort_keys=False, allow_unicode=True, width=1000))
    name = "/".join([config.tracking.entity or "ENTITY", config.tracking.project, "ID"])
    say_rows([
        ("sweep", str(path)),
        ("next", f"wandb sweep {shlex.quote(str(path))}"),
        ("then", f"wandb agent {name}, as wandb sweep prints it, here and wherever jobs shall run"),
    ])  # fmt: skip
    return TaskResult("wandb_sweep", {}, {"sweep": str(path)})


def _check_tracking(config: Config, overrides: Sequence[str]) -> None:
    tracking = config.tracking
    if tracking.backend != "wandb" and any(text.startswith("tracking=") for text in overrides):
        raise ConfigError(
            f"tracking={tracking.backend}: the jobs of task=wandb-sweep report to wandb; choose tracking=wandb, "
            "or leave it out"
        )
    if tracking.mode is not WandbMode.online:
        raise ConfigError(
            f"tracking.mode={tracking.mode.value}: the agents of task=wandb-sweep need wandb's server; leave it out"
        )


def describe(config: Config, overrides: Sequence[str], folder: Path, config_dir: str | None = None) -> dict[str, Any]:
    """Returns wandb's description of the sweep of `overrides`; its jobs lie in `folder`, by their wandb ids."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    parameters = {item.get_key_element(): parameter(item) for item in parsed if item.is_sweep_override()}
    if not parameters:
        raise ConfigError("task=wandb-sweep: there is nothing to vary; give a key several values, e.g. lora.r=8,16")
    fixed = [
        item.input_line or "" for item in parsed if not (item.get_key_element() in parameters or _is_left_out(item))
    ]
    tracked = any(text.startswith("tracking=") for text in fixed)
    quoted_folder = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    variables = [f"{name}={value}" for name, value in SweepJob.environment(folder.name, list(parameters)).items()]
    entity = config.tracking.entity
    return {
        "name": folder.name,
        "project": config.tracking.project,
        **({"entity": entity} if entity else {}),
        "program": "qlora",
        "method": _method(config, parameters).value,
        **({"metric": _metric(config.objective)} if config.objective else {}),
        "parameters": parameters,
        "command": [
            *("${env}", *variables, "python", "-m", "qlora"),
            *(["--config-dir", config_dir] if config_dir else []),
            *fixed,
            *([] if tracked else ["tracking=wandb"]),
            *("hydra.mode=RUN", f"hydra.run.dir='{quoted_folder}/${{oc.env:WANDB_RUN_ID}}'", "${args_no_hyphens}"),
        ],
    }


def _is_left_out(override: Override) -> bool:
    """Returns whether an override is for this task, or for an engine of ours."""
    key = override.key_or_group
    return key in ("task", "task.method") or key.startswith(NOT_PASSED_ON)


def _metric(objective: str) -> dict[str, str]:
    return {"name": objective, "goal": "maximize" if higher_is_better(objective) else "minimize"}


def _method(config: Config, parameters: dict[str, dict[str, Any]]) -> SweepMethod:
    method = config.task.method
    endless = [key for key, space in parameters.items() if "values" not in space]
    if method is None:
        method = SweepMethod.grid if not endless else SweepMethod.bayes if config.objective else SweepMethod.random
    if method is SweepMethod.grid and endless:
        raise ConfigError(
            f"task.method=grid: {endless[0]} is an interval, which has no grid; list its values, or choose random or "
            "bayes"
        )
    if method is SweepMethod.bayes and config.objective is None:
        raise ConfigError("task.method=bayes: objective=null leaves no metric to go by; set it, e.g. to eval_loss")
    return method


def parameter(override: Override) -> dict[str, Any]:
    """Returns wandb's description of the values of one key; raises `ConfigError` for what it cannot describe."""
    text, value = override.input_line, override.value()
    swept_values(override)  # refuses an empty one
    log = is_logarithmic(override)
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        whole = isinstance(low, int) and isinstance(high, int)
        interval = {"distribution": DISTRIBUTIONS[whole, log], "min": low, "max": high}
        return {**interval, "q": 1} if whole and log else interval
    if log:
        raise ConfigError(f"{text}: a list of values has no scale; leave tag(log,...) out, or give an interval")
    pairs = zip(override.sweep_iterator(), override.sweep_string_iterator(), strict=True)
    return {"values": [element if _is_number(element) else written for element, written in pairs]}


def _is_number(element: Any) -> bool:
    """Returns whether an agent writes a value as an override reads it; texts are passed on as they were written."""
    return isinstance(element, bool | int) or (isinstance(element, float) and math.isfinite(element))
