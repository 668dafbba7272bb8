"""The folder of a sweep: its jobs, the overview file, and the check that the same command may resume it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from qlora.config.saved_config import read_config
from qlora.errors import DamagedFile, RunError
from qlora.runtime.atomic_files import read_record, write_text
from qlora.runtime.run_folder import RunFolder, describe_changes, flatten, is_below
from qlora.runtime.saved_run import RESULTS, STATUS_FILE, to_number, to_numbers
from qlora.sweep.jobs import UNNAMED_KEYS, Job, Status, identity, is_stamped, read_job, slug
from qlora.sweep.verdicts import Question, judge, read_question
from qlora.text import higher_is_better

log = logging.getLogger(__name__)

OVERVIEW_FILE = "sweep.json"
KINDS = {list: "list", dict: "mapping", int: "whole number"}


@dataclass
class Sweep:
    """The jobs of one folder, those of earlier commands included."""

    folder: Path
    objective: str | None
    jobs: dict[str, Job] = field(default_factory=dict)
    """The jobs by the names of their folders."""
    common: dict[str, Any] = field(default_factory=dict)
    """The config's keys that have one value in all jobs, without those that do not change a result."""
    goals: dict[str, str] = field(default_factory=dict)
    """The metrics that a search optimizes, with `minimize` or `maximize`; empty: the objective, as its name implies."""
    question: Question | None = None
    """What the sweep compares (`sweep.compare`)."""
    study: str | None = None
    """The name of the study of a search in its database."""
    is_shared: bool = False
    """Whether other commands run jobs in the folder."""
    page_seconds: float = 0.0
    """How long the process of a job needed to write the page the last time."""
    to_come: int = 0
    """How many combinations are not composed yet."""
    folders: dict[str, str] = field(default_factory=dict)
    """The folders of jobs by the identities of their configs."""
    names: dict[str, str] = field(default_factory=dict)
    """What runs that form no sweep are called, by their folders."""
    has_changed: bool = True
    """Whether the jobs' folders held news that the overview lacked when it was read."""
    _texts: dict[str, tuple[Any, str]] = field(default_factory=dict, repr=False)

    @property
    def maximizes(self) -> bool:
        """Whether a larger objective is better."""
        name = self.objective or ""
        return self.goals[name] == "maximize" if name in self.goals else higher_is_better(name)

    def find(self, overrides: list[str], config: Mapping[str, Any]) -> Job:
        """Returns the job of a config: the one with its identity, whatever its name, or a new one."""
        digits = identity(config)
        name = self.folders.setdefault(digits, f"{slug(overrides)}-{digits}")
        return self.jobs.get(name) or Job(self.folder / name, overrides=overrides)

    def update(self, job: Job) -> None:
        """Replaces what is known about a job, and writes the overview."""
        self.jobs[job.name] = job
        self.write()

    def write(self) -> None:
        """Writes the overview atomically; only jobs that have changed are serialized again."""
        if self.is_shared:
            self.jobs |= read_sweep(self.folder, self.objective).jobs
        counts = {status.value: count for status in Status if (count := len(self.with_status(status)))}
        record: dict[str, Any] = {
            "name": self.folder.name,
            "objective": self.objective,
            "goals": self.goals,
            "counts": counts,
        }
        if self.question is not None:
            verdicts = [item.to_dict() for item in judge(self.question, self.jobs)]
            record |= {"compare": self.question.to_dict(), "verdicts": verdicts}
        record |= {"study": self.study} if self.study is not None else {}
        record |= {"page_seconds": self.page_seconds} if self.page_seconds else {}
        record |= {"to_come": self.to_come} if self.to_come else {}
        head = json.dumps(record, indent=2).removesuffix("\n}")
        jobs = ",\n    ".join(map(self._text, self.jobs.values()))
        common = json.dumps(self.common, indent=2).replace("\n", "\n  ")
        text = f'{head},\n  "jobs": [\n    {jobs}\n  ],\n  "common": {common}\n}}\n'
        write_text(self.folder / OVERVIEW_FILE, text)

    def _text(self, job: Job) -> str:
        state = (job.status, job.reason, job.objective, job.seconds, job.metrics, job.stamp, len(job.overrides))
        known = self._texts.get(job.name)
        if known is None or known[0] != state:
            self._texts[job.name] = known = (state, json.dumps(job.to_dict()))
        return known[1]

    def with_status(self, *statuses: Status) -> list[Job]:
        """Returns the jobs of these statuses, in order."""
        return [job for job in self.jobs.values() if job.status in statuses]

    @property
    def varied(self) -> list[str]:
        """The keys that differ between the jobs, in the order in which they appear."""
        return list(dict.fromkeys(key for job in self.jobs.values() for key in job.values))


def read_sweep(folder: Path, objective: str | None = None) -> Sweep:
    """Returns a sweep as the folders of its jobs record it; the overview of a killed sweep may be older.

    A finished job is not read again if its files have not changed since the overview was written.
    """
    damage: DamagedFile | None = None
    try:
        overview = read_overview(folder / OVERVIEW_FILE)
    except DamagedFile as error:
        overview, damage = {}, error
    sweep = Sweep(folder, objective or overview.get("objective"), common=overview.get("common", {}), has_changed=False)
    sweep.goals, sweep.to_come, sweep.study = (
        overview.get("goals", {}),
        overview.get("to_come", 0),
        overview.get("study"),
    )
    sweep.question = read_question(overview.get("compare"))
    sweep.page_seconds = overview.get("page_seconds", 0.0)
    records = {record["job"]: record for record in overview.get("jobs", [])}
    for name, record in records.items():
        sweep.jobs[name] = Job(folder / name, overrides=record["overrides"])
    for name in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if folder.is_dir() else []:
        sweep.folders.setdefault(name.rpartition("-")[2], name)
        path, record = folder / name, records.get(name, {})
        if (job := _restore(path, record)) is not None:
            sweep.jobs[name] = job
        elif is_job_folder(path):
            job, sweep.has_changed = read_job(path), True
            job.overrides = job.overrides or record.get("overrides", [])
            sweep.jobs[name] = job
    if damage is not None:
        log.warning("%s is damaged (%s); its jobs' folders are read instead", damage.path, damage.reason)
        sweep.common, sweep.has_changed = _restore_common(sweep), True
    return sweep


def _restore(folder: Path, record: Mapping[str, Any]) -> Job | None:
    """Returns a finished job as the overview holds it; None: it has not finished, or its files have changed."""
    if record.get("status") != Status.finished.value:
        return None  # the files of a failed job hold more than the overview
    job = Job(folder, status=Status.finished, overrides=record["overrides"])
    try:
        if not is_stamped(folder, record.get("stamp", {})):
            return None
        job.objective = None if record.get("objective") is None else to_number(record["objective"])
        job.seconds = None if record.get("seconds") is None else to_number(record["seconds"])
        job.metrics = to_numbers(record.get("metrics", {}))
    except (AttributeError, TypeError, ValueError):
        return None
    job.reason, job.seedless, job.stamp = record.get("reason"), record.get("seedless"), record["stamp"]
    return job


def is_job_folder(folder: Path) -> bool:
    """Returns whether a folder is that of a job, even if only one of its files is left."""
    return any((folder / name).is_file() for name in (STATUS_FILE, *RESULTS))


def read_overview(path: Path) -> dict[str, Any]:
    """Returns the overview of a sweep, {} if there is none; raises `DamagedFile`."""
    record = read_record(path) or {}
    kinds = {"jobs": list, "common": dict, "goals": dict, "to_come": int}
    if wrong := [name for name, kind in kinds.items() if not isinstance(record.get(name, kind()), kind)]:
        raise DamagedFile(path, f"{wrong[0]} is not a {KINDS[kinds[wrong[0]]]}")
    if not isinstance(record.get("objective"), str | NoneType):
        raise DamagedFile(path, "objective is not a text")
    if not all(way in ("minimize", "maximize") for way in record.get("goals", {}).values()):
        raise DamagedFile(path, "goals must say minimize or maximize")
    try:
        read_question(record.get("compare"))
    except ValueError as error:
        raise DamagedFile(path, f"compare: {error}") from error
    for job in record.get("jobs", []):
        name, overrides = (job.get("job"), job.get("overrides")) if isinstance(job, dict) else (None, None)
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise DamagedFile(path, "a job in it lacks the name of a folder")
        if not (isinstance(overrides, list) and all(isinstance(text, str) for text in overrides)):
            raise DamagedFile(path, f"the overrides of the job {name} are not a list of texts")
    return record


def _restore_common(sweep: Sweep) -> dict[str, Any]:
    """Returns the keys that the saved configs of all jobs have in common; {} if none can be read."""
    configs = []
    for job in sweep.jobs.values():
        with contextlib.suppress(DamagedFile):
            configs += [saved] if (saved := read_config(RunFolder(job.folder).config)) is not None else []
    common = common_keys(configs) if configs else {}
    return {key: value for key, value in common.items() if not is_below(key, sweep.varied)}


def common_keys(configs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the full keys that have one value in all configs, without those that do not change a result."""
    first, *rest = [dict(flatten(config)) for config in configs]
    return {
        key: value
        for key, value in first.items()
        if not is_below(key, UNNAMED_KEYS) and all(other.get(key) == value for other in rest)
    }


def check_same_sweep(folder: Path, saved: dict[str, Any], common: dict[str, Any]) -> None:
    """Raises `RunError` that names the keys that no job varies and whose values have changed."""
    if changes := describe_changes(saved, common, {*saved} & {*common}):
        raise RunError(
            f"{folder} holds a sweep of another config; changed:{changes}\n"
            "choose another folder with name=NAME, or start with the same config to resume it"
        )
