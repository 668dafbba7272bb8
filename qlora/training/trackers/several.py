"""Several trackers of one run at the same time."""

from __future__ import annotations

from pathlib import Path

from qlora.training.trackers.base import Tracker


class SeveralTrackers(Tracker):
    """Hands everything to each of its trackers, in their order."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self.trackers = trackers
        self.url = next((tracker.url for tracker in trackers if tracker.url), None)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Records `metrics` in each."""
        for tracker in self.trackers:
            tracker.log(metrics, step)

    def log_predictions(self, rows: list[dict[str, str]], step: int) -> None:
        """Records answers in each."""
        for tracker in self.trackers:
            tracker.log_predictions(rows, step)

    def log_adapter(self, folder: Path) -> None:
        """Stores the finished adapter in each, if `tracking.log_adapter` is set."""
        for tracker in self.trackers:
            tracker.log_adapter(folder)

    def finish(self, status: str, summary: dict[str, float]) -> None:
        """Ends the run in each; an error of one of them is raised once all have ended."""
        errors = []
        for tracker in self.trackers:
            try:
                tracker.finish(status, summary)
            except Exception as error:
                errors.append(error)
        for failure in errors:
            raise failure
