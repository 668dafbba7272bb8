"""Jobs of a sweep on a Ray cluster: each a process of its own on a node that has what a job needs."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import services, worker
from ray.exceptions import GetTimeoutError, RayError, RayTaskError, TaskCancelledError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qlora.errors import ConfigError, UserError
from qlora.runtime.console import ON_SCREEN, say
from qlora.runtime.run_folder import RunFolder
from qlora.runtime.sweep_job import SweepJob
from qlora.sweep.engine_config import RaySettings
from qlora.sweep.job_processes import GRACE_SECONDS, Task, record_end, start_job, stop_group, terminable
from qlora.sweep.jobs import Job, Status, read_job, write_status
from qlora.text import shorten

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
END_SECONDS = 0.1
"""A node looks so often whether its job has ended."""
CONNECT_SECONDS = 30.0
CHECK_SECONDS = 300.0
"""A node that has not answered by then is not there."""
LOST_SECONDS = 30.0
"""Ray, as it is set up by itself, calls a node lost whose daemon was killed after 15 seconds."""
FILE_SECONDS = 15.0
"""What a node wrote may be seen so much later here."""
PASSED_ON = ("QLORA_TRUSTED", "HYDRA_FULL_ERROR")
"""Variables that belong to the command; all others are those of the node."""
QUIET = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"}
"""Variables that keep Ray from notes about its own settings, and from sending counts of its use."""


@dataclass
class _Running:
    task: Task
    started: float
    is_seen: bool = False
    """Whether it was told that the job runs; until then Ray looks for a node."""


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

    An interruption ends the running jobs in order. Raises `ConfigError` for a cluster that cannot run them.
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
                        _check_nodes(settings, task.job.folder.parent.absolute())
                        checked = True
                    running[_submit(start, task)] = _Running(task, time.monotonic())
                if not running:
                    if not may_come():
                        return
                    time.sleep(POLL_SECONDS)
                    continue
                done, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
                for reference in done:
                    _tell_end(reference, running.pop(reference), on_start, on_end)
                on_wait(list(_seen(running, on_start)))
        except BaseException:
            _interrupt(running, on_start, on_end)
            raise


@contextlib.contextmanager
def _connected(settings: RaySettings) -> Iterator[None]:
    """Joins a cluster, or starts one on this machine, for the time of the block."""
    given: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    init = {key: value for key, value in settings.ray.init.items() if key != "address"}
    address = settings.ray.init.get("address")
    if address is None:
        address = "local"  # None would join whatever runs here
        given["include_dashboard"] = False  # a cluster that is joined has its own
    # Ray prints what its daemons say of a lost node, their last 20 lines, whatever `log_to_driver` says.
    printed, worker.print_to_stdstream = worker.print_to_stdstream, _log
    try:
        os.environ |= {name: os.environ.get(name, value) for name, value in QUIET.items()}
        if address == "auto":
            address = services.get_ray_address_from_environment(address, None)
        _knock(address)
        ray.init(address, **{**given, **init})
    except (RayError, ConnectionError, ValueError, RuntimeError, TypeError, OSError) as error:
        text = shorten(" ".join(str(error).split()), 300)
        raise ConfigError(
            f"hydra.launcher.ray.init={dict(settings.ray.init)}: Ray cannot be reached or started ({text}); start one "
            "with `ray start --head`, or leave hydra.launcher.ray.init.address out for a Ray of this machine alone"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
        worker.print_to_stdstream = printed


def _knock(address: Any) -> None:
    """Raises `ConnectionError` where nobody listens at HOST:PORT; Ray itself would go on trying for minutes."""
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
    # The first word is this machine's Python; a node has its own.
    return start.remote(task.command[1:], str(folder), str(Path.cwd()), {**passed, **sweep, **task.environment})


def run_job(command: list[str], folder_name: str, cwd: str, environment: Mapping[str, str]) -> int:
    """Runs a job as a process on the node that Ray has chosen, and returns its exit code.

    Raises `ConfigError` where the node does not see the job's folder, or the folder where the command was typed.
    """
    folder, host = Path(folder_name), socket.gethostname()
    for path in (folder, Path(cwd)):
        if not path.is_dir():
            raise ConfigError(unshared(path, host))
    write_status(folder, Status.queued, node=host)
    # Ray blocks the signal of Ctrl-C in its processes; a job, which gets it at an interruption, would inherit that.
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        process = start_job([sys.executable, *command], folder, environment, Path(cwd))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    try:
        while (code := process.poll()) is None:
            time.sleep(END_SECONDS)  # Ray cancels a task by an exception, which cannot break off `wait`
        return code
    finally:
        stop_group(process, GRACE_SECONDS)


def unshared(folder: Path, host: str) -> str:
    """Says that a node does not see a folder, and the way out."""
    return (
        f"{folder} is not seen on {host}: a sweep on several nodes needs a folder that all of them share; start the "
        "command in one, or name one with hydra.sweep.dir=FOLDER"
    )


def _is_seen(folder: str, token: str) -> bool:
    return (Path(folder) / token).is_file()


def _check_nodes(settings: RaySettings, folder: Path) -> None:
    """Raises `ConfigError` where no node can run a job, or where one does not see the sweep's folder."""
    needed = _resources(settings.ray.remote)
    token = f".shared-{uuid.uuid4().hex}"
    look = ray.remote(num_cpus=0, max_retries=0)(_is_seen)
    (folder / token).touch()
    try:
        asked = []
        for node in _able_nodes(needed):
            strategy = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            asked.append((node, look.options(scheduling_strategy=strategy).remote(str(folder), token)))
        end = time.monotonic() + CHECK_SECONDS
        for node, reference in asked:
            if not _answer(node, reference, max(end - time.monotonic(), 0)):
                raise ConfigError(unshared(folder, node["NodeManagerHostname"]))
    finally:
        (folder / token).unlink(missing_ok=True)
    _able_nodes(needed)  # those that were lost meanwhile do not count


def _able_nodes(needed: Mapping[str, float]) -> list[dict[str, Any]]:
    """Returns the nodes that have what a job needs; raises `ConfigError` where there is none."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    able = [node for node in nodes if all(node["Resources"].get(name, 0) >= value for name, value in needed.items())]
    if able:
        return able
    listed = ", ".join(f"{name}={value:g}" for name, value in needed.items())
    largest = {name: max((node["Resources"].get(name, 0) for node in nodes), default=0) for name in needed}
    best = ", ".join(f"{value:g} {name}" for name, value in largest.items())
    hint = "; hydra.launcher.ray.remote.num_gpus=0 for jobs on CPUs" if needed.get("GPU") else ""
    raise ConfigError(
        f"hydra.launcher.ray.remote asks for {listed} on one node, and none of the {len(nodes)} nodes has them all "
        f"(at most {best}){hint}"
    )


def _answer(node: Mapping[str, Any], reference: Any, seconds: float) -> bool:
    """Returns whether a node sees the sweep's folder, or is lost and will get no job; raises `ConfigError`."""
    host = node["NodeManagerHostname"]
    try:
        is_seen: bool = ray.get(reference, timeout=seconds)
    except GetTimeoutError as error:
        raise ConfigError(
            f"{host} of the Ray cluster does not answer within {CHECK_SECONDS:.0f} s; `ray status` shows the nodes"
        ) from error
    except RayTaskError as error:
        raise ConfigError(
            f"{host} of the Ray cluster cannot run qlora ({_last_line(error)}); install the same version on each node"
        ) from error
    except RayError as error:
        if not _is_lost(node["NodeID"]):
            raise ConfigError(
                f"{host} of the Ray cluster starts no process ({_last_line(error)}); the logs of Ray on it, below "
                "/tmp/ray/session_latest/logs, tell why"
            ) from error
        return True
    return is_seen


def _is_lost(node_id: str) -> bool:
    """Returns whether a node that gave an error is lost, which Ray itself may find out a while later."""
    end = time.monotonic() + LOST_SECONDS
    while any(node["Alive"] for node in ray.nodes() if node["NodeID"] == node_id):
        if time.monotonic() > end:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _last_line(error: RayError) -> str:
    return shorten((str(error).strip() or type(error).__name__).splitlines()[-1], 300)


def _resources(remote: Mapping[str, Any]) -> dict[str, float]:
    own = {"CPU": remote.get("num_cpus", 1), "GPU": remote.get("num_gpus", 0), "memory": remote.get("memory", 0)}
    return {name: float(value) for name, value in {**own, **(remote.get("resources") or {})}.items() if value}


def _seen(running: Mapping[Any, _Running], on_start: Callable[[Job], None]) -> Iterator[Job]:
    """Yields the jobs that run on a node, and tells of each when it is seen to run for the first time."""
    for each in running.values():
        stored = read_job(each.task.job.folder)
        if not each.is_seen and (stored.status is not Status.queued or stored.node):
            each.is_seen = True
            each.started = time.monotonic()
            say(f"runs on {stored.node}: {' '.join(stored.overrides) or stored.name}")
            on_start(each.task.job)
        if each.is_seen:
            stored.status = Status.running  # so says Ray; a lock may not be seen from here
            yield stored


def _tell_end(reference: Any, ended: _Running, on_start: Callable[[Job], None], on_end: Callable[[Job], None]) -> None:
    if not ended.is_seen:
        on_start(ended.task.job)
    on_end(_end_of(reference, ended))


def _end_of(reference: Any, ended: _Running) -> Job:
    """Returns what became of a job whose task has ended, and records what it could not record itself."""
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
    for reference, each in running.items():
        if each.is_seen:
            on_end(_interrupted(reference, each))
        else:
            write_status(each.task.job.folder, Status.queued, reason=None)


def _interrupted(reference: Any, each: _Running) -> Job:
    job = read_job(each.task.job.folder)
    return job if job.status is not Status.running else record_end(job.folder, None, time.monotonic() - each.started)
