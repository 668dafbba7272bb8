"""What SLURM starts on a node for a job of a sweep: `python -m qlora.sweep.slurm_job RECORD`.

It runs the job's command, passes signals on to it, records an end that the job could not record itself, and requeues
a job that was warned of its time limit.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Set
from pathlib import Path

from qlora.runtime.atomic_files import read_json
from qlora.runtime.sweep_job import SweepJob
from qlora.sweep.job_processes import describe_exit
from qlora.sweep.jobs import STATUS_FILE, Status, read_job, write_status

WARNING = signal.SIGUSR1
"""The signal that SLURM sends before it ends a job that runs out of time."""
TIMEOUTS = "timeouts"
"""The key of a job's status that counts how often it ran out of time since it was submitted."""
POLL_SECONDS = 0.2
MAX_EARLY = 65.0
"""How many seconds too early a warning may come: SLURM looks for jobs to warn at least once a minute."""
FINAL = (Status.finished, Status.pruned, Status.failed)


def main(record: Path) -> int:
    """Runs the job that `record` describes, and returns the exit code for SLURM."""
    task = json.loads(record.read_text(encoding="utf-8"))
    folder = Path(task["folder"])
    received: set[int] = set()
    for number in (WARNING, signal.SIGTERM):
        signal.signal(number, lambda number, frame: received.add(number))
    overrides = (read_json(folder / STATUS_FILE) or {}).get("overrides", [])
    sweep = SweepJob.environment(folder.parent.name, overrides)
    environment = {**_threads(), **os.environ, **sweep, **task["environment"]}
    process = subprocess.Popen(task["command"], stdin=subprocess.DEVNULL, env=environment)
    code = _wait(process, received, task["signal_delay_s"])
    if read_job(folder).status in FINAL:
        return code
    if WARNING in received and signal.SIGTERM not in received:
        return _queue_again(folder, task)
    if signal.SIGTERM in received:
        write_status(folder, Status.interrupted, reason="ended by SLURM (SIGTERM)")
    elif read_job(folder).reason != "interrupted":
        write_status(folder, Status.failed, reason=describe_exit(code))
    return code if code > 0 else 128 - code


def _wait(process: subprocess.Popen[bytes], received: Set[int], delay: float) -> int:
    """Waits for the job's process and passes signals on, a warning that came early when it is due."""
    sent: set[int] = set()
    due: float | None = None
    while process.poll() is None:
        if WARNING in received and due is None:
            due = time.monotonic() + seconds_early(delay)
        for number in received - sent:
            if number != WARNING or (due is not None and time.monotonic() >= due):
                sent.add(number)
                process.send_signal(number)
        time.sleep(POLL_SECONDS)
    return process.returncode


def seconds_early(delay: float) -> float:
    """Returns how long before its time a warning came: SLURM sends it up to a minute early, which a job may still use.

    A warning that is no matter of time, such as one by `scancel`, is never early.
    """
    ask = ["squeue", "--noheader", f"--jobs={_name()}", "--format=%L"]
    try:
        text = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return 0.0
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)", text)
    if match is None:  # no limit
        return 0.0
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    early = seconds + 60 * (minutes + 60 * (hours + 24 * days)) - delay
    return early if 0 < early <= MAX_EARLY else 0.0


def _name() -> str:
    return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"


def _threads() -> dict[str, str]:
    """Returns how many threads the job may start, where the cluster does not confine it to its CPUs."""
    count = os.environ.get("SLURM_CPUS_PER_TASK")
    return {} if count is None else {"OMP_NUM_THREADS": count}


def _queue_again(folder: Path, task: Mapping[str, int]) -> int:
    count = (read_json(folder / STATUS_FILE) or {}).get(TIMEOUTS, 0) + 1
    limit, minutes = task["max_num_timeout"], task["timeout_min"]
    if count > limit:
        reason = (
            f"timed out {count} times after hydra.launcher.timeout_min={minutes} minutes, which "
            f"hydra.launcher.max_num_timeout={limit} allows"
            if limit
            else f"timed out: hydra.launcher.timeout_min={minutes} minutes are over, and "
            "hydra.launcher.max_num_timeout=0 queues no job again"
        )
        write_status(folder, Status.interrupted, reason=reason, **{TIMEOUTS: count})
        return os.EX_TEMPFAIL
    reason = f"queued again after {count} of {limit + 1} allocations"
    write_status(folder, Status.queued, reason=reason, **{TIMEOUTS: count})
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which SLURM ends this allocation
    done = subprocess.run(["scontrol", "requeue", _name()], capture_output=True, text=True, check=False)
    if done.returncode:
        complaint = " ".join(done.stderr.split())
        write_status(folder, Status.interrupted, reason=f"timed out, and SLURM does not queue it again: {complaint}")
        return os.EX_TEMPFAIL
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
