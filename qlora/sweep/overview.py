"""A sweep's folder: the jobs in it, the file that tells of all of them, and whether the same command may go on."""

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
from qlora.errors import ConfigError, DamagedFile
from qlora.runtime.atomic_files import read_record, write_text
from qlora.runtime.run_folder import RunFolder, describe_changes, flatten, is_below
from qlora.runtime.saved_run import RESULTS, STATUS_FILE, to_number, to_numbers
from qlora.sweep.jobs import UNNAMED_KEYS, Job, Status, identity, is_stamped, read_job, slug
from qlora.text import higher_is_better

log = logging.getLogger(__name__)

OVERVIEW_FILE = "sweep.json"
KINDS = {list: "list", dict: "object", int: "whole number"}


@dataclass
class Sweep:
    """The jobs of one folder, those of earlier commands included."""

    folder: Path
    objective: str | None
    jobs: dict[str, Job] = field(default_factory=dict)
    """By the names of their folders."""
    common: dict[str, Any] = field(default_factory=dict)
    """The config's keys that have one value in all jobs, but for those that may differ anyway."""
    goals: dict[str, str] = field(default_factory=dict)
    """The metrics that a search goes by, with `minimize` or `maximize`; none: the objective, as its name tells."""
    study: str | None = None
    """What the study of a search is called in its database."""
    is_shared: bool = False
    """Whether other commands run jobs in the folder."""
    page_seconds: float = 0.0
    """How long the page took to write, the last time that a job's own process did so."""
    to_come: int = 0
    """How many combinations are not composed yet, and so are no jobs."""
    folders: dict[str, str] = field(default_factory=dict)
    """The folders of jobs by the identities of their configs."""
    has_changed: bool = True
    """Whether the jobs' folders tell anything that the overview did not hold when it was read."""
    _texts: dict[str, tuple[Any, str]] = field(default_factory=dict, repr=False)

    @property
    def maximizes(self) -> bool:
        """Whether a larger objective is the better one."""
        name = self.objective or ""
        return self.goals[name] == "maximize" if name in self.goals else higher_is_better(name)

    def find(self, own: list[str], config: Mapping[str, Any]) -> Job:
        """Returns the job of a config: the one that has its identity already, however it is named, or a new one."""
        digits = identity(config)
        name = self.folders.setdefault(digits, f"{slug(own)}-{digits}")
        return self.jobs.get(name) or Job(self.folder / name, overrides=own)

    def update(self, job: Job) -> None:
        """Takes what is known of a job now, and writes the overview."""
        self.jobs[job.name] = job
        self.write()

    def write(self) -> None:
        """Writes the overview, whole or not at all; only jobs that have changed are put into text anew."""
        if self.is_shared:
            self.jobs |= read_sweep(self.folder, self.objective).jobs
        counts = {status.value: count for status in Status if (count := len(self.with_status(status)))}
        record: dict[str, Any] = {
            "name": self.folder.name,
            "objective": self.objective,
            "goals": self.goals,
            "counts": counts,
        }
        record |= {"study": self.study} if self.study is not None else {}
        record |= {"page_seconds": self.page_seconds} if self.page_seconds else {}
        record |= {"to_come": self.to_come} if self.to_come else {}
        head = json.dumps(record, indent=2).removesuffix("\n}")
        jobs = ",\n    ".join(map(self._text, self.jobs.values()))
        common = json.dumps(self.common, indent=2).replace("\n", "\n  ")
        text = f'{head},\n  "jobs": [\n    {jobs}\n  ],\n  "common": {common}\n}}\n'
        write_text(self.folder / OVERVIEW_FILE, text)

    def _text(self, job: Job) -> str:
        facts = (job.status, job.reason, job.objective, job.seconds, job.metrics, job.stamp, len(job.overrides))
        known = self._texts.get(job.name)
        if known is None or known[0] != facts:
            self._texts[job.name] = known = (facts, json.dumps(job.to_dict()))
        return known[1]

    def with_status(self, *wanted: Status) -> list[Job]:
        """Returns the jobs of these statuses, in order."""
        return [job for job in self.jobs.values() if job.status in wanted]

    @property
    def varied(self) -> list[str]:
        """The keys that differ between the jobs, in the order in which they appear."""
        return list(dict.fromkeys(key for job in self.jobs.values() for key in job.values))


def read_sweep(folder: Path, objective: str | None = None) -> Sweep:
    """Returns a sweep as the folders of its jobs tell now; an overview of a sweep that was killed may be older.

    Jobs that have finished and whose files are those that the overview was made of are not read again.
    """
    damage: DamagedFile | None = None
    try:
        stored = read_overview(folder / OVERVIEW_FILE)
    except DamagedFile as error:
        stored, damage = {}, error
    sweep = Sweep(folder, objective or stored.get("objective"), common=stored.get("common", {}), has_changed=False)
    sweep.goals, sweep.to_come, sweep.study = stored.get("goals", {}), stored.get("to_come", 0), stored.get("study")
    sweep.page_seconds = stored.get("page_seconds", 0.0)
    records = {record["job"]: record for record in stored.get("jobs", [])}
    for name, record in records.items():
        sweep.jobs[name] = Job(folder / name, overrides=record["overrides"])
    for name in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if folder.is_dir() else []:
        sweep.folders.setdefault(name.rpartition("-")[2], name)
        place, record = folder / name, records.get(name, {})
        if (job := _restore(place, record)) is not None:
            sweep.jobs[name] = job
        elif is_job_folder(place):
            job, sweep.has_changed = read_job(place), True
            job.overrides = job.overrides or record.get("overrides", [])
            sweep.jobs[name] = job
    if damage is not None:
        log.warning("%s is damaged (%s); its jobs' folders are read instead", damage.path, damage.reason)
        sweep.common, sweep.has_changed = _restore_common(sweep), True
    return sweep


def _restore(folder: Path, record: Mapping[str, Any]) -> Job | None:
    """Returns a finished job as `Job.to_dict` told of it; None: it has not, or its files are others now."""
    if record.get("status") != Status.finished.value:
        return None  # the files of a failed job tell more than the overview
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
    """Returns whether a folder is that of a job, of which a file may be left only."""
    return any((folder / name).is_file() for name in (STATUS_FILE, *RESULTS))


def read_overview(path: Path) -> dict[str, Any]:
    """Returns what a sweep's overview tells, {} where there is none; raises `DamagedFile`."""
    record = read_record(path) or {}
    kinds = {"jobs": list, "common": dict, "goals": dict, "to_come": int}
    if wrong := [name for name, kind in kinds.items() if not isinstance(record.get(name, kind()), kind)]:
        raise DamagedFile(path, f"{wrong[0]} is no {KINDS[kinds[wrong[0]]]}")
    if not isinstance(record.get("objective"), str | NoneType):
        raise DamagedFile(path, "objective is no text")
    if not all(way in ("minimize", "maximize") for way in record.get("goals", {}).values()):
        raise DamagedFile(path, "goals are neither to minimize nor to maximize")
    for job in record.get("jobs", []):
        name, overrides = (job.get("job"), job.get("overrides")) if isinstance(job, dict) else (None, None)
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise DamagedFile(path, "a job in it has no name of a folder")
        if not (isinstance(overrides, list) and all(isinstance(text, str) for text in overrides)):
            raise DamagedFile(path, f"the overrides of the job {name} are no list of texts")
    return record


def _restore_common(sweep: Sweep) -> dict[str, Any]:
    """Returns the keys that the stored configs of all jobs have in common; {} where none can be read."""
    configs = []
    for job in sweep.jobs.values():
        with contextlib.suppress(DamagedFile):
            configs += [stored] if (stored := read_config(RunFolder(job.folder).config)) is not None else []
    common = common_facts(configs) if configs else {}
    return {key: value for key, value in common.items() if not is_below(key, sweep.varied)}


def common_facts(configs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the full keys that have one value in all configs, but for those that do not change a result."""
    first, *rest = [dict(flatten(config)) for config in configs]
    return {
        key: value
        for key, value in first.items()
        if not is_below(key, UNNAMED_KEYS) and all(other.get(key) == value for other in rest)
    }


def check_same_sweep(folder: Path, stored: dict[str, Any], common: dict[str, Any]) -> None:
    """Raises `ConfigError` naming the keys that no job of a sweep varies and that have another value now."""
    if changes := describe_changes(stored, common, {*stored} & {*common}):
        raise ConfigError(
            f"{folder} holds a sweep of another config; changed:{changes}\n"
            "choose another folder with name=NAME, or start with the same config to go on"
        )
