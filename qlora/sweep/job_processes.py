"""Runs each job as a process, one for each slot at a time; a slot has its own GPUs."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qlora.errors import ResourceError, Stopped
from qlora.runtime.run_folder import RunFolder
from qlora.runtime.sweep_job import SweepJob
from qlora.sweep.jobs import Job, Status, read_job, write_status

OUTPUT, ERRORS = "stdout.log", "stderr.log"
POLL_SECONDS = 0.1
ASK_SECONDS = 2.0
"""How long a free slot waits before it asks for a task again."""
GRACE_SECONDS = 30.0
"""How long a job has to end by itself after an interruption."""
TAIL_LINES = 8

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Task:
    """A job and the command that starts it."""

    job: Job
    command: list[str]
    environment: Mapping[str, str]


class RunTasks(Protocol):
    """An engine: it runs tasks until `next_task` has none left, all have ended, and no more `may_come`."""

    def __call__(
        self,
        next_task: Callable[[], Task | None],
        *,
        on_start: Callable[[Job], None],
        on_end: Callable[[Job], None],
        on_wait: Callable[[list[Job]], None],
        may_come: Callable[[], bool] = lambda: False,
    ) -> None:
        """Reports each start and end, and several times a second the jobs that run or wait again after they ran."""


@dataclass
class _Process:
    task: Task
    slot: dict[str, str]
    popen: subprocess.Popen[bytes]
    started: float


def visible_gpus() -> list[str]:
    """Returns the GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them, without loading a library."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split() if done.returncode == 0 else []


def build_slots(n_jobs: int | None, gpus_per_job: int, *, on_cpu: bool) -> list[dict[str, str]]:
    """Returns the environment of each slot: its GPUs, or its fraction of the cores.

    Raises a `UserError` if there are fewer GPUs than a job needs.
    """
    gpus = [] if on_cpu else visible_gpus()
    if not gpus:
        if gpus_per_job > 1:
            raise ResourceError(f"hydra.launcher.gpus_per_job={gpus_per_job}, but no GPU is visible here; leave it out")
        count = n_jobs or 1
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Threads of several jobs that wait for each other on one core take many times as long.
        shared = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(cores // count, 1)))}
        return [shared if count > 1 else {} for _ in range(count)]
    if gpus_per_job > len(gpus):
        raise ResourceError(
            f"hydra.launcher.gpus_per_job={gpus_per_job}, but {len(gpus)} GPU{'s are' if len(gpus) > 1 else ' is'} "
            f"visible here ({', '.join(gpus)}); lower it, or set CUDA_VISIBLE_DEVICES"
        )
    sets = [gpus[start : start + gpus_per_job] for start in range(0, len(gpus) - gpus_per_job + 1, gpus_per_job)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names)} for names in sets[: n_jobs or len(sets)]]


def run_tasks(
    next_task: Callable[[], Task | None],
    slots: list[dict[str, str]],
    *,
    on_start: Callable[[Job], None],
    on_end: Callable[[Job], None],
    on_wait: Callable[[list[Job]], None],
    may_come: Callable[[], bool] = lambda: False,
) -> None:
    """Runs tasks until `next_task` has none left, all have ended, and no more `may_come` from elsewhere.

    `on_wait` gets the running jobs with their progress several times a second. On an interruption all jobs are
    interrupted too and have half a minute to end; then the interruption is raised again.
    """
    free, running = list(slots), list[_Process]()
    empty, asked = False, 0.0
    with terminable():
        try:
            while running or not empty or may_come():
                if empty and free and time.monotonic() - asked > ASK_SECONDS:
                    empty = False
                while free and not empty:
                    task, asked = next_task(), time.monotonic()
                    if task is None:
                        empty = True
                    else:
                        slot = free.pop(0)
                        running.append(_start(task, slot))
                        on_start(task.job)
                for process in [process for process in running if process.popen.poll() is not None]:
                    running.remove(process)
                    free.append(process.slot)
                    on_end(_ended(process))
                    empty = False  # a job that ended may make room for another
                if running:
                    on_wait([read_job(process.task.job.folder) for process in running])
                if running or empty:
                    time.sleep(POLL_SECONDS)
        finally:
            _stop(running)
            for process in running:
                on_end(_ended(process, interrupted=True))


def _start(task: Task, slot: dict[str, str]) -> _Process:
    folder = task.job.folder
    sweep = SweepJob.environment(folder.parent.name, task.job.overrides)
    folder.mkdir(parents=True, exist_ok=True)
    write_status(folder, Status.queued, overrides=task.job.overrides, reason=None)
    RunFolder(folder).progress.unlink(missing_ok=True)  # of an earlier start
    popen = start_job(task.command, folder, {**sweep, **task.environment, **slot})
    return _Process(task, slot, popen, time.monotonic())


def start_job(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], cwd: Path | None = None
) -> subprocess.Popen[bytes]:
    """Starts the process of a job, which writes to the logs in its folder and dies with this process."""
    with (folder / OUTPUT).open("ab") as output, (folder / ERRORS).open("ab") as errors:
        return subprocess.Popen(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env={**os.environ, **environment},
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the others in order
            preexec_fn=functools.partial(_die_with, os.getpid()),
        )


def _die_with(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a sweep that a shell started in the background ignores it
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent has died already, so no signal will come
            os.kill(os.getpid(), signal.SIGKILL)


def _ended(process: _Process, *, interrupted: bool = False) -> Job:
    seconds = time.monotonic() - process.started
    return record_end(process.task.job.folder, None if interrupted else process.popen.returncode, seconds)


def record_end(folder: Path, code: int | None, seconds: float) -> Job:
    """Returns a job whose process has ended, and records its end if it could not do so itself.

    `code` is the exit code of the process; None: it was interrupted.
    """
    job = read_job(folder)
    if job.status in (Status.finished, Status.pruned, Status.failed) or code == Stopped.exit_code:
        return job
    if code is None:
        write_status(folder, Status.interrupted, reason="interrupted", seconds=seconds)
    else:
        write_status(folder, Status.failed, reason=describe_exit(code), seconds=seconds)
    return read_job(folder)


def describe_exit(code: int) -> str:
    """Returns in one line why a process ended without a result."""
    if code == -signal.SIGKILL:
        return "killed (SIGKILL): the system does so when memory runs out"
    if code < 0:
        return f"killed ({signal.Signals(-code).name})"
    return f"ended with exit code {code} and without a result"


def tail(folder: Path) -> list[str]:
    """Returns the last lines that a job wrote to its errors, or to its output if there are none."""
    for name in (ERRORS, OUTPUT):
        path = folder / name
        if path.is_file() and (text := path.read_bytes()[-8192:].decode("utf-8", "replace").strip()):
            return [line for line in text.replace("\r", "\n").splitlines() if line.strip()][-TAIL_LINES:]
    return []


def _stop(running: list[_Process]) -> None:
    for process in running:
        _signal(process.popen, signal.SIGINT)
    end = time.monotonic() + GRACE_SECONDS
    for process in running:
        _wait_and_kill(process.popen, end)


def stop_group(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Ends a process as Ctrl-C does; after `seconds` it is killed with every process that it started."""
    if process.poll() is None:
        _signal(process, signal.SIGINT)
    _wait_and_kill(process, time.monotonic() + seconds)


def _wait_and_kill(process: subprocess.Popen[bytes], end: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(end - time.monotonic(), 0.1))
    _signal(process, signal.SIGKILL)  # every process that it started, too
    process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Lets SIGTERM and SIGUSR1 end the block as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
