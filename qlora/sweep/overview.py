"""A sweep's folder: the jobs in it, the file that tells of all of them, and whether the same command may go on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora.errors import ConfigError
from qlora.files import read_json, write_text
from qlora.folder import describe_changes, flatten, is_below
from qlora.sweep.jobs import STATUS_FILE, UNNAMED_KEYS, Job, Status, read_job
from qlora.wording import higher_is_better

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
    stored = read_json(folder / OVERVIEW_FILE) or {}
    sweep = Sweep(folder, objective or stored.get("objective"), common=stored.get("common", {}))
    sweep.goals = stored.get("goals", {})
    for record in stored.get("jobs", []):
        sweep.jobs[record["job"]] = Job(folder / record["job"], overrides=record["overrides"])
    for path in sorted(folder.glob(f"*/{STATUS_FILE}")):
        sweep.jobs[path.parent.name] = read_job(path.parent)
    return sweep


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
