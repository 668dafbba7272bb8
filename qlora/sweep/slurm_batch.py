"""What is submitted to SLURM: an array's folder with its script, a record of each job, and a link to its folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora.runtime.atomic_files import read_json, write_text
from qlora.runtime.run_folder import RunFolder
from qlora.sweep.engine_config import SlurmSettings
from qlora.sweep.job_processes import ERRORS, OUTPUT, Task
from qlora.sweep.jobs import STATUS_FILE, SUBMITTED, Status, write_status
from qlora.sweep.slurm_job import TIMEOUTS

BATCHES = ".slurm"
"""The folder of all arrays, in the sweep's: of each its script, its number, and a record and a link for each job."""


def submitted_name(folder: Path) -> str | None:
    """Returns SLURM's name of a job that was submitted and has not ended, e.g. `12_0`; None: there is none."""
    submitted = (read_json(folder / STATUS_FILE) or {}).get(SUBMITTED)
    if submitted is None:
        return None
    batch, _, index = submitted.partition("/")
    number = array_number(folder.parent / BATCHES / batch)
    return None if number is None else f"{number}_{index}"


def array_number(batch: Path) -> str | None:
    """Returns SLURM's number of an array; None: it was never submitted."""
    try:
        text = (batch / "id").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    match = re.match(r"\d+", text)  # a federation adds its cluster's name
    return match[0] if match else None


def new_batch(folder: Path) -> Path:
    """Creates the folder of the next array."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
    batch = folder / str(max(taken, default=0) + 1)
    batch.mkdir()
    return batch


def prepare_job(batch: Path, index: int, task: Task, settings: SlurmSettings) -> None:
    """Writes the record of a job that the node reads, and a link by which SLURM finds the job's folder."""
    folder = task.job.folder
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "folder": str(folder.absolute()),
        "command": task.command,
        "environment": dict(task.environment),
        "timeout_min": settings.timeout_min,
        "max_num_timeout": settings.max_num_timeout,
        "signal_delay_s": settings.signal_delay_s,
    }
    write_text(batch / f"{index}.json", json.dumps(record, indent=2) + "\n", flush=False)
    (batch / str(index)).symlink_to(os.path.relpath(folder.absolute(), batch), target_is_directory=True)
    RunFolder(folder).progress.unlink(missing_ok=True)  # of an earlier start
    fresh = {"overrides": task.job.overrides, "reason": None, TIMEOUTS: 0, SUBMITTED: f"{batch.name}/{index}"}
    write_status(folder, Status.queued, **fresh)


def script_text(batch: Path, count: int, settings: SlurmSettings, previous: str | None = None) -> str:
    """Returns the script for `sbatch`: the options, and the command that runs the job of an index."""
    options = "\n".join(f"#SBATCH {line}" for line in sbatch_options(batch, count, settings, previous))
    runner = shlex.join([sys.executable, "-m", "qlora.sweep.slurm_job"])
    setup = "".join(f"{line}\n" for line in settings.setup)
    return f'#!/bin/bash\n{options}\n{setup}exec {runner} {shlex.quote(str(batch))}/"$SLURM_ARRAY_TASK_ID".json\n'


def sbatch_options(batch: Path, count: int, settings: SlurmSettings, previous: str | None) -> Iterator[str]:
    """Yields the options of `sbatch` as the script holds them."""
    given: dict[str, Any] = {
        "job-name": settings.name or batch.parent.parent.name,
        "array": f"0-{count - 1}%{settings.array_parallelism}",
        "output": f"{_escaped(batch)}/%a/{OUTPUT}",
        "error": f"{_escaped(batch)}/%a/{ERRORS}",
        "open-mode": "append",
        "chdir": str(Path.cwd()),
        "nodes": 1,
        "ntasks": 1,
        "time": settings.timeout_min,
        "signal": f"B:USR1@{settings.signal_delay_s}",
        "requeue": True,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "exclude": settings.exclude,
        "gres": settings.gres,
        "gpus-per-node": None if settings.gres is not None else settings.gpus_per_node or None,
        "cpus-per-task": settings.cpus_per_task,
        "mem": None if settings.mem_gb is None else f"{settings.mem_gb}G",
        "comment": settings.comment,
        "dependency": None if previous is None else f"afterany:{previous}",
    }
    further = {key.replace("_", "-"): value for key, value in settings.additional_parameters.items()}
    for key, value in (given | further).items():
        if value is True:
            yield f"--{key}"
        elif value is not None and value is not False:
            yield f"--{key}={shlex.quote(str(value))}"


def _escaped(path: Path) -> str:
    return str(path).replace("%", "%%")
