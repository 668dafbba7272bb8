"""Runs of Weights & Biases, online or offline."""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora.config.schema import TrackingConfig, WandbMode
from qlora.errors import ConfigError
from qlora.runtime.atomic_files import write_text
from qlora.training.trackers.base import PREDICTION_COLUMNS, PREDICTIONS, BackendTracker, TrackedRun, import_package

log = logging.getLogger(__name__)

RUN_ID_FILE = "wandb_run_id.txt"  # a run that goes on in the same folder goes on in wandb, too
LONGEST_TAG, LONGEST_NAME = 64, 128
FINISH_SECONDS = 600.0
"""So long the end of a run waits for a server that does not take what is left."""
HEADER, BLOCK = 7, 2**15
WHOLE, FIRST, LAST = 1, 2, 4
"""Kinds of pieces in wandb's files."""

WAYS_IN = (
    "run `wandb login` once, or set the environment variable WANDB_API_KEY, or set tracking.mode=offline to write "
    "the run to its folder and send it later with `wandb sync`"
)


class WandbTracker(BackendTracker):
    """A Weights & Biases run, online or offline; it prints nothing and leaves the console alone."""

    backend = "wandb"
    _is_lost = False

    def __init__(self, config: TrackingConfig, run: TrackedRun) -> None:
        super().__init__(config, run)
        wandb = self.wandb = import_package("wandb")
        self.mode = wandb_mode(config)
        check_access(config)
        # An agent of a wandb sweep has chosen where its run belongs, and tells wandb by itself.
        by_agent = "WANDB_SWEEP_ID" in os.environ
        group = run.group(config)
        sweep: dict[str, Any] = {"sweep": run.varied} if run.varied else {}
        if by_agent and (hidden := {key: run.config[key] for key in run.varied if key in run.config}):
            sweep["groups"] = hidden  # in the place of a varied group the agent writes its name
        try:
            self._run: Any = wandb.init(
                project=None if by_agent else config.project,
                entity=None if by_agent else config.entity,
                id=None if by_agent else _run_id(run.folder),
                name=run.title[:LONGEST_NAME],
                group=group and group[:LONGEST_NAME],
                job_type=run.job_type,
                tags=[tag[:LONGEST_TAG] for tag in run.tags(config)] or None,
                config={**run.config, **sweep},
                mode=self.mode,
                dir=str(run.folder.absolute()),
                resume="allow" if self.mode == "online" else None,  # an offline run goes on by its id alone
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
            raise ConfigError(
                f"tracking=wandb: wandb could not start a run ({reason}); check tracking.project, tracking.entity and "
                "the network, or set tracking.mode=offline and send the run later with `wandb sync`"
            ) from error
        # Steps are a metric of their own: wandb's step only grows, and an evaluation may be later than a step's loss.
        self._run.define_metric("global_step", hidden=True)
        self._run.define_metric("*", step_metric="global_step")
        self._forget_lost_rows()
        self.sent.begin(Path(self._run.dir).parent.name)
        self.url = self._run.url if self.mode == "online" else None

    def send(self, metrics: dict[str, Any], step: int) -> None:
        """Records a row; `metrics` may hold wandb's tables, charts and pages."""
        # A server tells a run that goes on at which row; offline, `wandb sync` needs rows that do not begin anew.
        row = len(self.sent.rows) if self.mode == "offline" else None
        with self._surviving():
            self._run.log({**metrics, "global_step": step}, step=row, commit=True)

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        """Lets the training go on where wandb's process dies or its server takes nothing: the run itself is whole."""
        try:
            yield
        except Exception as error:
            if not self._is_lost:
                reason = " ".join(str(error).split()) or type(error).__name__
                log.warning(
                    "tracking=wandb: not everything was sent (%s); the training goes on, and `wandb sync %s` sends "
                    "what was logged before",
                    *(reason, Path(self._run.dir).parent),
                )
            self._is_lost = True

    def _forget_lost_rows(self) -> None:
        """Looks which rows arrived: wandb's process ends with a run that is killed, with what it had in memory."""
        if self.mode == "online":
            self.sent.keep(self._run.starting_step)
        elif self.mode == "offline" and self.sent.last_start is not None:
            start, before = self.sent.last_start
            for file in (self.run.folder / "wandb" / start).glob("*.wandb"):  # none: it was sent and cleared away
                self.sent.keep(before + count_rows(file))

    def send_predictions(self, rows: list[list[str]], step: int) -> None:
        """Records a table of answers."""
        table = self.wandb.Table(columns=["step", *PREDICTION_COLUMNS], data=[[step, *row] for row in rows])
        self.send({PREDICTIONS: table}, step)

    def log_adapter(self, folder: Path) -> None:
        """Stores the adapter as an artifact of type `adapter`, with `tracking.log_adapter=true`."""
        if self.config.log_adapter:
            artifact = self.wandb.Artifact(f"adapter-{self._run.id}", type="adapter")
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):  # add_dir would print
                artifact.add_file(str(path), name=path.relative_to(folder).as_posix())
            with self._surviving():
                self._run.log_artifact(artifact)

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        """Ends the run; any status but `finished` and `pruned` marks it as failed."""
        if self._run is not None:
            with self._surviving():
                self._run.summary.update({**summary, "status": status})
                self._run.finish(exit_code=0 if status in ("finished", "pruned") else 1)
            self._run = None
            if self._is_lost:
                with contextlib.suppress(Exception):  # at the end of this process it would complain once more
                    self.wandb.teardown()


def wandb_mode(config: TrackingConfig) -> str:
    """Returns `online` or `offline`, which the environment's WANDB_MODE may make of an online run."""
    if config.mode is WandbMode.offline:
        return "offline"
    return "offline" if os.environ.get("WANDB_MODE") in ("dryrun", "offline") else "online"


def check_access(config: TrackingConfig) -> None:
    """Raises `ConfigError` unless wandb is installed and finds what an online run needs; asks nobody and no server."""
    wandb = import_package("wandb")
    if wandb_mode(config) == "online":
        _check_login(wandb)


def count_rows(file: Path) -> int:
    """Returns how many rows of metrics an offline run holds; its end may be missing.

    The file is a LevelDB log: after 7 bytes blocks of 32 KiB, in them pieces of records, each with a header of 7 bytes.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    raw, place, record, rows = file.read_bytes(), HEADER, b"", 0
    while place + HEADER <= len(raw):
        if (left := BLOCK - place % BLOCK) < HEADER:
            place += left
            continue
        size, kind = struct.unpack("<HB", raw[place + 4 : place + HEADER])
        place += HEADER + size
        if place > len(raw):
            break
        record = (b"" if kind in (WHOLE, FIRST) else record) + raw[place - size : place]
        if kind in (WHOLE, LAST):
            rows += Record.FromString(record).HasField("history")
    return rows


def _check_login(wandb: Any) -> None:
    """Raises `ConfigError` unless wandb finds credentials."""
    try:
        wandb.setup(wandb.Settings(silent=True))
        if hasattr(wandb.sdk.lib, "wbauth"):
            from wandb.sdk.lib import wbauth

            host = wandb.setup().settings.base_url
            found: Any = wbauth.authenticate_session(host=host, source="qlora", prompt=False, update_session=False)
        else:
            found = wandb.api.api_key
    except wandb.errors.Error as error:
        raise ConfigError(f"tracking=wandb: the wandb login is unusable ({error}); {WAYS_IN}") from error
    if not found:
        raise ConfigError(f"tracking=wandb: nobody is logged in to wandb on this machine; {WAYS_IN}")


def _run_id(folder: Path) -> str:
    path = folder / RUN_ID_FILE
    if not path.is_file():
        write_text(path, uuid.uuid4().hex[:12])
    return path.read_text(encoding="utf-8").strip()
