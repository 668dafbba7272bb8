"""Runs of Weights & Biases, online or offline."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora.config.schema import TrackingConfig, WandbMode
from qlora.errors import ResourceError
from qlora.runtime.atomic_files import write_text
from qlora.training.trackers.base import (
    PREDICTION_COLUMNS,
    PREDICTIONS,
    ResumingTracker,
    Sent,
    SweepSummary,
    TrackedRun,
    import_package,
)
from qlora.upstream.wandb import count_rows, credentials

log = logging.getLogger(__name__)

RUN_ID_FILE = "wandb_run_id.txt"
"""Holds the id of the run, by which a run that resumes in the same folder resumes in wandb, too."""
MAX_TAG, MAX_NAME = 64, 128
"""The most characters that wandb accepts."""
FINISH_SECONDS = 600.0
"""How long the end of a run waits for a server that does not accept the remaining data."""
LEADERBOARD = "leaderboard"
"""The name of the table that shows a sweep."""

WAYS_IN = (
    "run `wandb login` once, or set the environment variable WANDB_API_KEY, or set tracking.mode=offline to write "
    "the run to its folder and send it later with `wandb sync`"
)


class WandbTracker(ResumingTracker):
    """A Weights & Biases run, online or offline; it prints nothing and does not capture the console."""

    backend = "wandb"
    _is_lost = False

    def __init__(self, config: TrackingConfig, run: TrackedRun) -> None:
        super().__init__(config, run)
        wandb = self.wandb = import_package("wandb")
        self.mode = wandb_mode(config)
        self.check_access(config)
        # An agent of a wandb sweep has chosen the project of its run, and passes it to wandb itself.
        by_agent = "WANDB_SWEEP_ID" in os.environ
        group = run.group(config)
        sweep: dict[str, Any] = {"sweep": run.varied} if run.varied else {}
        if by_agent and (hidden := {key: run.config[key] for key in run.varied if key in run.config}):
            sweep["groups"] = hidden  # the agent replaces a varied group by its name
        try:
            self._run: Any = wandb.init(
                project=None if by_agent else config.project,
                entity=None if by_agent else config.entity,
                id=None if by_agent else _run_id(run.folder),
                name=run.title[:MAX_NAME],
                group=group and group[:MAX_NAME],
                job_type=run.job_type,
                tags=[tag[:MAX_TAG] for tag in run.tags(config)] or None,
                config={**run.config, **sweep},
                mode=self.mode,
                dir=str(run.folder.absolute()),
                resume="allow" if self.mode == "online" else None,  # an offline run resumes by its id alone
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    disable_code=True,
                    finish_timeout=FINISH_SECONDS,
                    finish_timeout_raises=True,
                ),
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise ResourceError(
                f"tracking=wandb: wandb could not start a run ({reason}); check tracking.project, tracking.entity and "
                "the network, or set tracking.mode=offline and send the run later with `wandb sync`"
            ) from error
        # Steps are a metric of their own: wandb's step only grows, and an evaluation may be later than a step's loss.
        self._run.define_metric("global_step", hidden=True)
        self._run.define_metric("*", step_metric="global_step")
        self._forget_lost_rows()
        self.sent.begin(Path(self._run.dir).parent.name)
        self.url = self._run.url if self.mode == "online" else None

    @classmethod
    def check_access(cls, config: TrackingConfig) -> str:
        """Raises `ResourceError` unless wandb is installed and an online run has a login; asks nobody and no server."""
        wandb, mode = import_package("wandb"), wandb_mode(config)
        if mode == "online":
            try:
                login = credentials(wandb)
            except wandb.errors.Error as error:
                raise ResourceError(f"tracking=wandb: the wandb login is unusable ({error}); {WAYS_IN}") from error
            if not login:
                raise ResourceError(f"tracking=wandb: nobody is logged in to wandb on this machine; {WAYS_IN}")
        return f"wandb, {mode}"

    @classmethod
    def account(cls, config: TrackingConfig) -> str | None:
        """Asks wandb's server who is logged in; an offline run needs no login."""
        return str(import_package("wandb").Api().viewer.username) if wandb_mode(config) == "online" else None

    @classmethod
    def log_sweep(cls, config: TrackingConfig, run: TrackedRun, sweep: SweepSummary) -> list[tuple[str, str]]:
        """Shows a sweep as tables, a chart and a page, once for each number of finished jobs."""
        lines = []
        if not Sent(run.folder, cls.backend).has(LEADERBOARD, sweep.finished):
            tracker = cls(config, run)
            _log_media(tracker, sweep)
            tracker.finish("finished", sweep.numbers)
            lines += [("wandb", tracker.url)] if tracker.url else []
        return [*lines, ("sync", sync_command(run.folder, jobs=True))] if wandb_mode(config) == "offline" else lines

    def send(self, metrics: dict[str, Any], step: int) -> None:
        """Records a row; `metrics` may hold wandb's tables, charts and pages."""
        # The server gives a resumed run its next row; offline, `wandb sync` needs rows that do not start again at 0.
        row = len(self.sent.rows) if self.mode == "offline" else None
        with self._surviving():
            self._run.log({**metrics, "global_step": step}, step=row, commit=True)

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        """Lets training continue when wandb's process dies or its server accepts nothing."""
        try:
            yield
        except Exception as error:
            if not self._is_lost:
                reason = " ".join(str(error).split()) or type(error).__name__
                log.warning(
                    "tracking=wandb: not everything was sent (%s); training continues, and `wandb sync %s` sends "
                    "what was logged so far",
                    *(reason, Path(self._run.dir).parent),
                )
            self._is_lost = True

    def _forget_lost_rows(self) -> None:
        """Finds out which rows arrived: wandb's process dies with a killed run and loses what is in its memory."""
        if self.mode == "online":
            self.sent.keep(self._run.starting_step)
        elif self.mode == "offline" and self.sent.last_start is not None:
            start, earlier_rows = self.sent.last_start
            for file in (self.run.folder / "wandb" / start).glob("*.wandb"):  # none: it was sent and removed
                self.sent.keep(earlier_rows + count_rows(file))

    def send_predictions(self, rows: list[list[str]], step: int) -> None:
        """Records a table of answers."""
        table = self.wandb.Table(columns=["step", *PREDICTION_COLUMNS], data=[[step, *row] for row in rows])
        self.send({PREDICTIONS: table}, step)

    def log_adapter(self, folder: Path) -> None:
        """Stores the adapter as an artifact of type `adapter`, with `tracking.log_adapter=true`."""
        if self.config.log_adapter:
            artifact = self.wandb.Artifact(f"adapter-{self._run.id}", type="adapter")
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):  # add_dir prints
                artifact.add_file(str(path), name=path.relative_to(folder).as_posix())
            with self._surviving():
                self._run.log_artifact(artifact)

    def closing_lines(self) -> list[tuple[str, str]]:
        """Returns the command that sends an offline run; the jobs of a sweep are sent with the sweep."""
        is_pending = self.mode == "offline" and self.run.sweep is None
        return [("sync", sync_command(self.run.folder, jobs=False))] if is_pending else []

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        """Ends the run; any status but `finished` and `pruned` marks it as failed."""
        if self._run is not None:
            with self._surviving():
                self._run.summary.update({**summary, "status": status})
                self._run.finish(exit_code=0 if status in ("finished", "pruned") else 1)
            self._run = None
            if self._is_lost:
                with contextlib.suppress(Exception):  # else it complains again when this process ends
                    self.wandb.teardown()


def wandb_mode(config: TrackingConfig) -> str:
    """Returns `online` or `offline`; the environment variable WANDB_MODE can turn the first into the second."""
    if config.mode is WandbMode.offline:
        return "offline"
    return "offline" if os.environ.get("WANDB_MODE") in ("dryrun", "offline") else "online"


def _log_media(tracker: WandbTracker, sweep: SweepSummary) -> None:
    """Sends the leaderboard, the other jobs, a chart of both, and the page of the sweep."""
    wandb = tracker.wandb
    media: dict[str, Any] = {}
    if sweep.rows:
        media[LEADERBOARD] = wandb.Table(columns=sweep.columns, data=sweep.rows)
    if sweep.draw_chart is not None:
        media["parallel_coordinates"] = wandb.Image(str(sweep.draw_chart()))
    if sweep.unfinished:
        media["unfinished"] = wandb.Table(columns=["overrides", "status", "reason", "job"], data=sweep.unfinished)
    if sweep.page is not None:
        media["report"] = wandb.Html(sweep.page.read_text(encoding="utf-8"), inject=False)
    tracker.log(media, sweep.finished)


def sync_command(folder: Path, *, jobs: bool) -> str:
    """Returns the command that sends the offline runs of a folder, with `jobs` those of a sweep's jobs too.

    The starts of an interrupted job are runs of one id. `WANDB_RESUME` adds each to the earlier ones; without it the
    last one replaces them.
    """
    path = shlex.quote(str(folder))
    of_jobs = f" {path}/*/wandb/offline-run-*" if jobs else ""
    return f"WANDB_RESUME=allow wandb sync {path}/wandb/offline-run-*{of_jobs}"


def _run_id(folder: Path) -> str:
    path = folder / RUN_ID_FILE
    if not path.is_file():
        write_text(path, uuid.uuid4().hex[:12])
    return path.read_text(encoding="utf-8").strip()
