"""A job of a sweep: its name, its folder, and what became of it as the files in the folder tell."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TextIO

from qlora.errors import ConfigError, Pruned, Stopped
from qlora.files import read_json, write_text
from qlora.folder import FREE_KEYS, RunFolder, config_digest
from qlora.secrets import hide

LOCK_FILE = ".lock"
STATUS_FILE = "status.json"

SUBMITTED = "slurm"
"""In a job's status, what SLURM got and has not been seen to end: the array's folder and the index in it."""

# What a job may have otherwise and still give the same result.
UNNAMED_KEYS = tuple(key for key in FREE_KEYS if key not in ("task", "adapter", "repo", "merge"))

LONGEST_SLUG = 80
LOCK_ATTEMPTS = 10


class Status(Enum):
    """What became of a job."""

    queued = "queued"
    running = "running"
    finished = "finished"
    pruned = "pruned"
    failed = "failed"
    interrupted = "interrupted"
    """Stopped from outside: the sweep was ended, or the machine; it goes on from its checkpoint."""


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
    progress: dict[str, Any] = field(default_factory=dict)
    """The latest step of the training: step, max_steps, loss, tokens_per_second, seconds_left."""

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.name

    @property
    def values(self) -> dict[str, str]:
        """The varied keys with their values."""
        return dict(text.lstrip("+").split("=", 1) for text in self.overrides)

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
            "objective": self.objective,
            "metrics": self.metrics,
            "seconds": self.seconds,
        }


def identity(config: Mapping[str, Any]) -> str:
    """Returns 8 hex digits that are the same for every way to write the same resolved config."""
    return config_digest(config, UNNAMED_KEYS)[:8]


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
    """Returns what the files of a job's folder tell; a process that no longer lives is not running."""
    stored = read_json(folder / STATUS_FILE) or {}
    job = Job(folder, overrides=stored.get("overrides", []), status=Status(stored.get("status", "queued")))
    job.reason, job.seconds, job.node = stored.get("reason"), stored.get("seconds"), stored.get("node")
    result = read_json(folder / stored["result"]) if "result" in stored else None
    if result is not None:
        job.objective, job.metrics = result["objective"], result["metrics"]
    job.progress = read_json(RunFolder(folder).progress) or {}
    in_cluster = stored.get(SUBMITTED) is not None  # whose locks may not be seen here
    if job.status is Status.running and not in_cluster and not is_locked(folder):
        job.status, job.reason = Status.interrupted, "its process is gone"
    return job


def write_status(folder: Path, status: Status, **facts: Any) -> None:
    """Records what becomes of a job, whole or not at all; facts that are not given stay."""
    path = folder / STATUS_FILE
    record = {**(read_json(path) or {}), **facts, "status": status.value}
    write_text(path, json.dumps(record, indent=2) + "\n")


@contextlib.contextmanager
def recorded(folder: Path, overrides: Sequence[str], result_name: str) -> Iterator[None]:
    """Records the start and the end of the job that the block runs; one folder has one job at a time.

    Raises `ConfigError` where another process runs in the folder.
    """
    with locked(folder, f"{folder} is in use by another process"):
        started, clock = time.time(), time.monotonic()
        known = (read_json(folder / STATUS_FILE) or {}).get("overrides")  # a sweep knows which of them it varies
        facts = {"overrides": known or list(overrides), "pid": os.getpid(), "started": started, "reason": None}
        write_status(folder, Status.running, **facts, result=result_name)
        try:
            yield
        except (KeyboardInterrupt, Stopped):
            with contextlib.suppress(ConfigError):  # on a full disk; what ended the job counts
                write_status(folder, Status.interrupted, reason="interrupted", seconds=time.monotonic() - clock)
            raise
        except BaseException as error:
            status = Status.pruned if isinstance(error, Pruned) else Status.failed
            with contextlib.suppress(ConfigError):
                write_status(folder, status, reason=_in_one_line(error), seconds=time.monotonic() - clock)
            raise
        write_status(folder, Status.finished, seconds=time.monotonic() - clock)


def _in_one_line(error: BaseException) -> str:
    text = hide(" ".join(str(error).split()))
    if isinstance(error, ConfigError | Pruned):
        return text
    return f"{type(error).__name__}: {text}" if text else repr(error)


_held: list[TextIO] = []
"""The files whose locks this process holds."""


def _let_go() -> None:
    """Closes the locks in a process that was forked, such as a worker, which may outlive a run that is killed."""
    for file in _held:
        file.close()


os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def locked(folder: Path, complaint: str) -> Iterator[None]:
    """Holds the lock of a folder, which the system takes back when the process ends, however it ends.

    Raises `ConfigError` with `complaint` where another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a") as file:
        for attempt in range(LOCK_ATTEMPTS):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # maybe only for the moment in which `is_locked` looks
                if attempt == LOCK_ATTEMPTS - 1:
                    message = f"{complaint}; wait until it has ended, or choose another folder"
                    raise ConfigError(message) from None
                time.sleep(0.1)
        _held.append(file)
        try:
            yield
        finally:
            _held.remove(file)


def is_locked(folder: Path) -> bool:
    """Returns whether a living process holds the lock of a folder."""
    path = folder / LOCK_FILE
    if not path.exists():
        return False
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
