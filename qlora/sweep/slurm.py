"""Jobs of a sweep on a SLURM cluster: submitted as arrays, followed until they end, found again by the same command."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from qlora.errors import ConfigError
from qlora.runtime.atomic_files import read_json, write_text
from qlora.runtime.console import printable, say
from qlora.runtime.run_folder import RunFolder
from qlora.sweep.engine_config import SlurmSettings
from qlora.sweep.job_processes import ERRORS, OUTPUT, Task, terminable
from qlora.sweep.jobs import STATUS_FILE, SUBMITTED, Job, Status, read_job, write_status
from qlora.sweep.slurm_job import FINAL, TIMEOUTS
from qlora.text import shorten

PROGRAMS = ("sbatch", "squeue", "scontrol", "scancel")
BATCHES = ".slurm"
"""The folder of what was submitted, in the sweep's: of each array its script, its number, and a link to each job."""
POLL_SECONDS, LONGEST_POLL = 1.0, 15.0
"""SLURM is asked for the queue so often at the beginning, and later."""
FILE_SECONDS = 15.0
"""What a node wrote may be seen so much later here."""
LONGEST_LABEL = 100
LISTED = 20
"""Jobs that are told by a line each."""
ON_NODE = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"}
"""States of a job that has begun; others in the queue wait."""
USUAL = {"None", "Priority", "Resources", "BeginTime", "JobArrayTaskLimit", "Dependency", "Cleaning"}
"""Why a job waits that will start by itself."""


@dataclass(frozen=True)
class Queued:
    """A job in SLURM's queue."""

    state: str
    reason: str
    node: str

    @property
    def runs(self) -> bool:
        """Whether it has begun."""
        return self.state in ON_NODE


def check_programs() -> None:
    """Raises `ConfigError` where SLURM's commands are missing."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        raise ConfigError(
            f"hydra/launcher=slurm needs SLURM's {', '.join(missing)}, which this machine lacks; start the command on "
            "a login node of the cluster"
        )


class SlurmJobs:
    """Submits jobs, and follows them."""

    def __init__(
        self,
        settings: SlurmSettings,
        *,
        detach: bool,
        on_start: Callable[[Job], None],
        on_end: Callable[[Job], None],
        on_wait: Callable[[list[Job]], None],
        may_come: Callable[[], bool] = lambda: False,
    ) -> None:
        self.settings, self.detach = settings, detach
        self._on_start, self._on_end, self._on_wait, self._may_come = on_start, on_end, on_wait, may_come
        self._jobs: dict[str, Job] = {}
        """What was submitted and has not ended, by SLURM's names such as `12_0`."""
        self._started: set[str] = set()
        self._timeouts: dict[str, int] = {}
        self._stuck: dict[str, str] = {}
        self._answers = True

    def run(self, next_task: Callable[[], Task | None], room: int | None) -> None:
        """Runs tasks until `next_task` has none left and all have ended, at most `room` of them at a time.

        With `detach` it returns when all are submitted. An interruption leaves the jobs in the queue.
        """
        check_programs()
        with terminable():
            try:
                delay = POLL_SECONDS
                while True:
                    self._fill(next_task, room)  # again and again: what ended may call for another
                    if not self._jobs and not self._may_come():
                        return
                    ended = self._look()
                    if self.detach:
                        break
                    if ended:
                        delay = POLL_SECONDS
                        continue
                    self._wait(delay)
                    delay = min(1.2 * delay, LONGEST_POLL)
            except KeyboardInterrupt:
                self._tell_left()
                raise
        if self._jobs:
            self._tell_left()

    def _fill(self, next_task: Callable[[], Task | None], room: int | None) -> None:
        """Takes up tasks while there is room: submits new ones, and finds those again that SLURM has already."""
        fresh: list[Task] = []
        known: list[str] = []
        while room is None or len(self._jobs) + len(fresh) < room:
            task = next_task()
            if task is None:
                break
            name = submitted_name(task.job.folder)
            if name is None:
                fresh.append(task)
            else:
                self._jobs[name] = task.job
                known.append(name)
        if known:
            say(f"{_count(known)} in SLURM already: {_ranges(known)}")
        size = largest_array() if fresh else 1
        previous: str | None = None
        for start in range(0, len(fresh), size):
            previous = self._submit(fresh[start : start + size], previous)

    def _submit(self, tasks: Sequence[Task], previous: str | None) -> str:
        """Submits an array, which begins when the `previous` one has ended; returns its number."""
        folder = tasks[0].job.folder.parent.absolute()
        batch = _new_batch(folder / BATCHES)
        for index, task in enumerate(tasks):
            prepare_job(batch, index, task, self.settings)
        script = batch / "job.sh"
        write_text(script, script_text(batch, len(tasks), self.settings, previous))
        with (batch / "id").open("wb") as file:  # written by sbatch itself: nothing that runs is ever forgotten
            done = subprocess.run(
                ["sbatch", "--parsable", str(script)], stdout=file, stderr=subprocess.PIPE, check=False
            )
        if done.returncode:
            for task in tasks:
                write_status(task.job.folder, Status.queued, **{SUBMITTED: None})
            raise _refused(done.stderr.decode("utf-8", "replace"), self.settings)
        number = _number(batch)
        assert number is not None, batch
        names = [f"{number}_{index}" for index in range(len(tasks))]
        say(f"submitted {_count(names)} to SLURM: {_ranges(names)}")
        for name, task in zip(names[:LISTED], tasks, strict=False):
            say(f"  {name}  {_label(task.job)}")
        if len(tasks) > LISTED:
            say(f"  ... and {len(tasks) - LISTED} more; {batch} has a link to each")
        self._jobs |= {name: task.job for name, task in zip(names, tasks, strict=True)}
        return number

    def _look(self) -> bool:
        """Asks SLURM for the queue, and tells what has changed; returns whether a job has ended."""
        try:
            queue = read_queue()
        except subprocess.SubprocessError as error:
            if self._answers:
                say(Text(printable(f"SLURM does not answer ({_complaint(error)}); waiting for it"), style="yellow"))
            self._answers = False
            return False
        if not self._answers:
            say("SLURM answers again")
        self._answers = True
        gone = [name for name in self._jobs if name not in queue]
        for name, job in self._jobs.items():
            if name in queue:
                self._tell(name, job, queue[name])
        for name in gone:
            job = self._jobs.pop(name)
            if name not in self._started:
                self._on_start(job)
            self._started.discard(name)
            self._on_end(record_end(job.folder, name))
        return bool(gone)

    def _tell(self, name: str, job: Job, queued: Queued) -> None:
        """Says what has become of a job since the last look."""
        stored = read_json(job.folder / STATUS_FILE) or {}
        timeouts = stored.get(TIMEOUTS, 0)
        # One that waited for a moment only is not seen to wait.
        if name in self._started and (not queued.runs or timeouts > self._timeouts[name]):
            self._started.discard(name)
            why = f"queued again after {timeouts} of {self.settings.max_num_timeout + 1} allocations"
            job.status, job.reason = Status.queued, why if timeouts else "queued again by SLURM"
            say(f"{name} is queued again: {_label(job)}")
            self._on_wait([job])
        if queued.runs and name not in self._started:
            self._started.add(name)
            self._timeouts[name] = timeouts
            say(f"{name} runs on {queued.node}: {_label(job)}")
            self._on_start(job)
        elif not queued.runs and queued.reason not in USUAL and self._stuck.get(name) != queued.reason:
            self._stuck[name] = queued.reason
            say(Text(printable(f"{name} waits: SLURM says {queued.reason}"), style="yellow"))

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while True:
            running = [read_job(self._jobs[name].folder) for name in self._started]
            for job in running:
                job.status, job.reason = Status.running, None  # so says SLURM; a lock may not be seen from here
            self._on_wait(running)
            if time.monotonic() >= end:
                return
            time.sleep(min(max(end - time.monotonic(), 0), 0.5))

    def _tell_left(self) -> None:
        """Says which jobs are still in SLURM, and what to do about them."""
        if not self._jobs:
            return
        running = [name for name in self._jobs if name in self._started]
        waiting = [name for name in self._jobs if name not in self._started]
        for names, what in ((running, "running"), (waiting, "queued")):
            if names:
                say(f"{_count(names)} still {what} in SLURM: {_ranges(names)}")
        say("follow       the same command again: it shows their state, and submits none of them twice")
        say(f"cancel       scancel {' '.join(_ranges(self._jobs, separator=' ').split())}")


def _label(job: Job) -> str:
    return shorten(" ".join(job.overrides) or job.name, LONGEST_LABEL)


def submitted_name(folder: Path) -> str | None:
    """Returns what SLURM calls a job that was submitted and has not been seen to end, e.g. `12_0`; None: no such."""
    place = (read_json(folder / STATUS_FILE) or {}).get(SUBMITTED)
    if place is None:
        return None
    batch, _, index = place.partition("/")
    number = _number(folder.parent / BATCHES / batch)
    return None if number is None else f"{number}_{index}"


def _number(batch: Path) -> str | None:
    """Returns SLURM's number of an array; None: it was never submitted."""
    try:
        text = (batch / "id").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    match = re.match(r"\d+", text)  # a federation adds its cluster's name
    return match[0] if match else None


def _new_batch(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    taken = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
    batch = folder / str(max(taken, default=0) + 1)
    batch.mkdir()
    return batch


def prepare_job(batch: Path, index: int, task: Task, settings: SlurmSettings) -> None:
    """Writes what the node reads of a job, and a link by which SLURM finds its folder."""
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
    """Returns what `sbatch` gets: the options, and the command that runs the job of an index."""
    options = "\n".join(f"#SBATCH {line}" for line in sbatch_options(batch, count, settings, previous))
    runner = shlex.join([sys.executable, "-m", "qlora.sweep.slurm_job"])
    setup = "".join(f"{line}\n" for line in settings.setup)
    return f'#!/bin/bash\n{options}\n{setup}exec {runner} {shlex.quote(str(batch))}/"$SLURM_ARRAY_TASK_ID".json\n'


def sbatch_options(batch: Path, count: int, settings: SlurmSettings, previous: str | None) -> Iterator[str]:
    """Yields the options of `sbatch`, each as it stands in the script."""
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


def largest_array() -> int:
    """Returns how many jobs SLURM takes in one array."""
    try:
        text = _ask("scontrol", "show", "config")
    except subprocess.SubprocessError as error:
        raise ConfigError(
            f"SLURM does not answer ({_complaint(error)}); start the command where `squeue` works"
        ) from error
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", text, re.MULTILINE)
    return max(int(match[1]), 1) if match else 1000


def read_queue() -> dict[str, Queued]:
    """Returns the user's jobs that wait or run, by their names in SLURM; raises `SubprocessError` without an answer."""
    text = _ask("squeue", "--noheader", f"--user={os.getuid()}", "--array", "--format=%i|%T|%r|%N")
    fields = [line.strip().split("|") for line in text.splitlines() if line.count("|") == 3]
    return {name: Queued(state, reason, node) for name, state, reason, node in fields}


def _ask(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except OSError as error:
        raise subprocess.SubprocessError(str(error)) from error


def _complaint(error: subprocess.SubprocessError) -> str:
    told = (getattr(error, "stderr", None) or "").strip().splitlines()
    return told[-1] if told else shorten(" ".join(str(error).split()), 200)


def record_end(folder: Path, name: str) -> Job:
    """Returns how a job ended that is no longer in the queue, and records what it could not record itself."""
    how = last_state(name)
    end = time.monotonic() + FILE_SECONDS
    job = read_job(folder)
    while how.get("JobState") == "COMPLETED" and job.status not in FINAL and time.monotonic() < end:
        time.sleep(0.5)
        job = read_job(folder)
    if job.status in FINAL:
        write_status(folder, job.status, **{SUBMITTED: None})
        return read_job(folder)
    status, reason = _explained(how, job)
    write_status(folder, status, reason=reason, **{SUBMITTED: None})
    return read_job(folder)


def last_state(name: str) -> dict[str, str]:
    """Returns what SLURM still knows of a job that has ended: `JobState`, `ExitCode`, `BatchHost`; empty: nothing."""
    try:
        text = _ask("scontrol", "show", "job", "--oneliner", name)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)
    except subprocess.SubprocessError:
        pass
    try:
        text = _ask("sacct", "--jobs", name, "--noheader", "--parsable2", "--allocations",
                    "--format=State,ExitCode,NodeList")  # fmt: skip
    except subprocess.SubprocessError:  # a cluster without accounting
        return {}
    state, code, node = ([*text.splitlines()[-1].split("|"), "", "", ""] if text.strip() else ["", "", ""])[:3]
    return {"JobState": state.partition(" ")[0], "ExitCode": code, "BatchHost": node} if state else {}


def _explained(how: Mapping[str, str], job: Job) -> tuple[Status, str]:
    """Returns the status of a job without an end of its own, and the reason in one line."""
    state, code, node = how.get("JobState", ""), how.get("ExitCode", ""), how.get("BatchHost") or how.get("NodeList")
    began = (job.folder / OUTPUT).exists()
    where = f" on {node}" if node and node != "(null)" else ""
    if state in ("CANCELLED", "DEADLINE", "REVOKED"):
        return Status.interrupted, f"cancelled in SLURM{where}" + ("" if began else " before it began")
    if job.reason is not None and job.reason.startswith("timed out"):
        return Status.interrupted, job.reason
    if not state and job.status is Status.interrupted and job.reason is not None:  # SLURM has forgotten it
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
    told = f" as {state}, exit code {code.partition(':')[0]}" if state else ""
    if _killed_by(code):
        told += f", killed by signal {_killed_by(code)}"
    if not began:
        return Status.failed, (
            f"ended in SLURM{told}{where} before it began: {job.folder.parent} and this Python must be there on every "
            "node"
        )
    return Status.failed, f"ended in SLURM{told}{where} and without a result"


def _killed_by(code: str) -> int:
    number = code.partition(":")[2]
    return int(number) if number.isdigit() else 0


def _refused(told: str, settings: SlurmSettings) -> ConfigError:
    text = "; ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in told.strip().splitlines())
    keys = ("gpus_per_node", "gres", "cpus_per_task", "mem_gb", "constraint", "partition")
    asked = ", ".join(f"{key}={value}" for key in keys if (value := getattr(settings, key)) is not None)
    unfit = any(word in text.lower() for word in ("generic resource", "gres", "node configuration", "feature"))
    hint = f"; no node has what is asked for: {asked} (of hydra.launcher; gpus_per_node=null for none)" if unfit else ""
    return ConfigError(
        f"SLURM refused the jobs: {text or 'sbatch said nothing'}{hint}; docs/clusters.md lists the keys"
    )


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} {'job' if len(names) == 1 else 'jobs'}"


def _ranges(names: Iterator[str] | Sequence[str] | Mapping[str, Job], separator: str = ", ") -> str:
    """Returns names of SLURM's as it takes them: `12_[0-3,7], 13_0`."""
    arrays: dict[str, list[int]] = {}
    for name in names:
        array, _, index = name.partition("_")
        arrays.setdefault(array, []).append(int(index))
    return separator.join(f"{array}_{_joined(sorted(indices))}" for array, indices in arrays.items())


def _joined(indices: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return texts[0] if texts == [str(indices[0])] else f"[{','.join(texts)}]"
