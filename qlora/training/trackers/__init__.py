"""Sends metrics, predictions and the adapter to a tracker, or nowhere; imports no other tracker's package.

A run that resumes in its folder resumes in its tracker, and records nothing twice.
"""

from __future__ import annotations

from pathlib import Path

from qlora.config.registries.trackers import NO_TRACKER, tracker_path
from qlora.config.schema import TrackingConfig
from qlora.config.user_code import import_function
from qlora.errors import ConfigError
from qlora.runtime import distributed
from qlora.training.trackers.base import NoTracker, TrackedRun, Tracker
from qlora.training.trackers.several import SeveralTrackers

__all__ = ["NoTracker", "TrackedRun", "Tracker", "build_tracker", "tracker_class", "tracker_ids"]


def tracker_ids(folder: Path) -> dict[str, str]:
    """Returns the files of a run's folder that hold its ids in trackers, with their texts."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*_run_id.txt"))}


def tracker_class(config: TrackingConfig) -> type[Tracker]:
    """Returns the class of the tracker that `config` names; raises `ConfigError` if there is none."""
    name = config.in_use
    if name == NO_TRACKER:
        return NoTracker
    result = import_function(tracker_path(name) or name, "tracking.backend")
    if not isinstance(result, type) or not issubclass(result, Tracker):
        raise ConfigError(f"tracking.backend={name} is not a subclass of qlora.training.trackers.Tracker")
    return result


def build_tracker(config: TrackingConfig, run: TrackedRun) -> Tracker:
    """Starts what `config` names; in every process but the main one, a tracker that does nothing.

    Raises a `UserError` if a package or a login is missing; then none stays open.
    """
    configs = config.trackers if distributed.is_main_process() else []
    kinds = [tracker_class(single) for single in configs]
    started: list[Tracker] = []
    try:
        for kind, single in zip(kinds, configs, strict=True):
            started.append(kind(single, run))
    except BaseException:
        SeveralTrackers(started).finish("failed", {})
        raise
    if not started:
        return NoTracker(config, run)
    return started[0] if len(started) == 1 else SeveralTrackers(started)
