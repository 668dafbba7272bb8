"""Jobs of a sweep on a Ray cluster: each job is a process on a node that has the resources for it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError, TaskCancelledError

from qlora.errors import ConfigError, ResourceError, UserError
from qlora.runtime.console import ON_SCREEN, say
from qlora.runtime.run_folder import RunFolder
from qlora.runtime.sweep_job import SweepJob
from qlora.sweep.engine_config import RaySettings
from qlora.sweep.job_processes import GRACE_SECONDS, Task, record_end, start_job, stop_group, terminable
from qlora.sweep.jobs import Job, Status, read_job, write_status
from qlora.sweep.ray_nodes import check_nodes, unshared
from qlora.text import shorten
from qlora.upstream.ray import printing_to, running_address

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
END_SECONDS = 0.1
"""How often a node checks whether its job has ended."""
CONNECT_SECONDS = 30.0
FILE_SECONDS = 15.0
"""How much later a file that a node wrote may be visible here."""
PASSED_ON = ("QLORA_TRUSTED", "HYDRA_FULL_ERROR")
"""Variables that are passed from the command to a job; all others are those of the node."""
QUIET = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"}
"""Variables that keep Ray from printing notes about its settings and from sending usage statistics."""


@dataclass
class _Running:
    task: Task
    started: float
    is_seen: bool = False
    """Whether the start was reported; until then Ray looks for a node."""


def run_on_ray(
    settings: RaySettings,
    room: int | None,
    next_task: Callable[[], Task | None],
    *,
    on_start: Callable[[Job], None],
    on_end: Callable[[Job], None],
    on_wait: Callable[[list[Job]], None],
    may_come: Callable[[], bool] = lambda: False,
) -> None:
    """Runs tasks until `next_task` has none left and all have ended, at most `room` of them at a time.

    An interruption ends the running jobs in order. Raises a `UserError` for a cluster that cannot run them.
    """
    with _connected(settings), terminable():
        start = _remote(settings)
        running: dict[Any, _Running] = {}
        checked = False
        try:
            while True:
                while room is None or len(running) < room:
                    task = next_task()
                    if task is None:
                        break
                    if not checked:
                        check_nodes(settings, task.job.folder.parent.absolute())
                        checked = True
                    running[_submit(start, task)] = _Running(task, time.monotonic())
                if not running:
                    if not may_come():
                        return
                    time.sleep(POLL_SECONDS)
                    continue
                done, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
                for reference in done:
                    _report_end(reference, running.pop(reference), on_start, on_end)
                on_wait(list(_seen(running, on_start)))
        except BaseException:
            _interrupt(running, on_start, on_end)
            raise


@contextlib.contextmanager
def _connected(settings: RaySettings) -> Iterator[None]:
    """Joins a cluster, or starts one on this machine, while the block runs."""
    given: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    init = {key: value for key, value in settings.ray.init.items() if key != "address"}
    address = settings.ray.init.get("address")
    if address is None:
        address = "local"  # None would join any cluster that runs here
        given["include_dashboard"] = False  # a cluster that is joined has its own
    with printing_to(_log):
        try:
            os.environ |= {name: os.environ.get(name, value) for name, value in QUIET.items()}
            if address == "auto":
                address = running_address()
            _check_listening(address)
            ray.init(address, **{**given, **init})
        except (RayError, ConnectionError, ValueError, RuntimeError, TypeError, OSError) as error:
            text = shorten(" ".join(str(error).split()), 300)
            raise ResourceError(
                f"hydra.launcher.ray.init={dict(settings.ray.init)}: Ray cannot be reached or started ({text}); start "
                "one with `ray start --head`, or leave hydra.launcher.ray.init.address out for a Ray of this machine "
                "alone"
            ) from error
        try:
            yield
        finally:
            ray.shutdown()


def _check_listening(address: Any) -> None:
    """Raises `ConnectionError` if nothing listens at HOST:PORT; Ray itself would keep trying for minutes."""
    match = re.fullmatch(r"([\w.-]+):(\d+)", str(address))
    if match is None:
        return
    try:
        socket.create_connection((match[1], int(match[2])), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ConnectionError(f"nothing answers at {address}: {error.strerror or error}") from error


def _log(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    log.info("Ray's %s: %s", data.get("pid"), "\n".join(data["lines"]), extra=ON_SCREEN)


def _remote(settings: RaySettings) -> Any:
    try:
        return ray.remote(**{"num_cpus": 1, **settings.ray.remote, "max_retries": 0})(run_job)
    except (ValueError, TypeError, AssertionError) as error:
        text = shorten(" ".join(str(error).split()), 300)
        raise ConfigError(f"hydra.launcher.ray.remote={dict(settings.ray.remote)}: {text}") from error


def _submit(start: Any, task: Task) -> Any:
    folder = task.job.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    write_status(folder, Status.queued, overrides=task.job.overrides, reason=None, node=None)
    RunFolder(folder).progress.unlink(missing_ok=True)  # of an earlier start
    sweep = SweepJob.environment(folder.parent.name, task.job.overrides)
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    # The first argument is this machine's Python; a node has its own.
    return start.remote(task.command[1:], str(folder), str(Path.cwd()), {**passed, **sweep, **task.environment})


def run_job(command: list[str], folder_name: str, cwd: str, environment: Mapping[str, str]) -> int:
    """Runs a job as a process on the node that Ray has chosen, and returns its exit code.

    Raises `ResourceError` if the node does not see the folder of the job or of the command.
    """
    folder, host = Path(folder_name), socket.gethostname()
    for path in (folder, Path(cwd)):
        if not path.is_dir():
            raise ResourceError(unshared(path, host))
    write_status(folder, Status.queued, node=host)
    # Ray blocks SIGINT in its processes. A job must receive it at an interruption and would inherit the block.
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        process = start_job([sys.executable, *command], folder, environment, Path(cwd))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    try:
        while (code := process.poll()) is None:
            time.sleep(END_SECONDS)  # Ray cancels a task by an exception, which cannot interrupt `wait`
        return code
    finally:
        stop_group(process, GRACE_SECONDS)


def _seen(running: Mapping[Any, _Running], on_start: Callable[[Job], None]) -> Iterator[Job]:
    """Yields the jobs that run on a node, and reports each job the first time that it is seen to run."""
    for started in running.values():
        job = read_job(started.task.job.folder)
        if not started.is_seen and (job.status is not Status.queued or job.node):
            started.is_seen = True
            started.started = time.monotonic()
            say(f"runs on {job.node}: {' '.join(job.overrides) or job.name}")
            on_start(started.task.job)
        if started.is_seen:
            job.status = Status.running  # Ray says so; the lock may not be visible here
            yield job


def _report_end(
    reference: Any, ended: _Running, on_start: Callable[[Job], None], on_end: Callable[[Job], None]
) -> None:
    if not ended.is_seen:
        on_start(ended.task.job)
    on_end(_end_of(reference, ended))


def _end_of(reference: Any, ended: _Running) -> Job:
    """Returns a job whose task has ended, and records its end if it could not do so itself."""
    folder, seconds = ended.task.job.folder, time.monotonic() - ended.started
    try:
        code = ray.get(reference)
    except TaskCancelledError:
        return record_end(folder, None, seconds)
    except RayTaskError as error:
        cause = error.cause
        text = str(cause) if isinstance(cause, UserError) else f"{type(cause).__name__}: {cause}"
        write_status(folder, Status.failed, reason=shorten(" ".join(text.split()), 500), seconds=seconds)
        return read_job(folder)
    except RayError as error:
        job = read_job(folder)
        if job.status not in (Status.finished, Status.pruned, Status.failed):
            where = f" {job.node}" if job.node else ""
            reason = f"its node{where} or its worker was lost ({type(error).__name__})"
            write_status(folder, Status.interrupted, reason=reason, seconds=seconds)
        return read_job(folder)
    end = time.monotonic() + FILE_SECONDS
    while code == 0 and read_job(folder).status is Status.running and time.monotonic() < end:
        time.sleep(0.2)
    return record_end(folder, code, seconds)


def _interrupt(running: dict[Any, _Running], on_start: Callable[[Job], None], on_end: Callable[[Job], None]) -> None:
    """Ends all jobs as Ctrl-C does, and waits until they have saved what they can."""
    with contextlib.suppress(RayError):
        for reference in running:
            ray.cancel(reference, force=False)
        ray.wait(list(running), num_returns=len(running), timeout=GRACE_SECONDS + 5) if running else None
    for started in running.values():
        if started.is_seen:
            on_end(_interrupted(started))
        else:
            write_status(started.task.job.folder, Status.queued, reason=None)


def _interrupted(started: _Running) -> Job:
    job = read_job(started.task.job.folder)
    return job if job.status is not Status.running else record_end(job.folder, None, time.monotonic() - started.started)
