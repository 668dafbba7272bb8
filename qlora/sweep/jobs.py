"""A job of a sweep: its name, its folder, and its status as the files in the folder record it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora.errors import DamagedFile, Pruned, Stopped, UserError
from qlora.runtime.atomic_files import follow_umask, write_text
from qlora.runtime.folder_lock import is_locked, locked
from qlora.runtime.run_folder import FREE_KEYS, RunFolder, config_digest
from qlora.runtime.saved_run import (
    RESULTS,
    STATUS_FILE,
    json_number,
    read_progress,
    read_result,
    read_status,
    set_damage_aside,
)
from qlora.runtime.saved_run import Status as Status  # the status of a job, for those who import this module
from qlora.secrets import hide

log = logging.getLogger(__name__)

SUBMITTED = "slurm"
"""The key of a job's status for a job that was submitted to SLURM and has not ended: array folder and index."""

UNNAMED_KEYS = tuple(key for key in FREE_KEYS if key not in ("task", "adapter", "repo", "merge"))
"""Keys that may differ between two jobs of the same result."""

MAX_SLUG = 80


@dataclass
class Job:
    """One run of a sweep."""

    folder: Path
    overrides: list[str] = field(default_factory=list)
    """Those that differ between the jobs, as one would type them."""
    status: Status = Status.queued
    reason: str | None = None
    """Why the job failed, in one line."""
    objective: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    """How long the last start ran."""
    node: str | None = None
    """The machine of a cluster that runs it."""
    progress: dict[str, float] = field(default_factory=dict)
    """The latest training step: step, max_steps, loss, tokens_per_second, seconds_left."""
    seedless: str | None = None
    """A digest that is equal for jobs whose configs differ only by the seed; unset: an older version wrote the job."""
    stamp: dict[str, list[int]] = field(default_factory=dict)
    """The time and size of the files that this was read from, by name."""
    damaged: list[DamagedFile] = field(default_factory=list)
    """Its files that cannot be read back."""

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.name

    @property
    def values(self) -> dict[str, str]:
        """The varied keys with their values."""
        return dict(text.lstrip("+").partition("=")[::2] for text in self.overrides)

    def queue(self, overrides: list[str]) -> None:
        """Queues the job again; `overrides` distinguish it if it has none yet."""
        self.status, self.reason, self.overrides = Status.queued, None, self.overrides or overrides

    def to_dict(self) -> dict[str, Any]:
        """Returns the job as the overview file holds it."""
        return {
            "job": self.name,
            "overrides": self.overrides,
            "status": self.status.value,
            "reason": self.reason,
            "objective": json_number(self.objective),
            "metrics": {name: json_number(value) for name, value in self.metrics.items()},
            "seconds": self.seconds,
            "seedless": self.seedless,
            "stamp": self.stamp,
        }


def identity(config: Mapping[str, Any]) -> str:
    """Returns 8 hex digits that are equal for all ways to write the same resolved config."""
    return config_digest(config, UNNAMED_KEYS)[:8]


def seedless(config: Mapping[str, Any]) -> str:
    """Returns digits that are equal for configs whose results differ only by the seed."""
    return config_digest(config, (*UNNAMED_KEYS, "seed"))[:16]


def slug(overrides: Sequence[str]) -> str:
    """Returns overrides as a readable folder name: `lora.r=8,seed=1`."""
    bare = [text.replace("'", "").replace('"', "") for text in overrides]
    names = [re.sub(r"[^\w.=+-]+", "-", text).strip("-") for text in bare]
    return ",".join(names)[:MAX_SLUG].rstrip(",-.=") or "job"


def job_folder(sweep: Path, overrides: Sequence[str], config: Mapping[str, Any]) -> Path:
    """Returns the folder of a job: the one with its identity, whatever its name, or a new one."""
    digits = identity(config)
    existing = sorted(sweep.glob(f"*-{digits}"))
    return existing[0] if existing else sweep / f"{slug(overrides)}-{digits}"


def read_job(folder: Path) -> Job:
    """Returns a job as the files of its folder record it; a job whose process is gone is not running.

    `damaged` lists damaged files. A job with one has failed unless its result is complete.
    """
    job, written = Job(folder), _file_stamp(folder / STATUS_FILE)
    status = _read(job, read_status, folder / STATUS_FILE)
    job.progress = _read(job, read_progress, RunFolder(folder).progress) or {}
    name = status.get("result") if status is not None else next(_results(folder), None)
    of_result = _file_stamp(folder / name) if name is not None else None
    result = _read(job, read_result, folder / name) if name is not None else None
    if result is not None:
        job.objective, job.metrics = result["objective"], result["metrics"]
    if status is not None:
        job.status, job.reason, job.overrides = Status(status["status"]), status["reason"], status["overrides"]
        job.seconds, job.seedless, job.node = status["seconds"], status.get("seedless"), status.get("node")
        if written is not None and name is not None and of_result is not None and not job.damaged:
            job.stamp = {STATUS_FILE: written, name: of_result}
        if job.status is Status.finished and name is not None and result is None:
            job.status = Status.failed
            job.reason = list_damage(job) if job.damaged else f"{name} is missing"
        in_cluster = status.get(SUBMITTED) is not None  # locks of a node may not be visible here
        if job.status is Status.running and not in_cluster and not is_locked(folder):
            job.status, job.reason = Status.interrupted, "its process is gone"
    elif result is not None:
        job.status = Status.finished
    elif job.damaged:
        job.status, job.reason = Status.failed, list_damage(job)
    return job


def _results(folder: Path) -> Iterator[str]:
    """Yields the names of the results in a folder whose status does not name one."""
    yield from (name for name in RESULTS if (folder / name).is_file())


def _read(job: Job, read: Callable[[Path], Any], path: Path) -> Any:
    """Returns the content of a job's file; None if it is missing or damaged. Damage is recorded in the job."""
    try:
        return read(path)
    except DamagedFile as error:
        job.damaged.append(error)
        return None


def name_damage(job: Job) -> None:
    """Warns of damaged files of a job, and says how the job counts."""
    for error in job.damaged:
        log.warning("%s is damaged (%s); this job counts as %s", error.path, error.reason, job.status.value)


def list_damage(job: Job) -> str:
    """Returns why a job with damaged files has failed."""
    return "; ".join(f"{error.path.relative_to(job.folder)} is damaged ({error.reason})" for error in job.damaged)


def write_status(folder: Path, status: Status, **fields: Any) -> None:
    """Records the status of a job atomically; fields that are not given keep their values unless they are damaged."""
    path = folder / STATUS_FILE
    with contextlib.suppress(DamagedFile):
        fields = {**(read_status(path) or {}), **fields}
    write_text(path, json.dumps({**fields, "status": status.value}, indent=2) + "\n")


@contextlib.contextmanager
def recorded(
    folder: Path, overrides: Sequence[str], result_name: str, config: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Records the start and the end of the job that the block runs; a folder has one job at a time.

    The record of a finished job stays if the block leaves its result as it is. Raises `RunError` if another process
    runs in the folder.
    """
    with locked(folder, f"{folder} is in use by another process"):
        set_damage_aside(folder, STATUS_FILE)
        started, clock = time.time(), time.monotonic()
        previous, result = read_status(folder / STATUS_FILE) or {}, _file_stamp(folder / result_name)
        known = read_job(folder).overrides  # a sweep has recorded which of them vary
        fields = {"overrides": known or list(overrides), "pid": os.getpid(), "started": started, "result": result_name}
        fields |= {"seedless": seedless(config)} if config is not None else {}

        def write(status: Status, reason: str | None = None, **kept: Any) -> None:
            """Writes all fields: the folder may have been removed."""
            seconds = {} if status is Status.running else {"seconds": time.monotonic() - clock}
            write_status(folder, status, **{**fields, **seconds, **kept}, reason=reason)

        write(Status.running)
        try:
            yield
        except (KeyboardInterrupt, Stopped):
            with contextlib.suppress(UserError):  # on a full disk; the error that ended the job counts
                write(Status.interrupted, "interrupted")
            raise
        except BaseException as error:
            status = Status.pruned if isinstance(error, Pruned) else Status.failed
            with contextlib.suppress(UserError):
                write(status, _in_one_line(error))
            raise
        is_same = (previous.get("status"), previous.get("result")) == (Status.finished.value, result_name)
        is_kept = is_same and result is not None and result == _file_stamp(folder / result_name)
        kept = (
            {key: previous[key] for key in ("seconds", "started", "pid") if previous.get(key) is not None}
            if is_kept
            else {}
        )
        write(Status.finished, **kept)
        with contextlib.suppress(OSError):  # of another owner
            follow_umask(folder)


def _file_stamp(path: Path) -> list[int] | None:
    """Returns the time of the last write to a file and its size; None: it does not exist."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_mtime_ns, stat.st_size]


def is_stamped(folder: Path, stamp: Mapping[str, list[int]]) -> bool:
    """Returns whether the files of a job have not changed since `stamp` was taken."""
    return bool(stamp) and all(_file_stamp(folder / name) == written for name, written in stamp.items())


def _in_one_line(error: BaseException) -> str:
    text = hide(" ".join(str(error).split()))
    if isinstance(error, UserError | Pruned):
        return text
    return f"{type(error).__name__}: {text}" if text else repr(error)
