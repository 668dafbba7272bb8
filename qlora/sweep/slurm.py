"""Jobs of a sweep on a SLURM cluster: submitted as arrays, followed until they end, recognised by the same command."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.text import Text

from qlora.runtime.atomic_files import read_json, write_text
from qlora.runtime.console import printable, say
from qlora.sweep.engine_config import SlurmSettings
from qlora.sweep.job_processes import Task, terminable
from qlora.sweep.jobs import STATUS_FILE, SUBMITTED, Job, Status, read_job, write_status
from qlora.sweep.slurm_batch import BATCHES, array_number, new_batch, prepare_job, script_text, submitted_name
from qlora.sweep.slurm_client import (
    Queued,
    check_programs,
    describe_error,
    describe_refusal,
    max_array_size,
    read_queue,
    record_end,
)
from qlora.sweep.slurm_job import TIMEOUTS
from qlora.text import shorten

POLL_SECONDS, MAX_POLL_SECONDS = 1.0, 15.0
"""How often SLURM is asked for the queue, at the beginning and later."""
MAX_LABEL = 100
MAX_LISTED = 20
"""How many jobs are printed with a line each."""
USUAL = {"None", "Priority", "Resources", "BeginTime", "JobArrayTaskLimit", "Dependency", "Cleaning"}
"""Reasons of jobs that will start by themselves."""


class SlurmJobs:
    """Submits jobs and follows them."""

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
        """The submitted jobs that have not ended, by SLURM's names such as `12_0`."""
        self._started: set[str] = set()
        self._timeouts: dict[str, int] = {}
        self._stuck: dict[str, str] = {}
        self._answers = True

    def run(self, next_task: Callable[[], Task | None], room: int | None) -> None:
        """Runs tasks until `next_task` has none left and all have ended, at most `room` of them at a time.

        With `detach` it returns when all are submitted. After an interruption the jobs stay in the queue.
        """
        check_programs()
        with terminable():
            try:
                delay = POLL_SECONDS
                while True:
                    self._fill(next_task, room)  # repeatedly: a job that ended may make room for another
                    if not self._jobs and not self._may_come():
                        return
                    ended = self._look()
                    if self.detach:
                        break
                    if ended:
                        delay = POLL_SECONDS
                        continue
                    self._wait(delay)
                    delay = min(1.2 * delay, MAX_POLL_SECONDS)
            except KeyboardInterrupt:
                self._print_rest()
                raise
        if self._jobs:
            self._print_rest()

    def _fill(self, next_task: Callable[[], Task | None], room: int | None) -> None:
        """Takes tasks while there is room: submits new ones, and follows those that SLURM has already."""
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
        size = max_array_size() if fresh else 1
        previous: str | None = None
        for start in range(0, len(fresh), size):
            previous = self._submit(fresh[start : start + size], previous)

    def _submit(self, tasks: Sequence[Task], previous: str | None) -> str:
        """Submits an array that begins when the `previous` one has ended; returns its number."""
        folder = tasks[0].job.folder.parent.absolute()
        batch = new_batch(folder / BATCHES)
        for index, task in enumerate(tasks):
            prepare_job(batch, index, task, self.settings)
        script = batch / "job.sh"
        write_text(script, script_text(batch, len(tasks), self.settings, previous))
        with (batch / "id").open("wb") as file:  # sbatch itself writes it, so no running job is ever lost
            done = subprocess.run(
                ["sbatch", "--parsable", str(script)], stdout=file, stderr=subprocess.PIPE, check=False
            )
        if done.returncode:
            for task in tasks:
                write_status(task.job.folder, Status.queued, **{SUBMITTED: None})
            raise describe_refusal(done.stderr.decode("utf-8", "replace"), self.settings)
        number = array_number(batch)
        assert number is not None, batch
        names = [f"{number}_{index}" for index in range(len(tasks))]
        say(f"submitted {_count(names)} to SLURM: {_ranges(names)}")
        for name, task in zip(names[:MAX_LISTED], tasks, strict=False):
            say(f"  {name}  {_label(task.job)}")
        if len(tasks) > MAX_LISTED:
            say(f"  ... and {len(tasks) - MAX_LISTED} more; {batch} has a link to each")
        self._jobs |= {name: task.job for name, task in zip(names, tasks, strict=True)}
        return number

    def _look(self) -> bool:
        """Asks SLURM for the queue and prints what has changed; returns whether a job has ended."""
        try:
            queue = read_queue()
        except subprocess.SubprocessError as error:
            if self._answers:
                say(Text(printable(f"SLURM does not answer ({describe_error(error)}); waiting for it"), style="yellow"))
            self._answers = False
            return False
        if not self._answers:
            say("SLURM answers again")
        self._answers = True
        gone = [name for name in self._jobs if name not in queue]
        for name, job in self._jobs.items():
            if name in queue:
                self._print_change(name, job, queue[name])
        for name in gone:
            job = self._jobs.pop(name)
            if name not in self._started:
                self._on_start(job)
            self._started.discard(name)
            self._on_end(record_end(job.folder, name))
        return bool(gone)

    def _print_change(self, name: str, job: Job, queued: Queued) -> None:
        """Prints how a job has changed since the last look."""
        status = read_json(job.folder / STATUS_FILE) or {}
        timeouts = status.get(TIMEOUTS, 0)
        # A job that waited only for a moment is not seen to wait.
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
                job.status, job.reason = Status.running, None  # SLURM says so; the lock may not be visible here
            self._on_wait(running)
            if time.monotonic() >= end:
                return
            time.sleep(min(max(end - time.monotonic(), 0), 0.5))

    def _print_rest(self) -> None:
        """Prints which jobs are still in SLURM, and how to follow or cancel them."""
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
    return shorten(" ".join(job.overrides) or job.name, MAX_LABEL)


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} {'job' if len(names) == 1 else 'jobs'}"


def _ranges(names: Iterator[str] | Sequence[str] | Mapping[str, Job], separator: str = ", ") -> str:
    """Returns SLURM's names of jobs in its own notation: `12_[0-3,7], 13_0`."""
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
