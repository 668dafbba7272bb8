"""Sends metrics, predictions and the adapter to a tracker, or nowhere; no tracker's package is imported but the chosen.

Wherever a run goes on in its folder, it goes on in its tracker, and nothing is recorded twice.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from qlora.config.schema import TrackingBackend, TrackingConfig
from qlora.runtime import distributed
from qlora.training.trackers.base import NoTracker, TrackedRun, Tracker

__all__ = ["NoTracker", "TrackedRun", "Tracker", "build_tracker", "tracker_ids"]

KINDS = {
    TrackingBackend.wandb: ("wandb", "WandbTracker"),
    TrackingBackend.tensorboard: ("tensorboard", "TensorboardTracker"),
    TrackingBackend.mlflow: ("mlflow", "MlflowTracker"),
    TrackingBackend.trackio: ("trackio", "TrackioTracker"),
}


def tracker_ids(folder: Path) -> dict[str, str]:
    """Returns the files of a run's folder that hold its ids in trackers, with their texts."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*_run_id.txt"))}


def build_tracker(config: TrackingConfig, run: TrackedRun) -> Tracker:
    """Starts the tracker that `config` names; in every process but the first, one that does nothing.

    Raises `ConfigError` if its package or its login is missing.
    """
    if config.in_use is TrackingBackend.none or not distributed.is_main_process():
        return NoTracker()
    module, kind = KINDS[config.backend]
    tracker: Tracker = getattr(importlib.import_module(f"{__name__}.{module}"), kind)(config, run)
    return tracker
