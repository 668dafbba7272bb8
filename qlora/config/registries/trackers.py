"""The trackers that `tracking.backend` may name; their modules are not imported before a run starts one."""

from __future__ import annotations

from qlora.config.registries.installed import check_name, installed_names

NO_TRACKER = "none"
GROUP = "qlora.trackers"
"""The entry points by which an installed package adds trackers."""
TRACKERS = {
    "wandb": "qlora.training.trackers.wandb:WandbTracker",
    "tensorboard": "qlora.training.trackers.tensorboard:TensorboardTracker",
    "mlflow": "qlora.training.trackers.mlflow:MlflowTracker",
    "trackio": "qlora.training.trackers.trackio:TrackioTracker",
}
"""The trackers of this package: by name the class, `module:Class`. The extra `qlora[NAME]` installs what it needs."""


def tracker_path(name: str) -> str | None:
    """Returns the class of a tracker that is ours or an installed package's, as `module:Class`; None: no such name."""
    return TRACKERS.get(name) or installed_names(GROUP).get(name)


def check_tracker(name: str, key: str = "tracking.backend") -> None:
    """Raises `ConfigError` for a name that no tracker has; imports none."""
    check_name(key, name, (NO_TRACKER, *TRACKERS), GROUP)
