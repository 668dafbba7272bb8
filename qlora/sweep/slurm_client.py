"""SLURM's commands: what is in the queue, how a job ended, and why jobs were refused."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora.errors import ResourceError
from qlora.sweep.engine_config import SlurmSettings
from qlora.sweep.job_processes import OUTPUT
from qlora.sweep.jobs import SUBMITTED, Job, Status, read_job, write_status
from qlora.sweep.slurm_job import FINAL
from qlora.text import shorten

PROGRAMS = ("sbatch", "squeue", "scontrol", "scancel")
FILE_SECONDS = 15.0
"""How much later a file that a node wrote may be visible here."""
ON_NODE = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"}
"""States of a job that has begun; other jobs in the queue wait."""


@dataclass(frozen=True)
class Queued:
    """A job in SLURM's queue."""

    state: str
    reason: str
    node: str

    @property
    def runs(self) -> bool:
        """Whether the job has begun."""
        return self.state in ON_NODE


def check_programs() -> None:
    """Raises `ResourceError` if SLURM's commands are missing."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        raise ResourceError(
            f"hydra/launcher=slurm needs SLURM's {', '.join(missing)}, which this machine lacks; start the command on "
            "a login node of the cluster"
        )


def max_array_size() -> int:
    """Returns how many jobs SLURM accepts in one array."""
    try:
        text = _ask("scontrol", "show", "config")
    except subprocess.SubprocessError as error:
        raise ResourceError(
            f"SLURM does not answer ({describe_error(error)}); start the command where `squeue` works"
        ) from error
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", text, re.MULTILINE)
    return max(int(match[1]), 1) if match else 1000


def read_queue() -> dict[str, Queued]:
    """Returns the user's jobs that wait or run, by SLURM's names; raises `SubprocessError` if SLURM is silent."""
    text = _ask("squeue", "--noheader", f"--user={os.getuid()}", "--array", "--format=%i|%T|%r|%N")
    fields = [line.strip().split("|") for line in text.splitlines() if line.count("|") == 3]
    return {name: Queued(state, reason, node) for name, state, reason, node in fields}


def _ask(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except OSError as error:
        raise subprocess.SubprocessError(str(error)) from error


def describe_error(error: subprocess.SubprocessError) -> str:
    """Returns why one of SLURM's commands failed, in one line."""
    lines = (getattr(error, "stderr", None) or "").strip().splitlines()
    return lines[-1] if lines else shorten(" ".join(str(error).split()), 200)


def record_end(folder: Path, name: str) -> Job:
    """Returns a job that has left the queue, and records its end if it could not do so itself."""
    how = last_state(name)
    end = time.monotonic() + FILE_SECONDS
    job = read_job(folder)
    while how.get("JobState") == "COMPLETED" and job.status not in FINAL and time.monotonic() < end:
        time.sleep(0.5)
        job = read_job(folder)
    if job.status in FINAL:
        write_status(folder, job.status, **{SUBMITTED: None})
        return read_job(folder)
    status, reason = _explain_end(how, job)
    write_status(folder, status, reason=reason, **{SUBMITTED: None})
    return read_job(folder)


def last_state(name: str) -> dict[str, str]:
    """Returns what SLURM still knows about an ended job: `JobState`, `ExitCode`, `BatchHost`; empty: nothing."""
    try:
        text = _ask("scontrol", "show", "job", "--oneliner", name)
        return dict(field.split("=", 1) for field in text.split() if "=" in field)
    except subprocess.SubprocessError:
        pass
    try:
        text = _ask("sacct", "--jobs", name, "--noheader", "--parsable2", "--allocations",
                    "--format=State,ExitCode,NodeList")  # fmt: skip
    except subprocess.SubprocessError:  # a cluster without accounting
        return {}
    state, code, node = ([*text.splitlines()[-1].split("|"), "", "", ""] if text.strip() else ["", "", ""])[:3]
    return {"JobState": state.partition(" ")[0], "ExitCode": code, "BatchHost": node} if state else {}


def _explain_end(how: Mapping[str, str], job: Job) -> tuple[Status, str]:
    """Returns the status of a job that recorded no end itself, and the reason in one line."""
    state, code, node = how.get("JobState", ""), how.get("ExitCode", ""), how.get("BatchHost") or how.get("NodeList")
    began = (job.folder / OUTPUT).exists()
    where = f" on {node}" if node and node != "(null)" else ""
    if state in ("CANCELLED", "DEADLINE", "REVOKED"):
        return Status.interrupted, f"cancelled in SLURM{where}" + ("" if began else " before it began")
    if job.reason is not None and job.reason.startswith("timed out"):
        return Status.interrupted, job.reason
    if not state and job.status is Status.interrupted and job.reason is not None:  # SLURM no longer knows the job
        return Status.interrupted, job.reason
    if state == "TIMEOUT":
        return Status.interrupted, (
            f"timed out{where}: SLURM ended it at its limit of {how.get('TimeLimit', 'time')} before it had saved a "
            "checkpoint and was queued again; raise hydra.launcher.signal_delay_s"
        )
    if state == "PREEMPTED":
        return Status.interrupted, f"preempted in SLURM{where}"
    if state in ("NODE_FAIL", "BOOT_FAIL"):
        return Status.interrupted, f"its node failed{where}"
    if state == "OUT_OF_MEMORY":
        return Status.failed, f"killed{where}: it took more memory than hydra.launcher.mem_gb allows"
    ending = f" as {state}, exit code {code.partition(':')[0]}" if state else ""
    if _killed_by(code):
        ending += f", killed by signal {_killed_by(code)}"
    if not began:
        return Status.failed, (
            f"ended in SLURM{ending}{where} before it began: {job.folder.parent} and this Python must exist on every "
            "node"
        )
    return Status.failed, f"ended in SLURM{ending}{where} and without a result"


def _killed_by(code: str) -> int:
    number = code.partition(":")[2]
    return int(number) if number.isdigit() else 0


def describe_refusal(output: str, settings: SlurmSettings) -> ResourceError:
    """Returns the error for jobs that `sbatch` refused with `output`."""
    text = "; ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in output.strip().splitlines())
    keys = ("gpus_per_node", "gres", "cpus_per_task", "mem_gb", "constraint", "partition")
    asked = ", ".join(f"{key}={value}" for key in keys if (value := getattr(settings, key)) is not None)
    unfit = any(word in text.lower() for word in ("generic resource", "gres", "node configuration", "feature"))
    hint = (
        f"; no node has the requested {asked} (of hydra.launcher; gpus_per_node=null requests no GPU)" if unfit else ""
    )
    return ResourceError(
        f"SLURM refused the jobs: {text or 'sbatch said nothing'}{hint}; docs/clusters.md lists the keys"
    )
