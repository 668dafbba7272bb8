"""Where metrics go besides the run folder: the group `tracking`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING

from qlora.config.registries.trackers import NO_TRACKER, check_tracker

WandbMode = StrEnum("WandbMode", "online offline disabled")
"""Whether a run is sent to its tracker, and whether wandb talks to its server."""


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Where metrics go besides the run folder."""

    backend: str = MISSING
    """`none`, `wandb`, `tensorboard`, `mlflow` or `trackio`, chosen with `tracking=`; a tracker that an installed
    package adds; or a class of your own, as `module:Class`."""
    project: str = "qlora"
    """The project of wandb and Trackio, the experiment of MLflow."""
    entity: str | None = None
    """The wandb user or team; unset: the login's default."""
    group: str | None = None
    """Runs of one group are shown together; unset: those of a sweep."""
    tags: list[str] = field(default_factory=list)
    """Labels of the run, in wandb and MLflow; a job of a sweep has the sweep's name beside them."""
    mode: WandbMode = WandbMode.online
    """`offline` writes the wandb run to the run folder, to be sent later with `wandb sync`. `disabled` tracks nothing,
    nor does wandb where the environment has `WANDB_MODE=disabled` or `WANDB_DISABLED=true`."""
    uri: str | None = None
    """MLflow's server or database, e.g. `http://localhost:5000`; unset: the environment's MLFLOW_TRACKING_URI, else
    `sqlite:///outputs/mlflow/mlflow.db`."""
    log_adapter: bool = False
    """Store the finished adapter with the run, in wandb and MLflow."""

    def __post_init__(self) -> None:
        check_tracker(self.backend)

    @property
    def in_use(self) -> str:
        """The tracker that a run is sent to: `none` where `mode` or the environment disables it."""
        silenced = os.environ.get("WANDB_MODE") == "disabled" or (
            os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on")
        )
        if self.mode is WandbMode.disabled or (silenced and self.backend == "wandb"):
            return NO_TRACKER
        return self.backend
