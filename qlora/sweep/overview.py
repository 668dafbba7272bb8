"""A sweep's folder: the jobs in it, the file that tells of all of them, and whether the same command may go on."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from qlora.compose import read_config
from qlora.errors import ConfigError, DamagedFile
from qlora.files import read_record, write_text
from qlora.folder import RunFolder, describe_changes, flatten, is_below
from qlora.stored import RESULTS, STATUS_FILE
from qlora.sweep.jobs import UNNAMED_KEYS, Job, Status, read_job
from qlora.wording import higher_is_better

log = logging.getLogger(__name__)

OVERVIEW_FILE = "sweep.json"


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

    @property
    def maximizes(self) -> bool:
        """Whether a larger objective is the better one."""
        name = self.objective or ""
        return self.goals[name] == "maximize" if name in self.goals else higher_is_better(name)

    def update(self, job: Job) -> None:
        """Takes what is known of a job now, and writes the overview."""
        self.jobs[job.name] = job
        self.write()

    def write(self) -> None:
        """Writes the overview, whole or not at all."""
        record = {
            "name": self.folder.name,
            "objective": self.objective,
            "goals": self.goals,
            "counts": {status.value: count for status in Status if (count := len(self.with_status(status)))},
            "jobs": [job.to_dict() for job in self.jobs.values()],
            "common": self.common,
        }
        write_text(self.folder / OVERVIEW_FILE, json.dumps(record, indent=2) + "\n")

    def with_status(self, *wanted: Status) -> list[Job]:
        """Returns the jobs of these statuses, in order."""
        return [job for job in self.jobs.values() if job.status in wanted]

    @property
    def varied(self) -> list[str]:
        """The keys that differ between the jobs, in the order in which they appear."""
        return list(dict.fromkeys(key for job in self.jobs.values() for key in job.values))


def read_sweep(folder: Path, objective: str | None = None) -> Sweep:
    """Returns a sweep as the folders of its jobs tell now; an overview of a sweep that was killed may be older."""
    damage: DamagedFile | None = None
    try:
        stored = read_overview(folder / OVERVIEW_FILE)
    except DamagedFile as error:
        stored, damage = {}, error
    sweep = Sweep(folder, objective or stored.get("objective"), common=stored.get("common", {}))
    sweep.goals = stored.get("goals", {})
    for record in stored.get("jobs", []):
        sweep.jobs[record["job"]] = Job(folder / record["job"], overrides=record["overrides"])
    for place in job_folders(folder):
        job, known = read_job(place), sweep.jobs.get(place.name)
        job.overrides = job.overrides or (known.overrides if known else [])
        sweep.jobs[place.name] = job
    if damage is not None:
        log.warning("%s is damaged (%s); its jobs' folders are read instead", damage.path, damage.fault)
        sweep.common = _restore_common(sweep)
    return sweep


def job_folders(folder: Path) -> list[Path]:
    """Returns the folders of a sweep's jobs, those included of which a file is left only."""
    names = (STATUS_FILE, *RESULTS)
    return sorted({path.parent for name in names for path in folder.glob(f"*/{name}")})


def read_overview(path: Path) -> dict[str, Any]:
    """Returns what a sweep's overview tells, {} where there is none; raises `DamagedFile`."""
    record = read_record(path) or {}
    kinds = {"jobs": list, "common": dict, "goals": dict}
    if wrong := [name for name, kind in kinds.items() if not isinstance(record.get(name, kind()), kind)]:
        raise DamagedFile(path, f"{wrong[0]} is no {'list' if kinds[wrong[0]] is list else 'object'}")
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
