"""Where metrics go besides the run folder: the group `tracking`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from enum import StrEnum

from omegaconf import MISSING

from qlora.config.registries.trackers import NO_TRACKER, check_tracker
from qlora.errors import ConfigError

WandbMode = StrEnum("WandbMode", "online offline disabled")
"""Whether a run is sent to its tracker, and whether wandb talks to its server."""


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Where metrics go besides the run folder."""

    backend: str = MISSING
    """`none`, `wandb`, `tensorboard`, `mlflow` or `trackio`, chosen with `tracking=`; a tracker that an installed
    package adds; or a class of your own, as `module:Class`."""
    also: list[str] = field(default_factory=list)
    """Further trackers at the same time, by the same names: `tracking=wandb tracking.also=[tensorboard]`. The other
    fields hold for each that reads them."""
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
        for index, name in enumerate(self.also):
            check_tracker(name, f"tracking.also[{index}]")
        names = [self.backend, *self.also]
        if self.also and (NO_TRACKER in names or len({*names}) < len(names)):
            raise ConfigError(
                f"tracking.also={self.also} beside tracking={self.backend}: name each tracker once, one with tracking= "
                "and the others in tracking.also"
            )

    @property
    def trackers(self) -> list[TrackingConfig]:
        """The configs of the trackers in use, each of one alone."""
        single = [replace(self, backend=name, also=[]) for name in (self.backend, *self.also)]
        return [config for config in single if config.in_use != NO_TRACKER]

    @property
    def in_use(self) -> str:
        """The tracker that `backend` sends a run to: `none` where `mode` or the environment disables it."""
        silenced = os.environ.get("WANDB_MODE") == "disabled" or (
            os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on")
        )
        if self.mode is WandbMode.disabled or (silenced and self.backend == "wandb"):
            return NO_TRACKER
        return self.backend
