"""Runs of MLflow, in a database of this machine or on a server."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora.config.schema import TrackingConfig
from qlora.errors import ResourceError
from qlora.runtime.atomic_files import write_text
from qlora.training.trackers.base import (
    PREDICTION_COLUMNS,
    ResumingTracker,
    SweepSummary,
    TrackedRun,
    import_package,
)
from qlora.upstream.mlflow import max_param_length

log = logging.getLogger(__name__)

RUN_ID_FILE = "mlflow_run_id.txt"
FOLDER = Path("outputs/mlflow")
"""Where runs are stored unless `tracking.uri` or the environment names another database."""
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
"""Environment variables that are set unless the user has set them."""
PARENT_TAG = "mlflow.parentRunId"
"""The tag by which MLflow nests the runs of jobs in the run of their sweep."""
GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's error codes for a run that its database does not hold, or holds as deleted."""
PARAMS_PER_REQUEST = 100
STATUS = {"finished": "FINISHED", "pruned": "KILLED", "interrupted": "KILLED"}
"""MLflow's status for how a run ended; any other end is FAILED."""


class MlflowTracker(ResumingTracker):
    """An MLflow run in the experiment `tracking.project`."""

    backend = "mlflow"

    def __init__(self, config: TrackingConfig, run: TrackedRun) -> None:
        super().__init__(config, run)
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        self.mlflow = import_package("mlflow")
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI")
        try:
            if uri is None:
                import_package("mlflow", "sqlalchemy")
                FOLDER.mkdir(parents=True, exist_ok=True)
                with _alone(FOLDER / ".lock"):  # two jobs of a sweep would both create the tables
                    self._open(f"sqlite:///{FOLDER / 'mlflow.db'}", str((FOLDER / "artifacts").absolute()))
            else:
                self._open(uri, None)
        except (self.mlflow.MlflowException, OSError) as error:
            raise ResourceError(
                f"tracking=mlflow: {uri or FOLDER} cannot be used ({' '.join(str(error).split())}); name another "
                "database or server with tracking.uri, e.g. tracking.uri=http://localhost:5000"
            ) from error

    def _open(self, uri: str, artifacts: str | None) -> None:
        """Finds or creates the experiment, the run, and the run of the sweep that contains it."""
        self._client = self.mlflow.MlflowClient(tracking_uri=uri)
        file = self.run.folder / RUN_ID_FILE
        if (known := self._continue(file)) is not None:
            self._id = known
            return
        self.sent.keep(0)
        experiment = self._experiment(artifacts)
        group = self.run.group(self.config)
        tags = {**dict.fromkeys(self.run.tags(self.config), "true"), **({"group": group} if group else {})}
        if self.run.sweep is not None and self.run.job_type is None:
            tags[PARENT_TAG] = self._parent(experiment, self.run.sweep.sweep, tags)
        self._id = self._client.create_run(experiment, run_name=self.run.title, tags=tags).info.run_id
        self._log_params({**self.run.flat, **self.run.varied})
        write_text(file, self._id)

    def _continue(self, file: Path) -> str | None:
        """Returns the run whose id a file holds, set to running; None: there is none, or it was deleted."""
        if not file.is_file():
            return None
        known = file.read_text(encoding="utf-8").strip()
        try:
            self._client.update_run(known, status="RUNNING")
        except self.mlflow.MlflowException as error:
            if error.error_code not in GONE:  # a server that cannot be reached must not lead to a second run
                raise
            return None
        return known

    def _experiment(self, artifacts: str | None) -> str:
        name = self.config.project
        if (experiment := self._client.get_experiment_by_name(name)) is None:
            try:
                return str(self._client.create_experiment(name, artifacts))
            except self.mlflow.MlflowException:
                if (experiment := self._client.get_experiment_by_name(name)) is None:  # nor has another job created it
                    raise
        return str(experiment.experiment_id)

    def _parent(self, experiment: str, sweep: str, tags: Mapping[str, str]) -> str:
        """Returns the run of the sweep, whose folder holds this run's; the first job creates it."""
        file = self.run.folder.parent / RUN_ID_FILE
        with _alone(file.with_name(f".{file.name}.lock")):
            if (known := self._continue(file)) is not None:
                return known
            created = self._client.create_run(experiment, run_name=sweep, tags=dict(tags)).info.run_id
            write_text(file, created)
            return str(created)

    def _log_params(self, params: Mapping[str, Any]) -> None:
        """Stores the config; a value too long for a parameter becomes an artifact, which the parameter names."""
        max_length = max_param_length()
        entries = []
        for key, value in params.items():
            text, name = str(value), _clean(key)
            if len(text) > max_length:
                artifact = f"params/{name.replace('/', '_')}.txt"
                self._client.log_text(self._id, text, artifact)
                text = f"{len(text):,} characters, in the artifact {artifact}"
            entries.append(self.mlflow.entities.Param(name, text))
        for start in range(0, len(entries), PARAMS_PER_REQUEST):
            self._client.log_batch(self._id, params=entries[start : start + PARAMS_PER_REQUEST])

    @classmethod
    def log_sweep(cls, config: TrackingConfig, run: TrackedRun, sweep: SweepSummary) -> list[tuple[str, str]]:
        """Ends the run that contains those of the jobs: numbers, texts as tags, leaderboard and page as artifacts."""
        if sweep.finished:
            cls(config, run)._end_sweep(sweep)
        return []

    def _end_sweep(self, sweep: SweepSummary) -> None:
        for key, value in sweep.numbers.items():
            with self._tolerant(key):
                if isinstance(value, str):
                    self._client.set_tag(self._id, _clean(key), value)
                else:
                    self._client.log_metric(self._id, _clean(key), value)
        for file in sweep.files:
            with self._tolerant(file.name):
                self._client.log_artifact(self._id, str(file))
        with self._tolerant("end"):
            self._client.set_terminated(self._id, STATUS["finished"])

    def send(self, metrics: dict[str, float], step: int) -> None:
        """Records a value for each metric; a server that fails loses these values and does not end the run."""
        now = int(time.time() * 1000)
        values = [self.mlflow.entities.Metric(_clean(name), value, now, step) for name, value in metrics.items()]
        with self._tolerant("metrics"):
            self._client.log_batch(self._id, metrics=values)

    def send_predictions(self, rows: list[list[str]], step: int) -> None:
        """Adds answers to the table `predictions.json`."""
        columns = zip(*([step, *row] for row in rows), strict=True)
        table = {name: list(values) for name, values in zip(("step", *PREDICTION_COLUMNS), columns, strict=False)}
        if table:
            with self._tolerant("predictions"):
                self._client.log_table(self._id, table, "predictions.json")

    def log_adapter(self, folder: Path) -> None:
        """Stores the adapter among the run's artifacts, with `tracking.log_adapter=true`."""
        if self.config.log_adapter:
            with self._tolerant("adapter"):
                self._client.log_artifacts(self._id, str(folder), "adapter")

    def finish(self, status: str, summary: dict[str, float]) -> None:
        """Records the final metrics and how the run ended."""
        self.send(summary, self.sent.last_step)
        with self._tolerant("end"):
            self._client.set_tag(self._id, "status", status)
            self._client.set_terminated(self._id, STATUS.get(status, "FAILED"))

    @contextlib.contextmanager
    def _tolerant(self, what: str) -> Iterator[None]:
        try:
            yield
        except (self.mlflow.MlflowException, OSError) as error:
            log.warning("tracking=mlflow: the %s of this run are not stored: %s", what, " ".join(str(error).split()))


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    with file.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _clean(name: str) -> str:
    """Returns a name in which `_` replaces the characters that MLflow does not accept."""
    return re.sub(r"[^\w\-. :/]", "_", name)
