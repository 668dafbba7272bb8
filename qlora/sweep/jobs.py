"""A job of a sweep: its name, its folder, and what became of it as the files in the folder tell."""

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
from qlora.runtime.saved_run import Status as Status  # of which a job has one
from qlora.secrets import hide

log = logging.getLogger(__name__)

SUBMITTED = "slurm"
"""In a job's status, what SLURM got and has not been seen to end: the array's folder and the index in it."""

# What a job may have otherwise and still give the same result.
UNNAMED_KEYS = tuple(key for key in FREE_KEYS if key not in ("task", "adapter", "repo", "merge"))

LONGEST_SLUG = 80


@dataclass
class Job:
    """One run of a sweep."""

    folder: Path
    overrides: list[str] = field(default_factory=list)
    """Those that differ between the jobs, as one would type them."""
    status: Status = Status.queued
    reason: str | None = None
    """Why it failed, in one line."""
    objective: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    """How long it ran, of the last start."""
    node: str | None = None
    """The machine of a cluster that it was given to."""
    progress: dict[str, float] = field(default_factory=dict)
    """The latest step of the training: step, max_steps, loss, tokens_per_second, seconds_left."""
    seedless: str | None = None
    """The same for jobs whose configs differ by the seed alone; unset: of an older version."""
    stamp: dict[str, list[int]] = field(default_factory=dict)
    """Time and size of the files that tell this, by their names."""
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
        """Takes the job up anew, `overrides` being its own if it has none yet."""
        self.status, self.reason, self.overrides = Status.queued, None, self.overrides or overrides

    def to_dict(self) -> dict[str, Any]:
        """Returns what the overview file tells of it."""
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
    """Returns 8 hex digits that are the same for every way to write the same resolved config."""
    return config_digest(config, UNNAMED_KEYS)[:8]


def seedless(config: Mapping[str, Any]) -> str:
    """Returns digits that are the same for configs that give the same result but for their seed."""
    return config_digest(config, (*UNNAMED_KEYS, "seed"))[:16]


def slug(overrides: Sequence[str]) -> str:
    """Returns overrides as a readable folder name: `lora.r=8,seed=1`."""
    bare = [text.replace("'", "").replace('"', "") for text in overrides]
    words = [re.sub(r"[^\w.=+-]+", "-", text).strip("-") for text in bare]
    return ",".join(words)[:LONGEST_SLUG].rstrip(",-.=") or "job"


def job_folder(sweep: Path, overrides: Sequence[str], config: Mapping[str, Any]) -> Path:
    """Returns the folder of a job: the one that has its identity already, however it is named, or a new one."""
    own = identity(config)
    there = sorted(sweep.glob(f"*-{own}"))
    return there[0] if there else sweep / f"{slug(overrides)}-{own}"


def read_job(folder: Path) -> Job:
    """Returns what the files of a job's folder tell; a process that no longer lives is not running.

    A file that is damaged is named in `damaged`, and the job has failed, unless its result is whole.
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
        in_cluster = status.get(SUBMITTED) is not None  # whose locks may not be seen here
        if job.status is Status.running and not in_cluster and not is_locked(folder):
            job.status, job.reason = Status.interrupted, "its process is gone"
    elif result is not None:
        job.status = Status.finished
    elif job.damaged:
        job.status, job.reason = Status.failed, list_damage(job)
    return job


def _results(folder: Path) -> Iterator[str]:
    """Yields the names of the results in a folder whose status does not tell which one counts."""
    yield from (name for name in RESULTS if (folder / name).is_file())


def _read(job: Job, read: Callable[[Path], Any], path: Path) -> Any:
    """Returns what a file of a job holds; None where it is missing, or damaged, which the job then knows."""
    try:
        return read(path)
    except DamagedFile as error:
        job.damaged.append(error)
        return None


def name_damage(job: Job) -> None:
    """Warns of a job's files that are damaged, and says what that makes of the job."""
    for error in job.damaged:
        log.warning("%s is damaged (%s); this job counts as %s", error.path, error.reason, job.status.value)


def list_damage(job: Job) -> str:
    """Returns why a job with damaged files has failed."""
    return "; ".join(f"{error.path.relative_to(job.folder)} is damaged ({error.reason})" for error in job.damaged)


def write_status(folder: Path, status: Status, **facts: Any) -> None:
    """Records what becomes of a job, whole or not at all; facts that are not given stay, unless they are damaged."""
    path = folder / STATUS_FILE
    with contextlib.suppress(DamagedFile):
        facts = {**(read_status(path) or {}), **facts}
    write_text(path, json.dumps({**facts, "status": status.value}, indent=2) + "\n")


@contextlib.contextmanager
def recorded(
    folder: Path, overrides: Sequence[str], result_name: str, config: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Records the start and the end of the job that the block runs; one folder has one job at a time.

    What was recorded of a finished job stays where the block finds its result there and leaves it alone. Raises
    `ConfigError` where another process runs in the folder.
    """
    with locked(folder, f"{folder} is in use by another process"):
        set_damage_aside(folder, STATUS_FILE)
        started, clock = time.time(), time.monotonic()
        before, result = read_status(folder / STATUS_FILE) or {}, _file_stamp(folder / result_name)
        known = read_job(folder).overrides  # a sweep knows which of them it varies
        facts = {"overrides": known or list(overrides), "pid": os.getpid(), "started": started, "result": result_name}
        facts |= {"seedless": seedless(config)} if config is not None else {}

        def write(status: Status, reason: str | None = None, **kept: Any) -> None:
            """Writes all facts: the folder may have been removed."""
            seconds = {} if status is Status.running else {"seconds": time.monotonic() - clock}
            write_status(folder, status, **{**facts, **seconds, **kept}, reason=reason)

        write(Status.running)
        try:
            yield
        except (KeyboardInterrupt, Stopped):
            with contextlib.suppress(UserError):  # on a full disk; what ended the job counts
                write(Status.interrupted, "interrupted")
            raise
        except BaseException as error:
            status = Status.pruned if isinstance(error, Pruned) else Status.failed
            with contextlib.suppress(UserError):
                write(status, _in_one_line(error))
            raise
        is_same = (before.get("status"), before.get("result")) == (Status.finished.value, result_name)
        is_kept = is_same and result is not None and result == _file_stamp(folder / result_name)
        kept = (
            {key: before[key] for key in ("seconds", "started", "pid") if before.get(key) is not None}
            if is_kept
            else {}
        )
        write(Status.finished, **kept)
        with contextlib.suppress(OSError):  # of another owner
            follow_umask(folder)


def _file_stamp(path: Path) -> list[int] | None:
    """Returns when a file was written, and its size; None: there is none."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return [facts.st_mtime_ns, facts.st_size]


def is_stamped(folder: Path, stamp: Mapping[str, list[int]]) -> bool:
    """Returns whether the files of a job are those that `stamp` was taken of."""
    return bool(stamp) and all(_file_stamp(folder / name) == written for name, written in stamp.items())


def _in_one_line(error: BaseException) -> str:
    text = hide(" ".join(str(error).split()))
    if isinstance(error, UserError | Pruned):
        return text
    return f"{type(error).__name__}: {text}" if text else repr(error)
