"""Runs of Trackio, in a database of this machine."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from qlora.config.schema import TrackingConfig
from qlora.training.trackers.base import PREDICTION_COLUMNS, PREDICTIONS, ResumingTracker, TrackedRun, import_package


class TrackioTracker(ResumingTracker):
    """A Trackio run, kept where `trackio show` looks for it; it stores no adapter."""

    backend = "trackio"

    def __init__(self, config: TrackingConfig, run: TrackedRun) -> None:
        super().__init__(config, run)
        self.trackio = import_package("trackio")
        # Trackio resumes a run by its name, so the names in two sweeps must differ.
        name = f"{run.title} ({run.sweep.sweep})" if run.sweep is not None else run.title
        with _silent():
            self._run: Any = self.trackio.init(
                project=config.project,
                name=name,
                group=run.group(config),
                config={**run.flat, **run.varied},
                resume="allow" if self.sent.rows else "never",
                embed=False,
                auto_log_cpu=False,
            )

    def send(self, metrics: dict[str, Any], step: int) -> None:
        """Records a row of metrics."""
        self._run.log(metrics, step=step)

    def send_predictions(self, rows: list[list[str]], step: int) -> None:
        """Records a table of answers."""
        self.send({PREDICTIONS: self.trackio.Table(columns=list(PREDICTION_COLUMNS), data=rows)}, step)

    def log_adapter(self, folder: Path) -> None:
        """Stores nothing: the adapter is in the run folder."""

    def finish(self, status: str, summary: dict[str, float]) -> None:
        """Records the final metrics and how the run ended, and flushes what is still in memory."""
        if self._run is not None:
            with _silent():
                self._run.log({**summary, "status": status}, step=self.sent.last_step)
                self.trackio.finish()  # `finish` of the run itself would run again when the process ends
            self._run = None


def _silent() -> contextlib.AbstractContextManager[Any]:
    return contextlib.redirect_stdout(io.StringIO())
