"""The metrics that a search optimizes, and whether the jobs measure them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qlora.config.schema import Config, EvaluationName
from qlora.errors import ConfigError, UserError
from qlora.sweep.engine_config import SearchSettings
from qlora.text import higher_is_better

OBJECTIVES = "hydra.sweeper.objectives"


@dataclass(frozen=True)
class Goal:
    """A metric and the direction in which it is optimized."""

    metric: str
    direction: Literal["minimize", "maximize"]

    def worst(self) -> float:
        """Returns the value that a diverged run gets."""
        return -math.inf if self.direction == "maximize" else math.inf


def find_goals(settings: SearchSettings, configs: Sequence[Config]) -> list[Goal]:
    """Returns the metrics to optimize; raises `ConfigError` for one that the jobs do not measure."""
    names = settings.objectives or ([configs[0].objective] if configs[0].objective else [])
    if not names:
        raise ConfigError("objective=null: a search needs a metric to optimize, e.g. objective=eval_loss")
    given = settings.directions
    if given is not None and len(given) != len(names):
        raise ConfigError(
            f"hydra.sweeper.direction has {len(given)} values for {len(names)} objectives ({', '.join(names)}); give "
            "one for each, or leave it out"
        )
    for config in configs:
        for name in names:
            check_measured(config, name, OBJECTIVES)
    directions = given or ["maximize" if higher_is_better(name) else "minimize" for name in names]
    goals = [Goal(name, direction) for name, direction in zip(names, directions, strict=True)]
    if len(goals) > 1 and settings.sampler == "cmaes":
        raise ConfigError("hydra.sweeper.sampler=cmaes supports a single objective; choose tpe for several")
    return goals


def check_measured(config: Config, name: str, key: str) -> None:
    """Raises `ConfigError` if a job does not measure the metric `name`, which `key` asks for."""
    try:
        dataclasses.replace(config, objective=name)
    except UserError as error:
        raise ConfigError(str(error).replace("objective=", f"{key}: ", 1)) from error
    if missing := _missing_override(config, name):
        raise ConfigError(
            f"{'objective' if key == OBJECTIVES else key}={name} is not measured by these jobs; it needs {missing}"
        )


def _missing_override(config: Config, name: str) -> str | None:
    """Returns the override without which a job does not measure a metric; None: the job measures it."""
    task, training = config.task, config.task.name.trains
    of_rows, of_base = name.startswith(("eval_", "base_eval_")), name.startswith("base_eval_")
    measures = task.name.measures_base if of_base else task.name.measures_rows
    needs = {
        "task=train": training or (of_rows and measures),
        "task.train=true": task.train or of_rows,
        "rows to measure (data.eval_dataset_size above 0)": config.data.holds_out or not of_rows,
        "task.evaluate=true": task.evaluate or not of_rows or not (training or of_base),
        "evaluation.baseline=true": config.evaluation.baseline or not of_base,
    }
    return next((need for need, fulfilled in needs.items() if not fulfilled), None)


def check_pruning(settings: SearchSettings, configs: Sequence[Config], goals: Sequence[Goal]) -> None:
    """Raises `ConfigError` if the pruner could not compare trials while they train."""
    chosen = f"hydra.sweeper.pruner={settings.pruner}"
    if settings.pruner == "none":
        return
    if len(goals) > 1:
        names = ", ".join(goal.metric for goal in goals)
        raise ConfigError(
            f"{chosen} compares trials by a single objective, got {names}; keep one, or choose pruner=none"
        )
    measured = ["eval_loss", "eval_perplexity", *(f"eval_{name}" for name in configs[0].loss.measured)]
    if configs[0].evaluation.name is EvaluationName.mmlu:
        measured += [f"eval_mmlu_{configs[0].evaluation.split.value}_{name}" for name in ("accuracy", "loss")]
    if goals[0].metric not in measured:
        raise ConfigError(
            f"{chosen} needs an objective that is measured during training ({', '.join(measured)}), got "
            f"{goals[0].metric}; choose one of them, or pruner=none"
        )
    if any(config.trainer.eval_steps is None for config in configs):
        raise ConfigError(
            f"{chosen} compares evaluations during training, but trainer.eval_steps is not set; set it, e.g. to a "
            "tenth of trainer.max_steps"
        )
